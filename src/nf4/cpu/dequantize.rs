//! Dequantising a whole weight, `W = codebook[codes] · scales`, on all threads.
//!
//! A block's values are sixteen products; they are formed first, rounded to the dtype asked for, and looked up by code.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::packed::Packed;
use super::precision::bf16_bits;
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch};
use crate::nf4::codebook::CODEBOOK;

/// Values of a task: a multiple of every block size, worth a task, and small enough to balance.
const TASK: usize = 64 * 1024;
/// Values on their way to f64, in cache.
const STEP: usize = 4096;
/// Blocks whose tables are formed at a time.
const TABLES: usize = 64;

/// A weight to be dequantised, and by what instructions.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    isa: Isa,
    w: &'a Packed<'a>,
}

/// A float dtype that values are rounded to, once.
pub trait Rounded: Copy + Send {
    /// Values of a weight to `out`, from `first`, which begins a block.
    fn decode(from: Source, first: usize, out: &mut [Self]);
}

impl Rounded for f32 {
    fn decode(Source { isa, w }: Source, first: usize, out: &mut [Self]) {
        dispatch(isa, Decode { w, first, out });
    }
}

impl Rounded for bf16 {
    fn decode(Source { isa, w }: Source, first: usize, out: &mut [Self]) {
        dispatch(isa, DecodeHalf { w, first, out });
    }
}

impl Rounded for f16 {
    fn decode(Source { isa, w }: Source, first: usize, out: &mut [Self]) {
        dispatch(isa, DecodeHalf { w, first, out });
    }
}

impl Rounded for f64 {
    fn decode(from: Source, first: usize, out: &mut [Self]) {
        with_scratch(STEP, |values| {
            for (step, out) in out.chunks_mut(STEP).enumerate() {
                let values = &mut values[..out.len()];
                f32::decode(from, first + step * STEP, values);
                for (out, &value) in out.iter_mut().zip(&*values) {
                    *out = value.into();
                }
            }
        });
    }
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
        .for_each(|(task, out)| T::decode(Source { isa, w }, task * TASK, out));
}

struct Decode<'a> {
    w: &'a Packed<'a>,
    first: usize,
    out: &'a mut [f32],
}

impl Kernel for Decode<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the instructions are those of `S`.
        unsafe {
            self.w
                .decode::<S>(self.first..self.first + self.out.len(), self.out)
        }
    }
}

/// A float of sixteen bits.
trait Half: bytemuck::Pod {
    /// Rounds to nearest even. `from` holds no NaN.
    fn round(from: &[f32], to: &mut [Self]);
}

impl Half for bf16 {
    #[inline(always)]
    fn round(from: &[f32], to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = Self::from_bits(bf16_bits(*from));
        }
    }
}

impl Half for f16 {
    #[inline(always)]
    fn round(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

struct DecodeHalf<'a, T> {
    w: &'a Packed<'a>,
    first: usize,
    out: &'a mut [T],
}

impl<T: Half> Kernel for DecodeHalf<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let size = self.w.block_size();
        let mut scales = [0.0; TABLES];
        let mut wide = [0.0; TABLES * 16];
        let mut tables = [T::zeroed(); TABLES * 16];
        let mut first = self.first;
        for out in self.out.chunks_mut(TABLES * size) {
            let scales = &mut scales[..out.len().div_ceil(size)];
            self.w.scales(first / size, scales);
            for (products, &scale) in wide.as_chunks_mut::<16>().0.iter_mut().zip(&*scales) {
                for i in (0..16).step_by(S::LANES) {
                    // SAFETY: the instructions are those of `S`, whose lanes divide sixteen.
                    unsafe {
                        let values = S::load(CODEBOOK.as_ptr().add(i));
                        let scaled = S::mul(values, S::splat(scale));
                        S::store(products.as_mut_ptr().add(i), scaled);
                    }
                }
            }
            let n = 16 * scales.len();
            T::round(&wide[..n], &mut tables[..n]);
            let tables = tables.as_chunks::<16>().0;
            for (out, table) in out.chunks_mut(size).zip(tables) {
                // SAFETY: the instructions are those of `S`.
                unsafe { self.w.decode_half::<S, T>(table, first, out) };
                first += out.len();
            }
        }
    }
}
