//! Products with the factors of a low-rank change: one of three dimensions is its rank, 16 or so.
//!
//! Activations are read as they are stored, once, and widened on the way; factors and results are f32.

use std::mem::MaybeUninit;

use super::factor::Factor;
use super::small::{Matrix, product};
use crate::cpu::parallel::{Shared, Strips, for_each, for_each_chunk};
use crate::cpu::scratch::{with_operand, with_scratch};
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch};
use crate::cpu::value::Value;

/// Rows of a task, and of what a tile may read: a multiple of every [`Simd::tile_columns`].
const ROWS: usize = 24;
/// Values of a row that are widened at a time.
const DEPTH: usize = 1024;
/// What widths of vectors are filled up to.
const VECTORS: usize = 16;
/// Columns of a strip.
const STRIP: usize = 64;
/// Rows of a strip that are widened at a time.
const PANEL: usize = 128;
/// Values between the ends of rows in a scratch, so that their distance is no power of two, which caches dislike.
const PAD: usize = 16;

/// `scale · x · a`: `x [rows, d]`, `a [d, r]`, the result `[rows, r]`, all of it written.
pub(crate) fn to_rank<V: Value>(
    isa: Isa,
    x: &[V],
    a: Factor,
    scale: f32,
    out: &mut [MaybeUninit<f32>],
) {
    let [d, rank] = a.shape();
    assert!(d > 0 && rank > 0, "a factor with values");
    let rows = out.len() / rank;
    assert_eq!((x.len(), out.len()), (rows * d, rows * rank));
    let width = rank.next_multiple_of(VECTORS);
    let out = Shared(out.as_mut_ptr().cast::<f32>());
    // Nothing has to be filled up.
    let as_it_lies = a.as_rows().filter(|_| width == rank);
    with_operand(if as_it_lies.is_some() { 0 } else { d * width }, |packed| {
        for (i, packed) in packed.chunks_exact_mut(width).enumerate() {
            for (j, packed) in packed[..rank].iter_mut().enumerate() {
                *packed = a.at(i, j);
            }
            packed[rank..].fill(0.0);
        }
        let packed = as_it_lies.unwrap_or(packed);
        for_each(rows.div_ceil(ROWS), rows * d * rank, |index| {
            let first = index * ROWS;
            let last = (first + ROWS).min(rows);
            let x = &x[first * d..last * d];
            let size = ROWS * (width + d.min(DEPTH) + PAD);
            with_scratch(size, |scratch| {
                let task = ToRank {
                    x,
                    d,
                    packed,
                    rank,
                    width,
                    scale,
                    scratch,
                    // SAFETY: these rows of `out` are this task's own.
                    out: unsafe { out.at(first * rank) },
                };
                dispatch(isa, task);
            });
        });
    });
}

struct ToRank<'a, V> {
    /// At most [`ROWS`] rows.
    x: &'a [V],
    d: usize,
    /// `a`, of `width` columns.
    packed: &'a [f32],
    rank: usize,
    width: usize,
    scale: f32,
    scratch: &'a mut [f32],
    out: *mut f32,
}

impl<V: Value> Kernel for ToRank<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, d, width, .. } = self;
        let rows = x.len() / d;
        let (sums, wide) = self.scratch.split_at_mut(ROWS * width);
        let stride = d.min(DEPTH) + PAD;
        for k in (0..d).step_by(DEPTH) {
            let depth = DEPTH.min(d - k);
            for (x, wide) in x.chunks_exact(d).zip(wide.chunks_exact_mut(stride)) {
                widen(&x[k..k + depth], wide);
            }
            let a = Matrix {
                values: &self.packed[k * width..],
                stride: width,
            };
            let b = Matrix {
                values: wide,
                stride,
            };
            // SAFETY: the instructions are those of `S`.
            unsafe { product::<S>(a, b, [rows, depth, width], sums, width, k > 0) };
        }
        for (row, sums) in sums.chunks_exact(width).take(rows).enumerate() {
            for (j, &sum) in sums[..self.rank].iter().enumerate() {
                // SAFETY: within this task's rows.
                unsafe { *self.out.add(row * self.rank + j) = self.scale * sum };
            }
        }
    }
}

#[inline(always)]
fn widen<V: Value>(from: &[V], to: &mut [f32]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = from.into();
    }
}

