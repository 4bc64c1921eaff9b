//! Quantising a weight that lies transposed, `[d_in, d_out]`, as `burn::nn::Linear` holds it.
//!
//! `W[o, i] = values[i · stride + o]`. A vector holds one `i` of as many rows `o` of `W` as it has lanes, so that each
//! lane quantises a block of its own, and what has to be transposed in the end is not the values but words of eight
//! codes. Where blocks reach over the ends of rows, runs of whole blocks are gathered first.

use std::ops::Range;

use rayon::prelude::*;

use super::quantize::{TASK, Widened, run};
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch};
use crate::nf4::blocks::{BlockSize, SMALLEST_SCALE};

/// Rows of `W` that a task quantises, all along.
const ROWS: usize = 128;
/// Values of a tile, where they are collected in f32 to stay in cache, if the blocks are not too long.
const TILE: usize = 1 << 14;
/// How many elements along a row values are asked for ahead of their use.
const AHEAD: usize = 16;
/// At least as many rows in a tile: a multiple of any vector.
const LEAST_ROWS: usize = 16;

/// A transposed weight: row `o` of `W` is `values[o + i · stride]` for `i` below `d_in`.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a, T> {
    values: &'a [T],
    stride: usize,
    /// `[d_out, d_in]`.
    shape: [usize; 2],
}

impl<'a, T: Widened> Columns<'a, T> {
    /// # Panics
    ///
    /// If there are fewer values than the shape demands.
    pub(crate) fn new(values: &'a [T], stride: usize, shape: [usize; 2]) -> Self {
        let [d_out, d_in] = shape;
        assert!(d_out <= stride || d_in <= 1, "columns beside each other");
        assert!(d_in == 0 || (d_in - 1) * stride + d_out <= values.len());
        Self {
            values,
            stride,
            shape,
        }
    }

