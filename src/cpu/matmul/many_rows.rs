//! The product with many rows, `y = x · Wᵀ`: `x [rows, d_in]`, `W [d_out, d_in]`, `y [rows, d_out]`.
//!
//! `yᵀ` is computed strip by strip of `W`'s rows. `x` is packed once, transposed, so that vectors run over its rows; a
//! strip of `W` is dequantised to a scratch that stays in cache, a few hundred columns at a time, and its values are
//! broadcast. One dequantised value thus serves all rows, and no dense weight is ever in memory. A low-rank term is one
//! panel more.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::Source;
use super::element::{Element, F32};
use super::low_rank::LowRank;
use super::target::{Place, Target};
use crate::cpu::parallel::{Shared, Strips, for_each};
use crate::cpu::scratch::{with_operand, with_scratch};
use crate::cpu::simd::{Isa, Kernel, Simd, Tile, dispatch};
use crate::cpu::value::Value;

/// Rows of `W` in a strip, at most: a multiple of every [`Simd::tile_columns`]. With [`DEPTH`], a scratch of 192 KiB.
const STRIP: usize = 96;
/// What strips are a multiple of.
const STEP: usize = 24;
/// Words of `W`'s rows that are dequantised at a time, at most.
const DEPTH: usize = 512;
/// Words between the ends of rows in a scratch, so that their distance is no power of two, which caches dislike.
const PAD: usize = 16;
/// Rows of `x` at a time, at most; a longer `x` costs another dequantisation for each.
const ROWS: usize = 512;
/// Words of packed `x`, at most: 8 MiB.
const PACKED: usize = 1 << 21;

/// `y = x · Wᵀ + u · v`, row-major, every element of `y` written. `d_in` is whole words.
pub(crate) fn product<E: Element, W: Source<E>>(
    isa: Isa,
    w: W,
    x: &[E::Value],
    low: LowRank,
    y: &mut [MaybeUninit<E::Value>],
) {
    let [d_out, _] = w.shape();
    product_to(isa, w, x, low, Target::new(y, d_out));
}

/// The same to any rows of `d_out` columns, in a dtype of their own.
pub(crate) fn product_to<E: Element, W: Source<E>, O: Value>(
    isa: Isa,
    w: W,
    x: &[E::Value],
    low: LowRank,
    y: Target<O>,
) {
    let [d_out, d_in] = w.shape();
    let rows = y.rows;
    assert_eq!((x.len(), y.columns), (rows * d_in, d_out));
    low.check(rows, d_out);
    assert!(d_in.is_multiple_of(E::PER_WORD));
    let most = (PACKED / (d_in / E::PER_WORD))
        .next_multiple_of(64)
        .clamp(64, ROWS);
    // Blocks of rows of like size, so that the last is not a sliver.
    let block = rows.div_ceil(rows.div_ceil(most)).next_multiple_of(64);
    for (index, x) in x.chunks(block * d_in).enumerate() {
        let (first, rows) = (index * block, x.len() / d_in);
        let low = low.rows(first, rows);
        // SAFETY: there are as many rows as of `x`.
        let y = unsafe { y.place.from_row(first) };
        let task = Block::<E, W, O> {
            isa,
            w,
            x,
            low,
            rows,
            y,
        };
        dispatch(isa, task);
    }
}

struct Block<'a, E: Element, W, O> {
    isa: Isa,
    w: W,
    x: &'a [E::Value],
    low: LowRank<'a>,
    rows: usize,
    y: Place<O>,
}

