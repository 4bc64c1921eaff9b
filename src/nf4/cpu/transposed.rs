//! The transposed product, `x = y · W`: `y [rows, d_out]`, `W [d_out, d_in]`, `x [rows, d_in]`.
//!
//! The backward of a linear layer. Strips of `W`'s columns are dequantised to a scratch that stays in cache, some
//! hundred rows of `W` at a time; vectors run along them, values of `y` are broadcast. Strips share no output, so
//! threads need no reduction.

use super::packed::Packed;
use super::parallel::{Shared, for_each, threads};
use super::scratch::with_scratch;
use super::simd::{Isa, Kernel, Simd, Tile, dispatch};

/// Columns of `W` in a strip, at most, and what strips are a multiple of.
const STRIP: usize = 128;
const STEP: usize = 64;
/// Rows of `W` that are dequantised at a time, at most.
const DEPTH: usize = 512;
/// As in the product with many rows: no distance of a power of two.
const PAD: usize = 16;
/// Rows of a result that is written by way of a scratch, at most: the most columns of any tile.
const EDGE: usize = 24;

/// `x = y · W`, row-major, every element of `x` written.
pub(super) fn product(isa: Isa, w: &Packed, y: &[f32], x: &mut [f32]) {
    let [d_out, d_in] = w.shape;
    let rows = x.len() / d_in;
    assert_eq!((y.len(), x.len()), (rows * d_out, rows * d_in));
    let strip = d_in
        .div_ceil(4 * threads())
        .next_multiple_of(STEP)
        .min(STRIP);
    let panels = d_out.div_ceil(DEPTH).max(1);
    let depth = d_out.div_ceil(panels);
    let x = Shared(x.as_mut_ptr());
    for_each(d_in.div_ceil(strip), rows * w.len(), |index| {
        let first = index * strip;
        let last = (first + strip).min(d_in);
        with_scratch(depth * (strip + PAD) + EDGE * (depth + STEP), |scratch| {
            let task = Strip {
                w,
                y,
                x,
                rows,
                depth,
                first,
                last,
                scratch,
            };
            dispatch(isa, task)
        });
    });
}

/// Columns `first..last` of `W`, which are columns of `x`.
struct Strip<'a> {
    w: &'a Packed<'a>,
    y: &'a [f32],
    x: Shared,
    rows: usize,
    depth: usize,
    first: usize,
    last: usize,
    scratch: &'a mut [f32],
}

impl Kernel for Strip<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let [d_out, d_in] = self.w.shape;
        let full = S::LANES * S::TILE_VECTORS;
        let stride = (self.last - self.first).next_multiple_of(S::LANES) + PAD;
        let columns = S::tile_columns(S::TILE_VECTORS);
        let (dense, edges) = self.scratch.split_at_mut(self.depth * stride);
        let (y_edge, x_edge) = edges.split_at_mut(EDGE * self.depth);
        for o in (0..d_out).step_by(self.depth) {
            let depth = self.depth.min(d_out - o);
            for (row, dense) in (o..o + depth).zip(dense.chunks_mut(stride)) {
                let at = row * d_in;
                // SAFETY: the instructions are those of `S`.
                unsafe { self.w.decode::<S>(at + self.first..at + self.last, dense) };
            }
            for column in (self.first..self.last).step_by(full) {
                let width = full.min(self.last - column);
                let vectors = width.div_ceil(S::LANES);
                let whole = width == full;
                let columns = if whole {
                    columns
                } else {
                    S::tile_columns(vectors)
                };
                for row in (0..self.rows).step_by(columns) {
                    let n = columns.min(self.rows - row);
                    let mut tile = Tile {
                        vectors,
                        columns,
                        depth,
                        a: dense[column - self.first..].as_ptr(),
                        a_stride: stride,
                        b: self.y[row * d_out + o..].as_ptr(),
                        b_stride: d_out,
                        c: x_edge.as_mut_ptr(),
                        c_stride: full,
                        accumulate: o > 0,
                    };
                    // SAFETY: these columns of `x` are this task's own; at the edges, where a tile would reach
                    // beyond them, it works on scratches of its size.
                    unsafe {
                        let x = self.x.at(row * d_in + column);
                        if whole {
                            (tile.c, tile.c_stride, tile.columns) = (x, d_in, n);
                            S::tile(tile);
                            continue;
                        }
                        if n < columns {
                            for (r, y_edge) in y_edge.chunks_mut(self.depth).take(n).enumerate() {
                                let y = &self.y[(row + r) * d_out + o..][..depth];
                                y_edge[..depth].copy_from_slice(y);
                            }
                            (tile.b, tile.b_stride) = (y_edge.as_ptr(), self.depth);
                        }
                        tile.accumulate = false;
                        S::tile(tile);
                        for (r, sums) in x_edge.chunks(full).take(n).enumerate() {
                            for (l, &sum) in sums[..width].iter().enumerate() {
                                let x = x.add(r * d_in + l);
                                *x = if o > 0 { *x + sum } else { sum };
                            }
                        }
                    }
                }
            }
        }
    }
}