    /// Element `i` of `rows` rows of `W` from `first`.
    #[inline(always)]
    fn across(&self, i: usize, first: usize, rows: usize) -> &'a [T] {
        &self.values[i * self.stride + first..][..rows]
    }

    /// Asks for the values some elements further along these rows: the processor foresees no strides of whole pages.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn prefetch<S: Simd>(&self, values: &[T]) {
        let ahead = values.as_ptr().wrapping_add(AHEAD * self.stride);
        for line in (0..size_of_val(values)).step_by(64) {
            // SAFETY: as asked; an address may be any.
            unsafe { S::prefetch(ahead.cast::<u8>().wrapping_add(line)) };
        }
    }

    /// Value `index` of the row-major `W`.
    pub(crate) fn at(&self, index: usize) -> f32 {
        let d_in = self.shape[1];
        self.values[index % d_in * self.stride + index / d_in].into()
    }

    /// Quantises into memory of the right lengths, on all threads; the error is the row-major index in `W` of the first
    /// value that is not finite.
    pub(crate) fn quantize(
        &self,
        isa: Isa,
        block_size: BlockSize,
        codes: &mut [u8],
        absmax: &mut [f32],
    ) -> Result<(), usize> {
        let [d_out, d_in] = self.shape;
        let n = d_out * d_in;
        assert_eq!(codes.len(), n.div_ceil(2), "bytes of codes");
        assert_eq!(absmax.len(), block_size.blocks(n), "scales");
        if n == 0 {
            return Ok(());
        }
        // A task of whole rows, or of whole blocks.
        let aligned = d_in.is_multiple_of(block_size.get());
        let task = if aligned { ROWS * d_in } else { TASK };
        let tasks = codes
            .par_chunks_mut(task / 2)
            .zip(absmax.par_chunks_mut(task / block_size.get()));
        let failed = tasks
            .enumerate()
            .find_map_first(|(index, (codes, absmax))| {
                let first = index * task;
                let result = if aligned {
                    self.quantize_rows(isa, first / d_in, block_size, codes, absmax)
                } else {
                    let n = task.min(n - first);
                    self.quantize_run(isa, first..first + n, block_size, codes, absmax)
                };
                result.err().map(|index| first + index)
            });
        failed.map_or(Ok(()), Err)
    }

    /// Whole rows, from `first`, of whole blocks each.
    fn quantize_rows(
        &self,
        isa: Isa,
        first: usize,
        block_size: BlockSize,
        codes: &mut [u8],
        absmax: &mut [f32],
    ) -> Result<(), usize> {
        let (d_in, size) = (self.shape[1], block_size.get());
        let rows = ROWS.min(self.shape[0] - first);
        let width = (TILE / size).clamp(LEAST_ROWS, ROWS);
        with_scratch(size * width, |tile| {
            for from in (0..rows).step_by(width) {
                let rows = width.min(rows - from);
                // What lies beside the last row is quantised and not kept.
                tile.fill(0.0);
                for block in 0..d_in / size {
                    let finite = dispatch(
                        isa,
                        Tile {
                            from: self,
                            element: block * size,
                            row: first + from,
                            rows,
                            tile,
                            width,
                            codes: &mut codes[(from * d_in + block * size) / 2..],
                            codes_stride: d_in / 2,
                            absmax: &mut absmax[from * d_in / size + block..],
                            absmax_stride: d_in / size,
                        },
                    );
                    if !finite {
                        return Err(());
                    }
                }
            }
            Ok(())
        })
        // Tiles are not in the order of `W`.
        .map_err(|()| {
            let first = first * d_in;
            let mut indices = 0..rows * d_in;
            indices
                .find(|index| !self.at(first + index).is_finite())
                .unwrap_or(0)
        })
    }

    /// Any run of whole blocks.
    fn quantize_run(
        &self,
        isa: Isa,
        range: Range<usize>,
        block_size: BlockSize,
        codes: &mut [u8],
        absmax: &mut [f32],
    ) -> Result<(), usize> {
        with_scratch(range.len(), |values| {
            let start = range.start;
            dispatch(
                isa,
                Gather {
                    from: self,
                    start,
                    values,
                },
            );
            run(isa, &*values, block_size, codes, absmax)
        })
    }
}

/// Collects as many values of the row-major `W` from `start` as there is room for.
struct Gather<'a, T> {
    from: &'a Columns<'a, T>,
    start: usize,
    values: &'a mut [f32],
}

impl<T: Widened> Kernel for Gather<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let d_in = self.from.shape[1];
        let (first, end) = (
            self.start / d_in,
            (self.start + self.values.len()).div_ceil(d_in),
        );
        // Across rows, so that every cache line of the weight is used as a whole.
        for i in 0..d_in {
            let across = self.from.across(i, first, end - first);
            // SAFETY: the instructions are those of `S`.
            unsafe { self.from.prefetch::<S>(across) };
            // Wraps where the first row begins before the run.
            let mut at = (first * d_in + i).wrapping_sub(self.start);
            for &value in across {
                if let Some(to) = self.values.get_mut(at) {
                    *to = value.into();
                }
                at = at.wrapping_add(d_in);
            }
        }
    }
}

/// Quantises one block each of `rows` rows of `W`; whether all are finite.
struct Tile<'a, T> {
    from: &'a Columns<'a, T>,
    /// The block's first element, and the first row.
    element: usize,
    row: usize,
    rows: usize,
    /// Memory of `[block size, width]`.
    tile: &'a mut [f32],
    /// A multiple of the lanes.
    width: usize,
    /// The codes of the first row's block, and the bytes to the next row's.
    codes: &'a mut [u8],
    codes_stride: usize,
    /// The same for the scales.
    absmax: &'a mut [f32],
    absmax_stride: usize,
}

