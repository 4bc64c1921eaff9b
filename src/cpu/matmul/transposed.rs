//! The transposed product, `x = y · W`: `y [rows, d_out]`, `W [d_out, d_in]`, `x [rows, d_in]`.
//!
//! The backward of a linear layer. Strips of `W`'s columns are dequantised to a scratch that stays in cache, some
//! hundred rows of `W` at a time; vectors run along them, values of `y` are broadcast. Strips share no output, so
//! threads need no reduction. A low-rank term is one panel more.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::Source;
use super::element::{Element, F32};
use super::low_rank::LowRank;
use super::target::{Place, Target};
use crate::cpu::parallel::{Strips, for_each};
use crate::cpu::scratch::{with_operand, with_scratch};
use crate::cpu::simd::{Isa, Kernel, Simd, Tile, dispatch};
use crate::cpu::value::Value;

/// Columns of `W` in a strip, at most, and what strips are a multiple of.
const STRIP: usize = 128;
const STEP: usize = 64;
/// Rows of `W` that are dequantised at a time, at most, in words.
const DEPTH: usize = 512;
/// Rows of `y` at a time, at most; a longer `y` costs another dequantisation for each.
const ROWS: usize = 512;
/// As in the product with many rows: no distance of a power of two.
const PAD: usize = 16;
/// Rows of `y` that any tile may read: a multiple of every [`Simd::tile_columns`].
const TILE_ROWS: usize = 24;

/// `x = y · W + u · v`, row-major, every element of `x` written. `d_out` is whole words.
pub(crate) fn product<E: Element, W: Source<E>>(
    isa: Isa,
    w: W,
    y: &[E::Value],
    low: LowRank,
    x: &mut [MaybeUninit<E::Value>],
) {
    let [_, d_in] = w.shape();
    product_to(isa, w, y, low, Target::new(x, d_in));
}

/// The same to any rows of `d_in` columns, in a dtype of their own.
pub(crate) fn product_to<E: Element, W: Source<E>, O: Value>(
    isa: Isa,
    w: W,
    y: &[E::Value],
    low: LowRank,
    x: Target<O>,
) {
    let [d_out, d_in] = w.shape();
    let rows = x.rows;
    assert_eq!((y.len(), x.columns), (rows * d_out, d_in));
    low.check(rows, d_in);
    assert!(d_out.is_multiple_of(E::PER_WORD));
    let block = rows.div_ceil(rows.div_ceil(ROWS));
    for (index, y) in y.chunks(block * d_out).enumerate() {
        let (first, rows) = (index * block, y.len() / d_out);
        let low = low.rows(first, rows);
        // SAFETY: there are as many rows as of `y`.
        let x = unsafe { x.place.from_row(first) };
        if rows >= TILE_ROWS {
            strips::<E, W, O>(isa, w, y, low, rows, x);
            continue;
        }
        // Filled up, so that every tile may read all of its rows.
        let words = d_out / E::PER_WORD;
        with_operand(TILE_ROWS * (words + low.rank), |filled| {
            let (filled, u) = filled.split_at_mut(TILE_ROWS * words);
            let filled: &mut [E::Value] = bytemuck::cast_slice_mut(filled);
            fill(filled, y, E::round(0.0));
            fill(u, low.u, 0.0);
            strips::<E, W, O>(isa, w, filled, LowRank { u, ..low }, rows, x);
        });
    }
}

fn fill<T: Copy>(to: &mut [T], from: &[T], zero: T) {
    to[..from.len()].copy_from_slice(from);
    to[from.len()..].fill(zero);
}

fn strips<E: Element, W: Source<E>, O: Value>(
    isa: Isa,
    w: W,
    y: &[E::Value],
    low: LowRank,
    rows: usize,
    x: Place<O>,
) {
    let [d_out, d_in] = w.shape();
    let words = d_out / E::PER_WORD;
    let strips = Strips::new(d_in, STEP, STRIP);
    let depth = words.div_ceil(words.div_ceil(DEPTH));
    for_each(strips.count(), rows * d_out * d_in, |index| {
        let Range {
            start: first,
            end: last,
        } = strips.columns(index);
        let stride = strips.width() + PAD;
        with_scratch((depth + rows + TILE_ROWS) * stride, |scratch| {
            let task = Strip::<E, W, O> {
                element: PhantomData,
                w,
                y,
                low,
                x,
                rows,
                depth,
                first,
                last,
                stride,
                scratch,
            };
            dispatch(isa, task)
        });
    });
}

