//! What a product computes in: f32, or pairs of bf16 that a processor multiplies and sums in f32.
//!
//! Either comes in words of 32 bits, one f32 or two neighbouring bf16 of the inner dimension, so that one driver moves
//! both: a tile multiplies words with words.

use half::bf16;

use crate::cpu::simd::{Simd, Tile};
use crate::cpu::value::Value;

/// An arithmetic of the products.
pub(crate) trait Element: 'static {
    /// Dtype of the activations.
    type Value: Value;
    /// Values in a word.
    const PER_WORD: usize;

    /// [`Simd::tile`] in this arithmetic, strides and depth in words.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    unsafe fn tile<S: Simd>(tile: Tile);

    /// The result, rounded to nearest even.
    #[inline(always)]
    fn round(value: f32) -> Self::Value {
        Self::Value::round(value)
    }
}

/// f32 throughout.
pub(crate) struct F32;

impl Element for F32 {
    type Value = f32;
    const PER_WORD: usize = 1;

    #[inline(always)]
    unsafe fn tile<S: Simd>(tile: Tile) {
        unsafe { S::tile(tile) }
    }
}

/// bf16 activations and weights, sums in f32.
pub(crate) struct Pairs;

impl Element for Pairs {
    type Value = bf16;
    const PER_WORD: usize = 2;

    #[inline(always)]
    unsafe fn tile<S: Simd>(tile: Tile) {
        unsafe { S::tile_of_pairs(tile) }
    }
}
