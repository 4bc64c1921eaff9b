//! The gradients of one head of keys and values, and of the queries that share it.

use std::ops::Range;

use super::forward::turn_keys;
use super::{Attention, BLOCK, PAD, Sizes, Softmax, exponentials, pack, take, turn, unpack};
use crate::cpu::matmul::small::{Matrix, product};
use crate::cpu::parallel::Shared;
use crate::cpu::simd::{Kernel, Simd};
use crate::cpu::value::Value;
use crate::fused::cpu::element::sum;
use crate::fused::cpu::heads::Heads;

/// One head of keys and values, and the queries that share it.
pub(super) struct Backward<'a, V> {
    pub(super) of: Attention<'a, V>,
    pub(super) dy: Heads<'a, V>,
    pub(super) sizes: Sizes,
    pub(super) batch: usize,
    pub(super) head: usize,
    /// [`Memory::len`] values.
    pub(super) scratch: &'a mut [f32],
    pub(super) dq: Shared<V>,
    pub(super) dk: Shared<V>,
    pub(super) dv: Shared<V>,
}

/// What a scratch is divided into.
pub(super) struct Memory<'a> {
    /// `[d, part]` each
    turned_k: &'a mut [f32],
    turned_v: &'a mut [f32],
    /// `[part, width]` each
    packed_k: &'a mut [f32],
    sums_k: &'a mut [f32],
    sums_v: &'a mut [f32],
    /// `[BLOCK, width]` each
    packed_q: &'a mut [f32],
    packed_dy: &'a mut [f32],
    sums_q: &'a mut [f32],
    /// `P` and `dS`, `[BLOCK, keys]` each; before that, scores and `dP`
    weights: &'a mut [f32],
    slopes: &'a mut [f32],
    /// `[part, BLOCK]`
    turned: &'a mut [f32],
}

impl<'a> Memory<'a> {
    pub(super) fn len(sizes: &Sizes) -> usize {
        2 * sizes.columns()
            + 3 * sizes.rows()
            + 3 * sizes.block()
            + 2 * sizes.scores()
            + sizes.turned()
    }

    fn new(sizes: &Sizes, mut scratch: &'a mut [f32]) -> Self {
        let scratch = &mut scratch;
        Self {
            turned_k: take(scratch, sizes.columns()),
            turned_v: take(scratch, sizes.columns()),
            packed_k: take(scratch, sizes.rows()),
            sums_k: take(scratch, sizes.rows()),
            sums_v: take(scratch, sizes.rows()),
            packed_q: take(scratch, sizes.block()),
            packed_dy: take(scratch, sizes.block()),
            sums_q: take(scratch, sizes.block()),
            weights: take(scratch, sizes.scores()),
            slopes: take(scratch, sizes.scores()),
            turned: take(scratch, sizes.turned()),
        }
    }
}

/// What is known of a query after all of its scores have been seen: its softmax, and `rowsum(P ∘ dP)`.
#[derive(Clone, Copy)]
struct Row {
    softmax: Softmax,
    mean: f32,
}

/// A block of queries of one head.
#[derive(Clone)]
struct Queries {
    head: usize,
    first: usize,
    rows: usize,
    /// The keys that any of them sees.
    seen: Range<usize>,
}

impl<V: Value> Kernel for Backward<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        let sizes = self.sizes;
        let scratch = std::mem::take(&mut self.scratch);
        let mut memory = Memory::new(&sizes, scratch);
        // SAFETY: the instructions are those of `S`.
        unsafe {
            match sizes.is_whole() {
                true => self.at_once::<S>(&mut memory),
                false => self.in_parts::<S>(&mut memory),
            }
        }
    }
}