/// Columns `first..last` of `W`, which are columns of `x`.
struct Strip<'a, E: Element, W, O> {
    element: PhantomData<E>,
    w: W,
    /// At least [`TILE_ROWS`] rows.
    y: &'a [E::Value],
    /// `u` of at least so many rows too.
    low: LowRank<'a>,
    x: Place<O>,
    rows: usize,
    depth: usize,
    first: usize,
    last: usize,
    stride: usize,
    /// `W` and `x`, dense, of `stride` words a row.
    scratch: &'a mut [f32],
}

impl<E: Element, W: Source<E>, O: Value> Kernel for Strip<'_, E, W, O> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self {
            w,
            rows,
            first,
            last,
            stride,
            ..
        } = self;
        let [d_out, d_in] = w.shape();
        let words = d_out / E::PER_WORD;
        let y: *const f32 = self.y.as_ptr().cast();
        let full = S::LANES * S::TILE_VECTORS;
        let (dense, sums) = self.scratch.split_at_mut(self.depth * stride);
        for o in (0..words).step_by(self.depth) {
            let depth = self.depth.min(words - o);
            for (word, dense) in (o..o + depth).zip(dense.chunks_mut(stride)) {
                let at = word * E::PER_WORD * d_in;
                // SAFETY: the instructions are those of `S`.
                unsafe { w.runs::<S>(at + first..at + last, dense) };
            }
            let panel = Panel {
                rows,
                y: y.wrapping_add(o),
                y_stride: words,
                depth,
                dense,
                stride,
                columns: last - first,
            };
            // SAFETY: the instructions are those of `S`, and `y` has `depth` words from `o` on in each row.
            unsafe { panel.add::<S, E>(sums, o > 0) };
        }
        let LowRank { rank, u, v } = self.low;
        for k in (0..rank).step_by(self.depth) {
            let depth = self.depth.min(rank - k);
            for (p, dense) in (k..k + depth).zip(dense.chunks_mut(stride)) {
                dense[..last - first].copy_from_slice(&v[p * d_in + first..p * d_in + last]);
            }
            let panel = Panel {
                rows,
                y: u[k..].as_ptr(),
                y_stride: rank,
                depth,
                dense,
                stride,
                columns: last - first,
            };
            // SAFETY: as above.
            unsafe { panel.add::<S, F32>(sums, true) };
        }
        for column in (first..last).step_by(full) {
            let width = full.min(last - column);
            let columns = S::tile_columns(width.div_ceil(S::LANES));
            for row in (0..rows).step_by(columns) {
                let begin = begin(row, columns, rows);
                // Those before are the tile's before, which may be added to what is there: once.
                for r in row - begin..columns.min(rows - begin) {
                    let sums = &sums[(row + r) * stride + column - first..][..width];
                    for (l, &sum) in sums.iter().enumerate() {
                        // SAFETY: these columns of `x` are this task's own.
                        unsafe { self.x.put(begin + r, column + l, sum) };
                    }
                }
            }
        }
    }
}

/// A few hundred of the inner dimension: of rows as they are, and of dense columns.
struct Panel<'a> {
    rows: usize,
    y: *const f32,
    y_stride: usize,
    depth: usize,
    dense: &'a [f32],
    stride: usize,
    columns: usize,
}

impl Panel<'_> {
    /// Adds its products to `sums`, or puts them there.
    ///
    /// # Safety
    ///
    /// As [`Simd`]; `y` has at least [`TILE_ROWS`] rows of `depth` words.
    #[inline(always)]
    unsafe fn add<S: Simd, E: Element>(self, sums: &mut [f32], accumulate: bool) {
        let full = S::LANES * S::TILE_VECTORS;
        for column in (0..self.columns).step_by(full) {
            let vectors = full.min(self.columns - column).div_ceil(S::LANES);
            let columns = S::tile_columns(vectors);
            for row in (0..self.rows).step_by(columns) {
                let tile = Tile {
                    vectors,
                    depth: self.depth,
                    a: self.dense[column..].as_ptr(),
                    a_stride: self.stride,
                    // SAFETY: `begin` leaves so many rows of `y` as the tile has columns.
                    b: unsafe { self.y.add(begin(row, columns, self.rows) * self.y_stride) },
                    b_stride: self.y_stride,
                    c: sums[row * self.stride + column..].as_mut_ptr(),
                    c_stride: self.stride,
                    accumulate,
                };
                // SAFETY: `depth` rows of `dense`, and `columns` rows of `sums`, which has more than `rows` by the
                // most columns of a tile.
                unsafe { E::tile::<S>(tile) };
            }
        }
    }
}

/// The first row of `y` that the tile of `row` reads: the last tile moves up where it would reach beyond the end, over
/// rows that the one before it has too. Fewer rows than [`TILE_ROWS`] are filled up instead.
#[inline(always)]
fn begin(row: usize, columns: usize, rows: usize) -> usize {
    match rows < TILE_ROWS {
        true => row,
        false => row.min(rows - columns),
    }
}
