//! Products of matrices, on all threads, with sums in f32.
//!
//! * [`many_rows`] and [`transposed`]: rows times a weight, which may be packed: it comes from a [`Source`], a strip at a
//!   time, to a scratch that stays in cache; with a [`low_rank`] term to end with;
//! * [`few_rows`]: a few rows times a dense weight, which is read where it lies;
//! * [`target`]: where their results go; [`window`]: a part of a weight;
//! * [`element`]: what they compute in, f32 or pairs of bf16;
//! * [`skinny`]: products with the factors of a low-rank change, a [`factor`] in any order of memory;
//! * [`small`]: products of matrices in a scratch.

pub(crate) mod dense;
pub(crate) mod element;
pub(crate) mod factor;
pub(crate) mod few_rows;
pub(crate) mod low_rank;
pub(crate) mod many_rows;
pub(crate) mod skinny;
pub(crate) mod small;
pub(crate) mod target;
#[cfg(test)]
mod tests;
pub(crate) mod transposed;
pub(crate) mod window;

use std::ops::Range;

use element::Element;

use super::simd::Simd;

/// Where the values of a weight `[d_out, d_in]` come from, in the words of an arithmetic.
pub(crate) trait Source<E: Element>: Copy + Send + Sync {
    /// `[d_out, d_in]`.
    fn shape(&self) -> [usize; 2];

    /// A run of the row-major values as words; it begins and ends on words, within a row.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    unsafe fn run<S: Simd>(&self, range: Range<usize>, out: &mut [f32]);

    /// The same run of `PER_WORD` rows, the first of which is given, as words that hold a value of each.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    unsafe fn runs<S: Simd>(&self, range: Range<usize>, out: &mut [f32]);
}