impl<E: Element, W: Source<E>, O: Value> Kernel for Block<'_, E, W, O> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let [d_out, d_in] = self.w.shape();
        let words = d_in / E::PER_WORD;
        let rows = self.rows;
        let groups = Groups {
            full: S::LANES * S::TILE_VECTORS,
            lanes: S::LANES,
            rows,
        };
        let depth = words.div_ceil(words.div_ceil(DEPTH)).next_multiple_of(32);
        let strips = Strips::new(d_out, STEP, STRIP);
        let (y, low) = (self.y, self.low);
        with_operand(groups.width() * (words + low.rank), |packed| {
            let (packed, packed_u) = packed.split_at_mut(groups.width() * words);
            let to = Shared(packed.as_mut_ptr());
            let to_u = Shared(packed_u.as_mut_ptr());
            for_each(groups.count(), 4 * rows * words, |group| {
                // SAFETY: each group is a part of `packed` of its own.
                let task = |x, words, to: Shared<f32>| Pack {
                    x,
                    words,
                    groups,
                    group,
                    to: unsafe { to.at(groups.start(group) * words) },
                };
                dispatch(self.isa, task(self.x.as_ptr().cast(), words, to));
                dispatch(self.isa, task(low.u.as_ptr(), low.rank, to_u));
            });
            let (packed, packed_u) = (&*packed, &*packed_u);
            for_each(strips.count(), rows * d_out * d_in, |index| {
                let Range {
                    start: first,
                    end: last,
                } = strips.columns(index);
                let sizes = Sizes {
                    count: (last - first).next_multiple_of(STEP),
                    w_stride: depth + PAD,
                    sum_stride: groups.width() + PAD,
                };
                with_scratch(sizes.len(), |scratch| {
                    let task = Strip::<E, W, O> {
                        element: PhantomData,
                        w: self.w,
                        packed,
                        low: LowRank { u: packed_u, ..low },
                        groups,
                        depth,
                        first,
                        last,
                        y,
                        sizes,
                        scratch,
                    };
                    dispatch(self.isa, task)
                });
            });
        });
    }
}

/// How the rows of `x` are divided into groups, each as wide as a tile.
#[derive(Clone, Copy)]
struct Groups {
    full: usize,
    lanes: usize,
    rows: usize,
}

impl Groups {
    fn count(&self) -> usize {
        self.rows.div_ceil(self.full)
    }

    fn start(&self, group: usize) -> usize {
        group * self.full
    }

    /// Rows of a group, filled up to whole vectors.
    fn of(&self, group: usize) -> usize {
        let rows = self.rows - self.start(group);
        rows.next_multiple_of(self.lanes).min(self.full)
    }

    /// Rows of all groups, filled up.
    fn width(&self) -> usize {
        self.rows.next_multiple_of(self.lanes)
    }
}

/// Packs the rows of `x` of one group as `[words, width of the group]`, what is filled up with zeros.
struct Pack {
    /// `[rows, words]`, possibly not aligned.
    x: *const f32,
    words: usize,
    groups: Groups,
    group: usize,
    to: *mut f32,
}

impl Kernel for Pack {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (start, width) = (self.groups.start(self.group), self.groups.of(self.group));
        let whole = (self.groups.rows - start).min(width) / 8 * 8;
        let step = self.words / 8 * 8;
        // SAFETY: rows of `x` below their number, words below theirs, and `[words, width]` of `to`.
        unsafe {
            let x = self.x.add(start * self.words);
            // A cache line of each row at a time.
            for k in (0..step).step_by(16) {
                for half in (k..step.min(k + 16)).step_by(8) {
                    for r in (0..whole).step_by(8) {
                        let to = self.to.add(half * width + r);
                        S::transpose(x.add(r * self.words + half), self.words, to, width);
                    }
                }
            }
            for k in 0..self.words {
                for r in if k < step { whole } else { 0 }..width {
                    let value = match start + r < self.groups.rows {
                        true => x.add(r * self.words + k).read_unaligned(),
                        false => 0.0,
                    };
                    *self.to.add(k * width + r) = value;
                }
            }
        }
    }
}

/// The scratches of a strip: its rows of `W`, dense, and its rows of `yᵀ`.
#[derive(Clone, Copy)]
struct Sizes {
    /// Rows of either, a multiple of the columns of any tile.
    count: usize,
    w_stride: usize,
    sum_stride: usize,
}

impl Sizes {
    fn len(&self) -> usize {
        self.count * (self.w_stride + self.sum_stride)
    }
}

/// Rows `first..last` of `W`, which are columns of `y`.
struct Strip<'a, E: Element, W, O> {
    element: PhantomData<E>,
    w: W,
    packed: &'a [f32],
    /// `u` packed as `x` is.
    low: LowRank<'a>,
    groups: Groups,
    depth: usize,
    first: usize,
    last: usize,
    y: Place<O>,
    sizes: Sizes,
    scratch: &'a mut [f32],
}

