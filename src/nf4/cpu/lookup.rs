//! How the product with few rows turns a vector of words, eight codes each, into products with `x`.

use half::bf16;

use super::packed::Packed;
use super::precision::{Precision, bf16_table};
use crate::cpu::simd::{Simd, SimdOfPairs};
use crate::cpu::value::Value;
use crate::nf4::codebook::CODEBOOK;

/// Codes of eight words. Eight lanes share a table of values where a block is no shorter.
const EIGHT_WORDS: usize = 64;

/// A way to look codes up, in a precision of the weight.
pub(super) trait Lookup {
    /// Dtype of the activations.
    type Value: Value;
    /// Values of `x` in a word of 32 bits.
    const PER_WORD: usize;
    /// Codes that have to lie in one block, for whole vectors of words to be looked up.
    const IN_A_BLOCK: usize;

    /// Puts a row of `x` in the order in which the words of a vector give their codes, whole runs of `8 · lanes` values.
    fn permute(lanes: usize, x: &[Self::Value], order: &mut [f32]);
}

/// [`Lookup`] on an instruction set.
pub(super) trait LookupOn<S: Simd>: Lookup {
    /// What a vector of words is looked up in, with the scales of its blocks.
    type Tables: Copy;

    /// The tables of the words of codes `k` and following of a row with these scales, one for each block; there are three more
    /// values behind them. `blocks` is [`Simd::block_of_lane`].
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    unsafe fn tables(w: &Packed, scales: &[f32], k: usize, blocks: S::Words) -> Self::Tables;

    /// Adds to `sums[r]` the products of the eight codes of each word with row `r` of the permuted `x`.
    ///
    /// # Safety
    ///
    /// As [`Simd`]; rows of `x` are `stride` words apart.
    unsafe fn eight<const R: usize>(
        tables: Self::Tables,
        words: S::Words,
        x: *const f32,
        stride: usize,
        sums: &mut [S::F32; R],
    );
}

/// f32 activations and values that are not rounded, so that sums may be scaled in place of values.
pub(super) struct Exact;

/// From so many rows on, [`Exact`] scales values, not sums.
const SCALE_VALUES: usize = 4;

impl Lookup for Exact {
    type Value = f32;
    const PER_WORD: usize = 1;
    const IN_A_BLOCK: usize = 32;

    #[inline(always)]
    fn permute(lanes: usize, x: &[f32], order: &mut [f32]) {
        let run = 8 * lanes;
        for (x, order) in x.chunks_exact(run).zip(order.chunks_exact_mut(run)) {
            for (j, order) in order.chunks_exact_mut(lanes).enumerate() {
                for (lane, order) in order.iter_mut().enumerate() {
                    // The first code of a byte is in its high half.
                    *order = x[8 * lane + (j ^ 1)];
                }
            }
        }
    }
}

impl<S: Simd> LookupOn<S> for Exact {
    /// The codebook, and each lane's scale.
    type Tables = (S::Table, S::F32);

    #[inline(always)]
    unsafe fn tables(w: &Packed, scales: &[f32], k: usize, blocks: S::Words) -> Self::Tables {
        let scales = &scales[k >> w.log_block()..][..4];
        // SAFETY: as asked; four scales are read, and the codebook has sixteen values.
        unsafe {
            let codebook = S::table(CODEBOOK.as_ptr());
            (codebook, S::spread(scales.as_ptr(), blocks))
        }
    }