impl<T: Widened> Kernel for Tile<'_, T> {
    type Output = bool;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> bool {
        let size = self.tile.len() / self.width;
        for (i, tile) in self.tile.chunks_exact_mut(self.width).enumerate() {
            let values = self.from.across(self.element + i, self.row, self.rows);
            // SAFETY: the instructions are those of `S`.
            unsafe { self.from.prefetch::<S>(values) };
            T::copy(values, &mut tile[..self.rows]);
        }
        for first in (0..self.rows).step_by(S::LANES) {
            let lanes = S::LANES.min(self.rows - first);
            let mut bits = [0; 16];
            // SAFETY: the instructions are those of `S`. `first + LANES` is at most `width`, which is a multiple of the
            // lanes as `first` is, so the vectors lie within the tile; none has more than sixteen lanes.
            let values = unsafe {
                let values = self.tile.as_ptr().add(first);
                let mut largest = S::splat_word(0);
                for i in 0..size {
                    largest = S::max_magnitude(largest, S::load(values.add(i * self.width)));
                }
                S::store_words(bits.as_mut_ptr(), largest);
                values
            };
            let mut reciprocals = [0.0; 16];
            let mut finite = true;
            for (reciprocal, bits) in reciprocals.iter_mut().zip(bits) {
                let largest = f32::from_bits(bits);
                finite &= largest.is_finite();
                *reciprocal = 1.0 / largest.max(SMALLEST_SCALE);
            }
            if !finite {
                return false;
            }
            for (lane, bits) in bits[..lanes].iter().enumerate() {
                self.absmax[(first + lane) * self.absmax_stride] = f32::from_bits(*bits);
            }
            for i in (0..size).step_by(32) {
                let mut words = [[0; 16]; 4];
                // SAFETY: as above; a block is a multiple of 32 values.
                unsafe {
                    let factor = S::load(reciprocals.as_ptr());
                    for (j, words) in words.iter_mut().enumerate() {
                        let at = values.add((i + 8 * j) * self.width);
                        let codes = eight_codes::<S>(at, self.width, factor);
                        S::store_words(words.as_mut_ptr(), codes);
                    }
                }
                for lane in 0..lanes {
                    let at = (first + lane) * self.codes_stride + i / 2;
                    let codes = self.codes[at..at + 16].as_chunks_mut().0;
                    for (codes, words) in codes.iter_mut().zip(&words) {
                        *codes = words[lane].to_le_bytes();
                    }
                }
            }
        }
        true
    }
}

/// The codes of `LANES` values at each of `from`, `from + stride` … `from + 7 · stride`, as the packed bytes of each
/// lane, which are a little-endian word.
///
/// # Safety
///
/// As [`Simd`].
#[inline(always)]
unsafe fn eight_codes<S: Simd>(from: *const f32, stride: usize, factor: S::F32) -> S::Words {
    // SAFETY: what `Simd` asks for.
    unsafe {
        let words = S::splat_word(0);
        let words = S::insert::<4>(words, scaled_code::<S>(from, factor));
        let words = S::insert::<0>(words, scaled_code::<S>(from.add(stride), factor));
        let words = S::insert::<12>(words, scaled_code::<S>(from.add(2 * stride), factor));
        let words = S::insert::<8>(words, scaled_code::<S>(from.add(3 * stride), factor));
        let words = S::insert::<20>(words, scaled_code::<S>(from.add(4 * stride), factor));
        let words = S::insert::<16>(words, scaled_code::<S>(from.add(5 * stride), factor));
        let words = S::insert::<28>(words, scaled_code::<S>(from.add(6 * stride), factor));
        S::insert::<24>(words, scaled_code::<S>(from.add(7 * stride), factor))
    }
}

/// # Safety
///
/// As [`Simd`].
#[inline(always)]
unsafe fn scaled_code<S: Simd>(from: *const f32, factor: S::F32) -> S::Words {
    // SAFETY: what `Simd` asks for.
    unsafe { S::nearest(S::mul(S::load(from), factor)) }
}