/// `uᵀ · y`: `u [rows, r]`, `y [rows, d]`, the result `[r, d]`, or `[d, r]` if `turned`, all of it written.
pub(crate) fn over_rows<V: Value>(
    isa: Isa,
    u: &[f32],
    y: &[V],
    rank: usize,
    turned: bool,
    out: &mut [MaybeUninit<f32>],
) {
    assert!(rank > 0 && !u.is_empty() && !out.is_empty(), "values");
    let (rows, d) = (u.len() / rank, out.len() / rank);
    assert_eq!(
        (u.len(), y.len(), out.len()),
        (rows * rank, rows * d, rank * d)
    );
    let out = Shared(out.as_mut_ptr().cast::<f32>());
    let strips = Strips::new(d, VECTORS, STRIP);
    let stride = rows + PAD;
    let filled = rank.next_multiple_of(ROWS);
    with_operand(filled * stride, |by_rank| {
        for (j, by_rank) in by_rank.chunks_exact_mut(stride).take(rank).enumerate() {
            for (row, by_rank) in by_rank[..rows].iter_mut().enumerate() {
                *by_rank = u[row * rank + j];
            }
        }
        let by_rank = &*by_rank;
        for_each(strips.count(), rows * d * rank, |index| {
            let columns = strips.columns(index);
            with_scratch((PANEL + filled) * STRIP, |scratch| {
                let task = OverRows {
                    by_rank: Matrix {
                        values: by_rank,
                        stride,
                    },
                    rank,
                    y,
                    d,
                    first: columns.start,
                    last: columns.end,
                    turned,
                    scratch,
                    out,
                };
                dispatch(isa, task);
            });
        });
    });
}

struct OverRows<'a, V> {
    /// `uᵀ`, what it is filled up with being anything.
    by_rank: Matrix<'a>,
    rank: usize,
    y: &'a [V],
    d: usize,
    first: usize,
    last: usize,
    turned: bool,
    scratch: &'a mut [f32],
    out: Shared<f32>,
}

impl<V: Value> Kernel for OverRows<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self {
            rank,
            d,
            first,
            last,
            ..
        } = self;
        let width = (last - first).next_multiple_of(VECTORS);
        let (wide, sums) = self.scratch.split_at_mut(PANEL * STRIP);
        let rows = self.y.len() / d;
        for begin in (0..rows).step_by(PANEL) {
            let depth = PANEL.min(rows - begin);
            for (row, wide) in (begin..begin + depth).zip(wide.chunks_exact_mut(width)) {
                let y = &self.y[row * d..][first..last];
                widen(y, wide);
                wide[y.len()..].fill(0.0);
            }
            let a = Matrix {
                values: wide,
                stride: width,
            };
            let b = Matrix {
                values: &self.by_rank.values[begin..],
                stride: self.by_rank.stride,
            };
            // SAFETY: the instructions are those of `S`.
            unsafe { product::<S>(a, b, [rank, depth, width], sums, width, begin > 0) };
        }
        for (j, sums) in sums.chunks_exact(width).take(rank).enumerate() {
            for (column, &sum) in (first..last).zip(sums) {
                let at = match self.turned {
                    false => j * d + column,
                    true => column * rank + j,
                };
                // SAFETY: these columns of the result are this task's own.
                unsafe { *self.out.at(at) = sum };
            }
        }
    }
}

/// `y += u · v`: `u [rows, r]`, `v [r, d]`, `y [rows, d]`, rounded once.
pub(crate) fn add<V: Value>(isa: Isa, u: &[f32], v: &[f32], rank: usize, y: &mut [V]) {
    assert!(rank > 0 && !v.is_empty(), "a term with values");
    let d = v.len() / rank;
    assert_eq!((v.len(), y.len()), (rank * d, u.len() / rank * d));
    let width = d.next_multiple_of(VECTORS);
    let work = u.len() * d;
    with_operand(rank * width, |packed| {
        for (packed, v) in packed.chunks_exact_mut(width).zip(v.chunks_exact(d)) {
            packed[..d].copy_from_slice(v);
            packed[d..].fill(0.0);
        }
        let packed = &*packed;
        for_each_chunk(y, ROWS * d, work, |index, y| {
            let rows = y.len() / d;
            let u = &u[index * ROWS * rank..][..rows * rank];
            with_scratch(ROWS * (rank + STRIP), |scratch| {
                let task = Add {
                    u,
                    rank,
                    packed,
                    width,
                    y,
                    d,
                    scratch,
                };
                dispatch(isa, task);
            });
        });
    });
}

struct Add<'a, V> {
    /// At most [`ROWS`] rows.
    u: &'a [f32],
    rank: usize,
    /// `v`, of `width` columns.
    packed: &'a [f32],
    width: usize,
    y: &'a mut [V],
    d: usize,
    scratch: &'a mut [f32],
}

impl<V: Value> Kernel for Add<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { rank, width, d, .. } = self;
        let (rows, sums) = self.scratch.split_at_mut(ROWS * rank);
        rows[..self.u.len()].copy_from_slice(self.u);
        let b = Matrix {
            values: rows,
            stride: rank,
        };
        for first in (0..width).step_by(STRIP) {
            let strip = STRIP.min(width - first);
            let a = Matrix {
                values: &self.packed[first..],
                stride: width,
            };
            let count = self.u.len() / rank;
            // SAFETY: the instructions are those of `S`.
            unsafe { product::<S>(a, b, [count, rank, strip], sums, STRIP, false) };
            for (y, sums) in self.y.chunks_exact_mut(d).zip(sums.chunks_exact(STRIP)) {
                for (y, &sum) in y[first..].iter_mut().zip(&sums[..strip]) {
                    *y = V::round((*y).into() + sum);
                }
            }
        }
    }
}