    #[inline(always)]
    unsafe fn eight<const R: usize>(
        (codebook, scale): Self::Tables,
        words: S::Words,
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

/// f32 activations, and values that are rounded to sixteen bits: a table of them for each eight lanes.
pub(super) struct Rounded;

impl Lookup for Rounded {
    type Value = f32;
    const PER_WORD: usize = 1;
    const IN_A_BLOCK: usize = EIGHT_WORDS;

    #[inline(always)]
    fn permute(lanes: usize, x: &[f32], order: &mut [f32]) {
        Exact::permute(lanes, x, order);
    }
}

impl<S: Simd> LookupOn<S> for Rounded {
    type Tables = S::Tables;

    #[inline(always)]
    unsafe fn tables(w: &Packed, scales: &[f32], k: usize, _: S::Words) -> Self::Tables {
        let [first, second] = scales_of_eights::<S>(w, scales, k);
        let first = w.precision().table(first);
        let second = match S::LANES > 8 {
            true => w.precision().table(second),
            false => first,
        };
        // SAFETY: as asked.
        unsafe { S::tables([&first, &second]) }
    }

    #[inline(always)]
    unsafe fn eight<const R: usize>(
        tables: Self::Tables,
        words: S::Words,
        x: *const f32,
        stride: usize,
        sums: &mut [S::F32; R],
    ) {
        // SAFETY: as asked.
        unsafe {
            macro_rules! lookup {
                ($($j:literal)*) => {$(
                    let value = S::lookup_by_eight(tables, S::shift_right::<{ 4 * $j }>(words));
                    for (r, sum) in sums.iter_mut().enumerate() {
                        let x = S::load(x.add(r * stride + $j * S::LANES));
                        *sum = S::mul_add(value, x, *sum);
                    }
                )*};
            }
            lookup!(0 1 2 3 4 5 6 7);
        }
    }
}

/// bf16 activations and values, multiplied in pairs.
pub(super) struct InPairs;

impl Lookup for InPairs {
    type Value = bf16;
    const PER_WORD: usize = 2;
    const IN_A_BLOCK: usize = EIGHT_WORDS;

    #[inline(always)]
    fn permute(lanes: usize, x: &[bf16], order: &mut [f32]) {
        let run = 8 * lanes;
        for (x, order) in x.chunks_exact(run).zip(order.chunks_exact_mut(run / 2)) {
            for (j, order) in order.chunks_exact_mut(lanes).enumerate() {
                for (lane, order) in order.iter_mut().enumerate() {
                    let [low, high] = [0, 4].map(|half| x[8 * lane + half + (j ^ 1)].to_bits());
                    *order = f32::from_bits(u32::from(low) | u32::from(high) << 16);
                }
            }
        }
    }
}

impl<S: SimdOfPairs> LookupOn<S> for InPairs {
    type Tables = S::Tables16;

    #[inline(always)]
    unsafe fn tables(w: &Packed, scales: &[f32], k: usize, _: S::Words) -> Self::Tables {
        debug_assert_eq!(w.precision(), Precision::Bf16);
        let [first, second] = scales_of_eights::<S>(w, scales, k);
        let first = bf16_table(first);
        let second = match S::LANES > 8 {
            true => bf16_table(second),
            false => first,
        };
        // SAFETY: as asked.
        unsafe { S::tables16([&first, &second]) }
    }

    #[inline(always)]
    unsafe fn eight<const R: usize>(
        tables: Self::Tables,
        words: S::Words,
        x: *const f32,
        stride: usize,
        sums: &mut [S::F32; R],
    ) {
        // SAFETY: as asked.
        unsafe {
            macro_rules! lookup {
                ($($j:literal)*) => {$(
                    let value = S::lookup_pairs::<{ 4 * $j }>(tables, words);
                    for (r, sum) in sums.iter_mut().enumerate() {
                        let x = S::load(x.add(r * stride + $j * S::LANES));
                        *sum = S::mul_add_pairs(value, x, *sum);
                    }
                )*};
            }
            lookup!(0 1 2 3);
        }
    }
}

/// The scales of the first eight words from code `k` on and of the eight after them, if a vector has more than eight.
#[inline(always)]
fn scales_of_eights<S: Simd>(w: &Packed, scales: &[f32], k: usize) -> [f32; 2] {
    let log = w.log_block();
    let next = if S::LANES > 8 { k + EIGHT_WORDS } else { k };
    [scales[k >> log], scales[next >> log]]
}
