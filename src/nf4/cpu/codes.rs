//! A packed weight in the words of an arithmetic.

use std::ops::Range;

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
pub(crate) trait Codes: Element {
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
}

/// Values in the weight's precision.
impl Codes for F32 {
    #[inline(always)]
    unsafe fn decode<S: Simd>(w: &Packed, range: Range<usize>, out: &mut [f32]) {
        unsafe { w.decode::<S>(range, out) }
    }

    #[inline(always)]
    unsafe fn decode_rows<S: Simd>(w: &Packed, range: Range<usize>, out: &mut [f32]) {
        unsafe { w.decode::<S>(range, out) }
    }
}

/// Values of two rows on their way into pairs.
const ROW: usize = 128;

/// Values in bf16, whatever the weight's precision is.
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
}
