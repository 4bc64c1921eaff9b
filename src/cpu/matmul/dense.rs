//! A dense weight.

use std::ops::Range;

use half::bf16;

use super::Source;
use super::element::{F32, Pairs};
use crate::cpu::simd::Simd;

/// A weight `[d_out, d_in]`, row-major.
#[derive(Clone, Copy)]
pub(crate) struct Dense<'a, T> {
    values: &'a [T],
    shape: [usize; 2],
}

impl<'a, T> Dense<'a, T> {
    /// # Panics
    ///
    /// If the values are not of the shape.
    pub(crate) fn new(values: &'a [T], shape: [usize; 2]) -> Self {
        assert_eq!(
            Some(values.len()),
            shape[0].checked_mul(shape[1]),
            "values of a dense weight"
        );
        Self { values, shape }
    }
}

impl Source<F32> for Dense<'_, f32> {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    #[inline(always)]
    unsafe fn run<S: Simd>(&self, range: Range<usize>, out: &mut [f32]) {
        out[..range.len()].copy_from_slice(&self.values[range]);
    }

    #[inline(always)]
    unsafe fn runs<S: Simd>(&self, range: Range<usize>, out: &mut [f32]) {
        out[..range.len()].copy_from_slice(&self.values[range]);
    }
}

impl Source<Pairs> for Dense<'_, bf16> {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    #[inline(always)]
    unsafe fn run<S: Simd>(&self, range: Range<usize>, out: &mut [f32]) {
        let out: &mut [bf16] = bytemuck::cast_slice_mut(out);
        out[..range.len()].copy_from_slice(&self.values[range]);
    }

    #[inline(always)]
    unsafe fn runs<S: Simd>(&self, range: Range<usize>, out: &mut [f32]) {
        let n = range.len();
        let first = &self.values[range.clone()];
        let second = &self.values[range.start + self.shape[1]..][..n];
        let out = &mut out[..n];
        // SAFETY: the instructions are those of `S`; all three are `n` long.
        unsafe {
            S::pair(
                first.as_ptr().cast(),
                second.as_ptr().cast(),
                n,
                out.as_mut_ptr().cast(),
            );
        }
    }
}

/// A weight in bf16 for products in f32: its values are widened a strip at a time.
#[derive(Clone, Copy)]
pub(crate) struct Widened<'a>(pub(crate) Dense<'a, bf16>);

impl Source<F32> for Widened<'_> {
    fn shape(&self) -> [usize; 2] {
        self.0.shape
    }

    #[inline(always)]
    unsafe fn run<S: Simd>(&self, range: Range<usize>, out: &mut [f32]) {
        for (out, &value) in out.iter_mut().zip(&self.0.values[range]) {
            *out = value.into();
        }
    }

    #[inline(always)]
    unsafe fn runs<S: Simd>(&self, range: Range<usize>, out: &mut [f32]) {
        // SAFETY: as asked; a word is one value.
        unsafe { <Self as Source<F32>>::run::<S>(self, range, out) }
    }
}
