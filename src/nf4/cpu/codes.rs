//! A packed weight in the words of an arithmetic.

use std::ops::Range;

use half::bf16;

use super::packed::Packed;
use crate::cpu::matmul::Source;
use crate::cpu::matmul::element::{Element, F32, Pairs};
use crate::cpu::simd::Simd;

impl<E: Codes> Source<E> for &Packed<'_> {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    #[inline(always)]
    unsafe fn run<S: Simd>(&self, range: Range<usize>, out: &mut [f32]) {
        unsafe { E::decode::<S>(self, range, out) }
    }

    #[inline(always)]
    unsafe fn runs<S: Simd>(&self, range: Range<usize>, out: &mut [f32]) {
        unsafe { E::decode_rows::<S>(self, range, out) }
    }
}

/// An arithmetic that codes can be turned into.
pub(super) trait Codes: Element {
    /// [`Source::run`] of a packed weight.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    unsafe fn decode<S: Simd>(w: &Packed, range: Range<usize>, out: &mut [f32]);

    /// [`Source::runs`] of a packed weight.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    unsafe fn decode_rows<S: Simd>(w: &Packed, range: Range<usize>, out: &mut [f32]);

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
}

/// From so many rows on, [`F32`] scales values, not sums.
const SCALE_VALUES: usize = 4;

impl Codes for F32 {
    #[inline(always)]
    unsafe fn decode<S: Simd>(w: &Packed, range: Range<usize>, out: &mut [f32]) {
        unsafe { w.decode::<S>(range, out) }
    }

    #[inline(always)]
    unsafe fn decode_rows<S: Simd>(w: &Packed, range: Range<usize>, out: &mut [f32]) {
        unsafe { w.decode::<S>(range, out) }
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
}

/// Values of two rows on their way into pairs.
const ROW: usize = 128;

/// The weight is rounded to bf16, as bitsandbytes does for bf16 activations.
impl Codes for Pairs {
    #[inline(always)]
    unsafe fn decode<S: Simd>(w: &Packed, range: Range<usize>, out: &mut [f32]) {
        unsafe { w.decode_bf16::<S>(range, bytemuck::cast_slice_mut(out)) }
    }

    #[inline(always)]
    unsafe fn decode_rows<S: Simd>(w: &Packed, range: Range<usize>, out: &mut [f32]) {
        let stride = w.shape[1];
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
}
