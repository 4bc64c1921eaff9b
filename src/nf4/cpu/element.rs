//! What a product computes in: f32, or pairs of bf16 that a processor multiplies and sums in f32.
//!
//! Either comes in words of 32 bits, one f32 or two neighbouring bf16 of the inner dimension, so that one driver moves
//! both: a tile multiplies words with words.

use std::ops::Range;

use bytemuck::Pod;
use half::bf16;

use super::packed::Packed;
use crate::cpu::simd::{Simd, Tile};

/// An arithmetic of the products.
pub(super) trait Element: 'static {
    /// Dtype of the activations.
    type Value: Pod + burn::tensor::Element + Into<f32>;
    /// Values in a word.
    const PER_WORD: usize;

    /// The values of a run of the weight as words; the run begins and ends on words.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    unsafe fn decode<S: Simd>(w: &Packed, range: Range<usize>, out: &mut [f32]);

    /// `PER_WORD` rows of the weight, whose starts are `stride` values apart, as words that hold a value of each.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    unsafe fn decode_rows<S: Simd>(w: &Packed, range: Range<usize>, stride: usize, out: &mut [f32]);

    /// [`Simd::tile`] in this arithmetic, strides and depth in words.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    unsafe fn tile<S: Simd>(tile: Tile);

    /// Puts a row of `x` in the order in which the words of a vector give their codes, whole runs of `8 · LANES` values.
    fn permute<S: Simd>(x: &[Self::Value], order: &mut [f32]);

    /// Adds to `sums[r]` the products of the eight codes of each word with row `r` of the permuted `x`.
    ///
    /// # Safety
    ///
    /// As [`Simd`]; rows of `x` are `stride` words apart.
    unsafe fn eight<S: Simd, const R: usize>(
        codebook: S::Table,
        words: S::Words,
        scale: S::F32,
        x: *const f32,
        stride: usize,
        sums: &mut [S::F32; R],
    );

    /// The result, rounded to nearest even.
    fn round(value: f32) -> Self::Value;
}

/// f32 throughout.
pub(super) struct F32;

impl Element for F32 {
    type Value = f32;
    const PER_WORD: usize = 1;

    #[inline(always)]
    unsafe fn decode<S: Simd>(w: &Packed, range: Range<usize>, out: &mut [f32]) {
        unsafe { w.decode::<S>(range, out) }
    }

    #[inline(always)]
    unsafe fn decode_rows<S: Simd>(w: &Packed, range: Range<usize>, _: usize, out: &mut [f32]) {
        unsafe { w.decode::<S>(range, out) }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd>(tile: Tile) {
        unsafe { S::tile(tile) }
    }

    #[inline(always)]
    fn permute<S: Simd>(x: &[f32], order: &mut [f32]) {
        let run = 8 * S::LANES;
        for (x, order) in x.chunks_exact(run).zip(order.chunks_exact_mut(run)) {
            for (j, order) in order.chunks_exact_mut(S::LANES).enumerate() {
                for (lane, order) in order.iter_mut().enumerate() {
                    // The first code of a byte is in its high half.
                    *order = x[8 * lane + (j ^ 1)];
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn eight<S: Simd, const R: usize>(
        codebook: S::Table,
        words: S::Words,
        scale: S::F32,
        x: *const f32,
        stride: usize,
        sums: &mut [S::F32; R],
    ) {
        // SAFETY: as asked.
        unsafe {
            let mut parts = [S::splat(0.0); R];
            macro_rules! lookup {
                ($($j:literal)*) => {$(
                    let mut value = S::lookup(codebook, S::shift_right::<{ 4 * $j }>(words));
                    if R >= SCALE_VALUES {
                        value = S::mul(value, scale);
                    }
                    for r in 0..R {
                        let x = S::load(x.add(r * stride + $j * S::LANES));
                        let sum = if R >= SCALE_VALUES { &mut sums[r] } else { &mut parts[r] };
                        *sum = S::mul_add(value, x, *sum);
                    }
                )*};
            }
            lookup!(0 1 2 3 4 5 6 7);
            if R < SCALE_VALUES {
                for (sum, part) in sums.iter_mut().zip(parts) {
                    *sum = S::mul_add(part, scale, *sum);
                }
            }
        }
    }

    #[inline(always)]
    fn round(value: f32) -> f32 {
        value
    }
}

/// bf16 activations and weights, sums in f32. The weight is rounded to bf16, as bitsandbytes does for bf16 activations.
pub(super) struct Pairs;

/// From so many rows on, [`F32`] scales values, not sums.
const SCALE_VALUES: usize = 4;

/// Values of two rows on their way into pairs.
const ROW: usize = 128;

impl Element for Pairs {
    type Value = bf16;
    const PER_WORD: usize = 2;

    #[inline(always)]
    unsafe fn decode<S: Simd>(w: &Packed, range: Range<usize>, out: &mut [f32]) {
        unsafe { w.decode_bf16::<S>(range, bytemuck::cast_slice_mut(out)) }
    }

    #[inline(always)]
    unsafe fn decode_rows<S: Simd>(
        w: &Packed,
        range: Range<usize>,
        stride: usize,
        out: &mut [f32],
    ) {
        let mut rows = [[0; ROW]; 2];
        for first in range.clone().step_by(ROW) {
            let n = ROW.min(range.end - first);
            let out = &mut out[first - range.start..][..n];
            // SAFETY: as asked; both rows and `out` have `n` values.
            unsafe {
                w.decode_bf16::<S>(first..first + n, &mut rows[0]);
                w.decode_bf16::<S>(first + stride..first + stride + n, &mut rows[1]);
                S::pair(
                    rows[0].as_ptr(),
                    rows[1].as_ptr(),
                    n,
                    out.as_mut_ptr().cast(),
                );
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd>(tile: Tile) {
        unsafe { S::tile_of_pairs(tile) }
    }

    #[inline(always)]
    fn permute<S: Simd>(x: &[bf16], order: &mut [f32]) {
        let run = 8 * S::LANES;
        for (x, order) in x.chunks_exact(run).zip(order.chunks_exact_mut(run / 2)) {
            for (j, order) in order.chunks_exact_mut(S::LANES).enumerate() {
                for (lane, order) in order.iter_mut().enumerate() {
                    let [low, high] = [0, 4].map(|half| x[8 * lane + half + (j ^ 1)].to_bits());
                    *order = f32::from_bits(u32::from(low) | u32::from(high) << 16);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn eight<S: Simd, const R: usize>(
        codebook: S::Table,
        words: S::Words,
        scale: S::F32,
        x: *const f32,
        stride: usize,
        sums: &mut [S::F32; R],
    ) {
        // SAFETY: as asked.
        unsafe {
            let codebook = S::table16(codebook);
            let mut parts = [S::splat(0.0); R];
            macro_rules! lookup {
                ($($j:literal)*) => {$(
                    let value = S::lookup_pairs::<{ 4 * $j }>(codebook, words);
                    for (r, part) in parts.iter_mut().enumerate() {
                        let x = S::load(x.add(r * stride + $j * S::LANES));
                        *part = S::mul_add_pairs(value, x, *part);
                    }
                )*};
            }
            lookup!(0 1 2 3);
            for (sum, part) in sums.iter_mut().zip(parts) {
                *sum = S::mul_add(part, scale, *sum);
            }
        }
    }

    #[inline(always)]
    fn round(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
}