impl<E: Element, W: Source<E>, O: Value> Kernel for Strip<'_, E, W, O> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Sizes {
            count,
            w_stride,
            sum_stride,
        } = self.sizes;
        let (dense, sums) = self.scratch.split_at_mut(count * w_stride);
        let Self {
            w,
            groups,
            first,
            last,
            ..
        } = self;
        let [d_out, d_in] = w.shape();
        let words = d_in / E::PER_WORD;
        for k in (0..words).step_by(self.depth) {
            let depth = self.depth.min(words - k);
            for (row, dense) in (first..last).zip(dense.chunks_mut(w_stride)) {
                let at = row * d_in + k * E::PER_WORD;
                // SAFETY: the instructions are those of `S`.
                unsafe { w.run::<S>(at..at + depth * E::PER_WORD, dense) };
            }
            let panel = Panel {
                packed: self.packed,
                words,
                k,
                depth,
                dense,
                w_stride,
                sum_stride,
                columns: last - first,
            };
            // SAFETY: the instructions are those of `S`.
            unsafe { panel.add::<S, E>(&groups, sums, k > 0) };
        }
        let LowRank { rank, v, .. } = self.low;
        for k in (0..rank).step_by(self.depth) {
            let depth = self.depth.min(rank - k);
            for (j, dense) in (first..last).zip(dense.chunks_mut(w_stride)) {
                for (p, dense) in dense[..depth].iter_mut().enumerate() {
                    *dense = v[(k + p) * d_out + j];
                }
            }
            let panel = Panel {
                packed: self.low.u,
                words: rank,
                k,
                depth,
                dense,
                w_stride,
                sum_stride,
                columns: last - first,
            };
            // SAFETY: as above.
            unsafe { panel.add::<S, F32>(&groups, sums, true) };
        }
        // Eight rows at a time, turned in what held `W`.
        for block in (0..groups.rows).step_by(8) {
            for j in (0..count).step_by(8) {
                let sums = sums[j * sum_stride + block..].as_ptr();
                // SAFETY: `sums` has `count` rows, a multiple of eight, of eight values or more from `block` on: they
                // are padded. `dense` has room for eight rows of `count`.
                unsafe { S::transpose(sums, sum_stride, dense[j..].as_mut_ptr(), count) };
            }
            let turned = dense.chunks_exact(count);
            for (row, sums) in (block..groups.rows.min(block + 8)).zip(turned) {
                for (j, &sum) in sums[..last - first].iter().enumerate() {
                    // SAFETY: these columns of `y` are this task's own.
                    unsafe { self.y.put(row, first + j, sum) };
                }
            }
        }
    }
}

/// A few hundred of the inner dimension: of packed rows, and of dense columns.
struct Panel<'a> {
    packed: &'a [f32],
    /// Words of a packed row, and where among them this begins and how far it goes.
    words: usize,
    k: usize,
    depth: usize,
    dense: &'a [f32],
    w_stride: usize,
    sum_stride: usize,
    columns: usize,
}

impl Panel<'_> {
    /// Adds its products to `sums`, or puts them there.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn add<S: Simd, E: Element>(self, groups: &Groups, sums: &mut [f32], accumulate: bool) {
        for group in 0..groups.count() {
            let start = groups.start(group);
            let width = groups.of(group);
            let vectors = width / S::LANES;
            for j in (0..self.columns).step_by(S::tile_columns(vectors)) {
                let tile = Tile {
                    vectors,
                    depth: self.depth,
                    a: self.packed[start * self.words + self.k * width..].as_ptr(),
                    a_stride: width,
                    b: self.dense[j * self.w_stride..].as_ptr(),
                    b_stride: self.w_stride,
                    c: sums[j * self.sum_stride + start..].as_mut_ptr(),
                    c_stride: self.sum_stride,
                    accumulate,
                };
                // SAFETY: `depth` vectors of the group, and so many rows of both scratches as the tile has columns,
                // of which there is a multiple.
                unsafe { E::tile::<S>(tile) };
            }
        }
    }
}
