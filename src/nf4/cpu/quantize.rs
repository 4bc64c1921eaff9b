//! Quantising runs of whole blocks, bit for bit as the plain reference does.
//!
//! `a = max |x_i|`, `q_i = code(x_i · (1 / max(a, 1e-38)))` for each block, see [`blocks`](crate::nf4::blocks); the code
//! takes one comparison, see [`cells`](crate::cpu::simd::cells). A partial last block, which bitsandbytes divides instead, is left
//! to the reference.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch};
use crate::nf4::blocks::{BlockSize, SMALLEST_SCALE, quantize_blocks_into};

/// Values of a task: a multiple of every block size, and small enough to spread a small matrix.
pub(super) const TASK: usize = 64 * 1024;
/// Values widened at a time, to stay in cache: a multiple of every block size.
const STEP: usize = 4096;

/// A float type that f32 holds exactly.
pub trait Widened: Copy + Into<f32> + Sync {
    /// `values` in f32, in `memory` of the same length or more if they have to be converted.
    fn widen<'a>(values: &'a [Self], memory: &'a mut [f32]) -> &'a [f32];

    /// `values` in f32 to `memory` of the same length.
    #[inline(always)]
    fn copy(values: &[Self], memory: &mut [f32]) {
        Self::widen(values, memory);
    }
}

impl Widened for f32 {
    #[inline(always)]
    fn widen<'a>(values: &'a [Self], _memory: &'a mut [f32]) -> &'a [f32] {
        values
    }

    #[inline(always)]
    fn copy(values: &[Self], memory: &mut [f32]) {
        memory.copy_from_slice(values);
    }
}

impl Widened for bf16 {
    #[inline(always)]
    fn widen<'a>(values: &'a [Self], memory: &'a mut [f32]) -> &'a [f32] {
        let memory = &mut memory[..values.len()];
        for (to, from) in memory.iter_mut().zip(values) {
            // What the conversion of `half` does for every number, without its branch for NaN.
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
        memory
    }
}

impl Widened for f16 {
    #[inline(always)]
    fn widen<'a>(values: &'a [Self], memory: &'a mut [f32]) -> &'a [f32] {
        let memory = &mut memory[..values.len()];
        values.convert_to_f32_slice(memory);
        memory
    }
}

/// Quantises `values` into memory of the right lengths, on all threads; the error is the index of the first value that
/// is not finite.
pub(crate) fn quantize<T: Widened>(
    isa: Isa,
    values: &[T],
    block_size: BlockSize,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Result<(), usize> {
    assert_eq!(codes.len(), values.len().div_ceil(2), "bytes of codes");
    assert_eq!(absmax.len(), block_size.blocks(values.len()), "scales");
    let tasks = values
        .par_chunks(TASK)
        .zip(codes.par_chunks_mut(TASK / 2))
        .zip(absmax.par_chunks_mut(TASK / block_size.get()));
    let failed = tasks
        .enumerate()
        .find_map_first(|(task, ((values, codes), absmax))| {
            let result = run(isa, values, block_size, codes, absmax);
            result.err().map(|index| task * TASK + index)
        });
    failed.map_or(Ok(()), Err)
}

/// [`quantize`] on this thread.
pub(crate) fn run<T: Widened>(
    isa: Isa,
    values: &[T],
    block_size: BlockSize,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Result<(), usize> {
    with_scratch(STEP, |memory| {
        dispatch(
            isa,
            Quantize {
                values,
                block_size,
                codes,
                absmax,
                memory,
            },
        )
    })
}

struct Quantize<'a, T> {
    values: &'a [T],
    block_size: BlockSize,
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
    /// Room for [`STEP`] values.
    memory: &'a mut [f32],
}

impl<T: Widened> Kernel for Quantize<'_, T> {
    type Output = Result<(), usize>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Result<(), usize> {
        let size = self.block_size.get();
        let steps = self
            .values
            .chunks(STEP)
            .zip(self.codes.chunks_mut(STEP / 2));
        let steps = steps.zip(self.absmax.chunks_mut(STEP / size));
        for (step, ((values, codes), absmax)) in steps.enumerate() {
            let values = T::widen(values, self.memory);
            let (blocks, rest) = values.split_at(values.len() / size * size);
            let (codes, rest_codes) = codes.split_at_mut(blocks.len() / 2);
            let (absmax, rest_absmax) = absmax.split_at_mut(blocks.len() / size);
            // SAFETY: the instructions are those of `S`.
            unsafe { whole_blocks::<S>(blocks, size, codes, absmax) }
                .and_then(|()| {
                    quantize_blocks_into(rest, self.block_size, rest_codes, rest_absmax)
                        .map_err(|index| blocks.len() + index)
                })
                .map_err(|index| step * STEP + index)?;
        }
        Ok(())
    }
}

/// # Safety
///
/// As [`Simd`].
#[inline(always)]
unsafe fn whole_blocks<S: Simd>(
    values: &[f32],
    size: usize,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Result<(), usize> {
    let blocks = values
        .chunks_exact(size)
        .zip(codes.chunks_exact_mut(size / 2));
    for (index, ((values, codes), absmax)) in blocks.zip(absmax).enumerate() {
        // SAFETY: a block is a multiple of 32 values, and so of the lanes, and its codes are half as many bytes.
        let largest = unsafe {
            let mut largest = [S::splat_word(0); 2];
            for i in (0..size).step_by(2 * S::LANES) {
                let values = values.as_ptr().add(i);
                largest[0] = S::max_magnitude(largest[0], S::load(values));
                largest[1] = S::max_magnitude(largest[1], S::load(values.add(S::LANES)));
            }
            S::max_word(largest[0]).max(S::max_word(largest[1]))
        };
        let largest = f32::from_bits(largest);
        if !largest.is_finite() {
            let within = values.iter().position(|x| !x.is_finite()).unwrap_or(0);
            return Err(index * size + within);
        }
        *absmax = largest;
        let reciprocal = 1.0 / largest.max(SMALLEST_SCALE);
        // SAFETY: as above; and as `|x| ≤ largest`, the products are in `[-1, 1]` but for roundings.
        unsafe { S::encode(values.as_ptr(), reciprocal, size / 32, codes.as_mut_ptr()) };
    }
    Ok(())
}
