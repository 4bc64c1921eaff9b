//! The squared norms of a packed weight's rows, on all threads, a row at a time in cache.

use super::packed::Packed;
use crate::cpu::parallel::for_each_chunk;
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch};

/// Values that are dequantised at a time.
const RUN: usize = 4096;

/// `out[o] = Σ_i w[o, i]²`.
///
/// # Panics
///
/// If `out` has another length than `w` has rows.
pub(super) fn squared(isa: Isa, w: &Packed, out: &mut [f32]) {
    let [rows, columns] = w.shape;
    assert_eq!(rows, out.len(), "norms of a weight's rows");
    let chunk = RUN.div_ceil(columns.max(1));
    for_each_chunk(out, chunk, w.len(), |index, out| {
        let first = index * chunk;
        with_scratch(RUN, |values| {
            let rows = Rows {
                w,
                first,
                values,
                out,
            };
            dispatch(isa, rows);
        });
    });
}

struct Rows<'a> {
    w: &'a Packed<'a>,
    first: usize,
    values: &'a mut [f32],
    out: &'a mut [f32],
}

impl Kernel for Rows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let columns = self.w.shape[1];
        for (row, out) in self.out.iter_mut().enumerate() {
            let begin = (self.first + row) * columns;
            *out = 0.0;
            for at in (0..columns).step_by(RUN) {
                let values = &mut self.values[..RUN.min(columns - at)];
                let range = begin + at..begin + at + values.len();
                // SAFETY: the instructions are those of `S`.
                unsafe {
                    self.w.decode::<S>(range, values);
                    *out += sum_of_squares::<S>(values);
                }
            }
        }
    }
}

/// # Safety
///
/// As [`Simd`].
#[inline(always)]
unsafe fn sum_of_squares<S: Simd>(values: &[f32]) -> f32 {
    let whole = values.chunks_exact(4 * S::LANES);
    let rest: f32 = whole.remainder().iter().map(|value| value * value).sum();
    // SAFETY: as asked; a chunk has four vectors.
    unsafe {
        let mut sums = [S::splat(0.0); 4];
        for chunk in whole {
            for (i, sum) in sums.iter_mut().enumerate() {
                let value = S::load(chunk.as_ptr().add(i * S::LANES));
                *sum = S::mul_add(value, value, *sum);
            }
        }
        let [a, b, c, d] = sums;
        S::sum(S::add(S::add(a, b), S::add(c, d))) + rest
    }
}
