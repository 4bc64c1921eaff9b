//! Dequantising a whole weight, `W = codebook[codes] · scales`, on all threads.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::packed::Packed;
use super::scratch::with_scratch;
use super::simd::{Isa, Kernel, Simd, dispatch};

/// Values of a task: worth one, and small enough to balance.
const TASK: usize = 64 * 1024;
/// Values on their way to another dtype, in cache.
const STEP: usize = 4096;

/// A float dtype that values are rounded to, once.
pub(crate) trait Rounded: Copy + Send {
    /// `from`, decoded by `decode` into what it is given, to `to`.
    fn round(to: &mut [Self], decode: impl Fn(std::ops::Range<usize>, &mut [f32]));
}

impl Rounded for f32 {
    fn round(to: &mut [Self], decode: impl Fn(std::ops::Range<usize>, &mut [f32])) {
        decode(0..to.len(), to);
    }
}

impl Rounded for bf16 {
    fn round(to: &mut [Self], decode: impl Fn(std::ops::Range<usize>, &mut [f32])) {
        in_steps(to, decode, |to, from| to.convert_from_f32_slice(from));
    }
}

impl Rounded for f16 {
    fn round(to: &mut [Self], decode: impl Fn(std::ops::Range<usize>, &mut [f32])) {
        in_steps(to, decode, |to, from| to.convert_from_f32_slice(from));
    }
}

impl Rounded for f64 {
    fn round(to: &mut [Self], decode: impl Fn(std::ops::Range<usize>, &mut [f32])) {
        in_steps(to, decode, |to, from| {
            to.iter_mut()
                .zip(from)
                .for_each(|(to, &from)| *to = from.into())
        });
    }
}

fn in_steps<T>(
    to: &mut [T],
    decode: impl Fn(std::ops::Range<usize>, &mut [f32]),
    round: impl Fn(&mut [T], &[f32]),
) {
    with_scratch(STEP, |values| {
        for (step, to) in to.chunks_mut(STEP).enumerate() {
            let values = &mut values[..to.len()];
            decode(step * STEP..step * STEP + to.len(), values);
            round(to, values);
        }
    });
}

/// Every value of `w`, row-major, to `out`.
///
/// # Panics
///
/// If `out` has another length.
pub(crate) fn dequantize<T: Rounded>(isa: Isa, w: &Packed, out: &mut [T]) {
    assert_eq!(w.len(), out.len(), "values of a dequantised weight");
    out.par_chunks_mut(TASK)
        .enumerate()
        .for_each(|(task, out)| {
            T::round(out, |range, out| {
                let first = task * TASK + range.start;
                let range = first..first + range.len();
                dispatch(isa, Decode { w, range, out })
            });
        });
}

struct Decode<'a> {
    w: &'a Packed<'a>,
    range: std::ops::Range<usize>,
    out: &'a mut [f32],
}

impl Kernel for Decode<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the instructions are those of `S`.
        unsafe { self.w.decode::<S>(self.range, self.out) }
    }
}
