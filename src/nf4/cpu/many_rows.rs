//! The product with many rows, `y = x · Wᵀ`: `x [rows, d_in]`, `W [d_out, d_in]`, `y [rows, d_out]`.
//!
//! `yᵀ` is computed strip by strip of `W`'s rows. `x` is packed once, transposed, so that vectors run over its rows; a
//! strip of `W` is dequantised to a scratch that stays in cache, a few hundred columns at a time, and its values are
//! broadcast. One dequantised value thus serves all rows, and no dense weight is ever in memory.

use super::packed::Packed;
use super::parallel::{Shared, threads};
use super::scratch::{with_operand, with_scratch};
use super::simd::{Isa, Kernel, Simd, Tile, dispatch};

/// Rows of `W` in a strip, at most: a multiple of every [`Simd::tile_columns`]. With [`DEPTH`], a scratch of 192 KiB.
const STRIP: usize = 96;
/// What strips are a multiple of.
const STEP: usize = 24;
/// Columns of `W` that are dequantised at a time, at most.
const DEPTH: usize = 512;
/// Floats between the ends of rows in a scratch, so that their distance is no power of two, which caches dislike.
const PAD: usize = 16;
/// Rows of `x` at a time, at most; a longer `x` costs another dequantisation for each.
const ROWS: usize = 512;
/// Floats of packed `x`, at most: 8 MiB.
const PACKED: usize = 1 << 21;

/// `y = x · Wᵀ`, row-major, every element of `y` written.
pub(super) fn product(isa: Isa, w: &Packed, x: &[f32], y: &mut [f32]) {
    let [d_out, d_in] = w.shape;
    let rows = y.len() / d_out;
    assert_eq!((x.len(), y.len()), (rows * d_in, rows * d_out));
    let most = (PACKED / d_in.max(1)).next_multiple_of(64).clamp(64, ROWS);
    // Blocks of rows of like size, so that the last is not a sliver.
    let block = rows.div_ceil(rows.div_ceil(most)).next_multiple_of(64);
    for (x, y) in x.chunks(block * d_in).zip(y.chunks_mut(block * d_out)) {
        dispatch(isa, Block { isa, w, x, y });
    }
}

struct Block<'a> {
    isa: Isa,
    w: &'a Packed<'a>,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let [d_out, d_in] = self.w.shape;
        let rows = self.y.len() / d_out;
        let groups = Groups {
            full: S::LANES * S::TILE_VECTORS,
            lanes: S::LANES,
            rows,
        };
        let panels = d_in.div_ceil(DEPTH).max(1);
        let depth = d_in.div_ceil(panels).next_multiple_of(32);
        let strip = d_out
            .div_ceil(4 * threads())
            .next_multiple_of(STEP)
            .min(STRIP);
        let y = Shared(self.y.as_mut_ptr());
        with_operand(groups.width() * d_in, |packed| {
            let to = Shared(packed.as_mut_ptr());
            super::parallel::for_each(groups.count(), rows * d_in, |group| {
                // SAFETY: each group is a part of `packed` of its own.
                unsafe {
                    pack(
                        self.x,
                        d_in,
                        &groups,
                        group,
                        to.at(groups.start(group) * d_in),
                    )
                }
            });
            let packed = &*packed;
            super::parallel::for_each(d_out.div_ceil(strip), rows * self.w.len(), |index| {
                let first = index * strip;
                let last = (first + strip).min(d_out);
                let sizes = Sizes {
                    count: (last - first).next_multiple_of(STEP),
                    w_stride: depth + PAD,
                    sum_stride: groups.width() + PAD,
                };
                with_scratch(sizes.len(), |scratch| {
                    let task = Strip {
                        w: self.w,
                        packed,
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
        (self.rows - self.start(group))
            .next_multiple_of(self.lanes)
            .min(self.full)
    }

    /// Rows of all groups, filled up.
    fn width(&self) -> usize {
        self.rows.next_multiple_of(self.lanes)
    }
}

/// Packs the rows of `x` of one group as `[d_in, width of the group]`, what is filled up with zeros.
///
/// # Safety
///
/// `to` has room for them.
unsafe fn pack(x: &[f32], d_in: usize, groups: &Groups, group: usize, to: *mut f32) {
    let (start, width) = (groups.start(group), groups.of(group));
    // A cache line of each row at a time.
    for k in (0..d_in).step_by(16) {
        let n = 16.min(d_in - k);
        for r in 0..width {
            let row = start + r;
            for p in 0..n {
                let value = if row < groups.rows {
                    x[row * d_in + k + p]
                } else {
                    0.0
                };
                // SAFETY: within `[d_in, width]`.
                unsafe { *to.add((k + p) * width + r) = value }
            }
        }
    }
}

/// Rows `first..last` of `W`, which are columns of `y`.
struct Strip<'a> {
    w: &'a Packed<'a>,
    packed: &'a [f32],
    groups: Groups,
    depth: usize,
    first: usize,
    last: usize,
    y: Shared,
    sizes: Sizes,
    scratch: &'a mut [f32],
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

impl Kernel for Strip<'_> {
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
        let [d_out, d_in] = w.shape;
        for k in (0..d_in).step_by(self.depth) {
            let depth = self.depth.min(d_in - k);
            for (row, dense) in (first..last).zip(dense.chunks_mut(w_stride)) {
                let at = row * d_in + k;
                // SAFETY: the instructions are those of `S`.
                unsafe { w.decode::<S>(at..at + depth, dense) };
            }
            for group in 0..groups.count() {
                let start = groups.start(group);
                let width = groups.of(group);
                let vectors = width / S::LANES;
                let columns = S::tile_columns(vectors);
                for j in (0..last - first).step_by(columns) {
                    let tile = Tile {
                        vectors,
                        columns,
                        depth,
                        a: self.packed[start * d_in + k * width..].as_ptr(),
                        a_stride: width,
                        b: dense[j * w_stride..].as_ptr(),
                        b_stride: w_stride,
                        c: sums[j * sum_stride + start..].as_mut_ptr(),
                        c_stride: sum_stride,
                        accumulate: k > 0,
                    };
                    // SAFETY: `depth` vectors of the group, and `columns` rows of both scratches, of which there is
                    // a multiple of `columns`.
                    unsafe { S::tile(tile) };
                }
            }
        }
        for row in 0..groups.rows {
            for j in 0..last - first {
                // SAFETY: these columns of `y` are this task's own.
                unsafe { *self.y.at(row * d_out + first + j) = sums[j * sum_stride + row] };
            }
        }
    }
}