impl<V: Value> Backward<'_, V> {
    /// All keys are packed, and each block of queries is taken once.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn at_once<S: Simd>(&self, memory: &mut Memory) {
        let all = 0..self.sizes.keys;
        // SAFETY: as asked.
        unsafe {
            self.pack_keys::<S>(&all, memory);
            memory.sums_k.fill(0.0);
            memory.sums_v.fill(0.0);
            for queries in self.blocks() {
                let seen = queries.seen.clone();
                self.pack_queries(&queries, memory);
                self.scores::<S>(&queries, &seen, 0, memory);
                self.slopes_of_rows(&queries, memory, |_, _| {});
                self.add_to_keys::<S>(&queries, &seen, 0, memory);
                self.towards_queries::<S>(&queries, &seen, 0, memory);
                self.unpack_queries(&queries, memory);
            }
            self.unpack_keys(&all, memory);
        }
    }

    /// Keys are packed a part at a time: for each block of queries, and then once more, each part for all queries.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn in_parts<S: Simd>(&self, memory: &mut Memory) {
        let (sizes, q) = (self.sizes, self.of.q);
        let group = q.heads / self.of.k.heads;
        let nothing = Row {
            softmax: Softmax {
                largest: 0.0,
                reciprocal: 0.0,
            },
            mean: 0.0,
        };
        let mut known = vec![nothing; group * q.seq];
        let index = |queries: &Queries| (queries.head % group) * q.seq + queries.first;
        // SAFETY: as asked.
        unsafe {
            for queries in self.blocks() {
                self.pack_queries(&queries, memory);
                for part in sizes.parts(queries.seen.clone()) {
                    self.pack_keys::<S>(&part, memory);
                    self.scores::<S>(&queries, &part, part.start, memory);
                }
                let rows = &mut known[index(&queries)..][..queries.rows];
                self.slopes_of_rows(&queries, memory, |row, of_row| rows[row] = of_row);
                for part in sizes.parts(queries.seen.clone()) {
                    let to = &mut memory.packed_k[..part.len() * sizes.width];
                    let at = [self.batch, self.head, part.start];
                    pack(&self.of.k, at, 1.0, sizes.width, to);
                    self.towards_queries::<S>(&queries, &part, part.start, memory);
                }
                self.unpack_queries(&queries, memory);
            }
            for part in sizes.parts(0..sizes.keys) {
                self.pack_keys::<S>(&part, memory);
                memory.sums_k.fill(0.0);
                memory.sums_v.fill(0.0);
                for queries in self.blocks() {
                    let seen = &queries.seen;
                    let both = seen.start.max(part.start)..seen.end.min(part.end);
                    if both.is_empty() {
                        continue;
                    }
                    self.pack_queries(&queries, memory);
                    self.scores::<S>(&queries, &both, part.start, memory);
                    let rows = &known[index(&queries)..][..queries.rows];
                    self.slopes_again(&queries, &both, rows, memory);
                    self.add_to_keys::<S>(&queries, &both, part.start, memory);
                }
                self.unpack_keys(&part, memory);
            }
        }
    }

    /// The blocks of queries of all heads that share these keys.
    #[inline(always)]
    fn blocks(&self) -> impl Iterator<Item = Queries> {
        let (of, batch, kv_head) = (self.of, self.batch, self.head);
        let group = of.q.heads / of.k.heads;
        let heads = kv_head * group..(kv_head + 1) * group;
        heads.flat_map(move |head| {
            (0..of.q.seq).step_by(BLOCK).map(move |first| {
                let rows = BLOCK.min(of.q.seq - first);
                Queries {
                    head,
                    first,
                    rows,
                    seen: of.seen(batch, first..first + rows),
                }
            })
        })
    }

    /// These keys and values, turned, and the keys as they are.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn pack_keys<S: Simd>(&self, part: &Range<usize>, memory: &mut Memory) {
        let (of, sizes) = (self.of, self.sizes);
        let at = [self.batch, self.head, part.start];
        let packed = &mut memory.packed_k[..part.len() * sizes.width];
        // SAFETY: as asked.
        unsafe {
            pack(&of.v, at, 1.0, sizes.width, packed);
            turn_keys::<S>(&sizes, part.len(), packed, memory.turned_v);
            pack(&of.k, at, 1.0, sizes.width, packed);
            turn_keys::<S>(&sizes, part.len(), packed, memory.turned_k);
        }
    }

    #[inline(always)]
    fn pack_queries(&self, queries: &Queries, memory: &mut Memory) {
        let at = [self.batch, queries.head, queries.first];
        let (scale, width) = (self.of.scale, self.sizes.width);
        pack(&self.of.q, at, scale, width, memory.packed_q);
        pack(&self.dy, at, 1.0, width, memory.packed_dy);
    }

    /// Scores and `dP` of the keys `part`, of which `packed` is the first that is packed, to where they are among all that are seen.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn scores<S: Simd>(
        &self,
        queries: &Queries,
        part: &Range<usize>,
        packed: usize,
        memory: &mut Memory,
    ) {
        let sizes = self.sizes;
        let (stride, at) = (sizes.stride(), part.start - queries.seen.start);
        let shape = [queries.rows, sizes.d, part.len()];
        let (of_queries, of_dy) = (
            sizes.block_of(memory.packed_q),
            sizes.block_of(memory.packed_dy),
        );
        let turned = |values| Matrix {
            values,
            stride: sizes.part_stride(),
        };
        let k = turned(&memory.turned_k[part.start - packed..]);
        let v = turned(&memory.turned_v[part.start - packed..]);
        let (weights, slopes) = (&mut memory.weights[at..], &mut memory.slopes[at..]);
        // SAFETY: as asked.
        unsafe {
            product::<S>(k, of_queries, shape, weights, stride, false);
            product::<S>(v, of_dy, shape, slopes, stride, false);
        }
    }

    /// All scores to `P`, and `dP` to `dS`; zeros behind the last row of the block. Tells of each row what is known of it then.
    #[inline(always)]
    fn slopes_of_rows(
        &self,
        queries: &Queries,
        memory: &mut Memory,
        mut tell: impl FnMut(usize, Row),
    ) {
        let (stride, n) = (self.sizes.stride(), queries.seen.len());
        let weights = memory.weights.chunks_mut(stride);
        for (row, (weights, slopes)) in weights.zip(memory.slopes.chunks_mut(stride)).enumerate() {
            let (weights, slopes) = (&mut weights[..n], &mut slopes[..n]);
            if row >= queries.rows {
                weights.fill(0.0);
                slopes.fill(0.0);
                continue;
            }
            let query = queries.first + row;
            let softmax = self.of.softmax(self.batch, query, &queries.seen, weights);
            scale_by(weights, softmax.reciprocal);
            let mean = sum([&*weights, &*slopes], |[weight, slope]| weight * slope);
            slopes_by(weights, slopes, mean);
            tell(row, Row { softmax, mean });
        }
    }

    /// The same of the keys `part`, of rows of which all that is needed is known.
    #[inline(always)]
    fn slopes_again(
        &self,
        queries: &Queries,
        part: &Range<usize>,
        known: &[Row],
        memory: &mut Memory,
    ) {
        let stride = self.sizes.stride();
        let range = part.start - queries.seen.start..part.end - queries.seen.start;
        let weights = memory.weights.chunks_mut(stride);
        for (row, (weights, slopes)) in weights.zip(memory.slopes.chunks_mut(stride)).enumerate() {
            let (weights, slopes) = (&mut weights[range.clone()], &mut slopes[range.clone()]);
            let Some(&Row { softmax, mean }) = known.get(row) else {
                weights.fill(0.0);
                slopes.fill(0.0);
                continue;
            };
            let query = queries.first + row;
            let seen = self.of.visible_part(self.batch, query, part, weights);
            exponentials(seen, softmax.largest);
            scale_by(weights, softmax.reciprocal);
            slopes_by(weights, slopes, mean);
        }
    }

    /// Adds `Pᵀ·dY` and `scale · dSᵀ·Q` of the keys `part` to the sums of the keys that are packed.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn add_to_keys<S: Simd>(
        &self,
        queries: &Queries,
        part: &Range<usize>,
        packed: usize,
        memory: &mut Memory,
    ) {
        let sizes = self.sizes;
        let (stride, width, n) = (sizes.stride(), sizes.width, part.len());
        let column = part.start - queries.seen.start;
        let at = (part.start - packed) * width;
        let shape = [n, BLOCK, width];
        // SAFETY: as asked.
        unsafe {
            for (of_block, slopes, sums) in [
                (&memory.packed_dy, &memory.weights, &mut memory.sums_v),
                (&memory.packed_q, &memory.slopes, &mut memory.sums_k),
            ] {
                let (from, to) = (&slopes[column..], &mut *memory.turned);
                turn::<S>(from, stride, [BLOCK, n], to, BLOCK + PAD);
                let by_key = Matrix {
                    values: memory.turned,
                    stride: BLOCK + PAD,
                };
                let of_block = sizes.block_of(of_block);
                product::<S>(of_block, by_key, shape, &mut sums[at..], width, true);
            }
        }
    }

    /// `dS·K` of the keys `part`, added to that of those before it.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn towards_queries<S: Simd>(
        &self,
        queries: &Queries,
        part: &Range<usize>,
        packed: usize,
        memory: &mut Memory,
    ) {
        let sizes = self.sizes;
        let slopes = Matrix {
            values: &memory.slopes[part.start - queries.seen.start..],
            stride: sizes.stride(),
        };
        let k = sizes.block_of(&memory.packed_k[(part.start - packed) * sizes.width..]);
        let shape = [queries.rows, part.len(), sizes.width];
        let add = part.start > queries.seen.start;
        // SAFETY: as asked.
        unsafe { product::<S>(k, slopes, shape, memory.sums_q, sizes.width, add) };
    }

    /// # Safety
    ///
    /// No one else touches the queries of this head.
    #[inline(always)]
    unsafe fn unpack_queries(&self, queries: &Queries, memory: &mut Memory) {
        if queries.seen.is_empty() {
            memory.sums_q.fill(0.0);
        }
        let at = [self.batch, queries.head, queries.first];
        let (sums, width, scale) = (&memory.sums_q[..], self.sizes.width, self.of.scale);
        // SAFETY: as asked.
        unsafe { unpack(sums, width, &self.of.q, at, |_| scale, self.dq) };
    }

    /// # Safety
    ///
    /// No one else touches this head.
    #[inline(always)]
    unsafe fn unpack_keys(&self, part: &Range<usize>, memory: &Memory) {
        let at = [self.batch, self.head, part.start];
        let width = self.sizes.width;
        for (sums, to) in [(&memory.sums_k, self.dk), (&memory.sums_v, self.dv)] {
            let sums = &sums[..part.len() * width];
            // SAFETY: as asked.
            unsafe { unpack(sums, width, &self.of.k, at, |_| 1.0, to) };
        }
    }
}

#[inline(always)]
fn scale_by(weights: &mut [f32], reciprocal: f32) {
    for weight in weights.iter_mut() {
        *weight *= reciprocal;
    }
}

/// `P ∘ (dP − mean)` in the place of `dP`.
#[inline(always)]
fn slopes_by(weights: &[f32], slopes: &mut [f32], mean: f32) {
    for (slope, &weight) in slopes.iter_mut().zip(weights) {
        *slope = weight * (*slope - mean);
    }
}
