//! Attention of one head of queries.

use super::{Attention, BLOCK, Sizes, pack, take, turn, unpack};
use crate::cpu::matmul::small::{Matrix, product};
use crate::cpu::parallel::Shared;
use crate::cpu::simd::{Kernel, Simd};
use crate::cpu::value::Value;

/// One head of queries.
pub(super) struct Forward<'a, V> {
    pub(super) of: Attention<'a, V>,
    pub(super) sizes: Sizes,
    pub(super) batch: usize,
    pub(super) head: usize,
    /// [`Memory::len`] values.
    pub(super) scratch: &'a mut [f32],
    pub(super) y: Shared<V>,
}

/// What a scratch is divided into.
pub(super) struct Memory<'a> {
    /// `[d, part]`
    turned_k: &'a mut [f32],
    /// `[part, width]`
    packed: &'a mut [f32],
    /// `[BLOCK, width]` each
    packed_q: &'a mut [f32],
    sums: &'a mut [f32],
    /// `[BLOCK, keys]`
    scores: &'a mut [f32],
}

impl<'a> Memory<'a> {
    pub(super) fn len(sizes: &Sizes) -> usize {
        sizes.columns() + sizes.rows() + 2 * sizes.block() + sizes.scores()
    }

    fn new(sizes: &Sizes, mut scratch: &'a mut [f32]) -> Self {
        let scratch = &mut scratch;
        Self {
            turned_k: take(scratch, sizes.columns()),
            packed: take(scratch, sizes.rows()),
            packed_q: take(scratch, sizes.block()),
            sums: take(scratch, sizes.block()),
            scores: take(scratch, sizes.scores()),
        }
    }
}

impl<V: Value> Kernel for Forward<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self {
            of,
            sizes,
            batch,
            head,
            ..
        } = self;
        let Attention { q, k, v, scale, .. } = of;
        let (width, stride) = (sizes.width, sizes.stride());
        let memory = Memory::new(&sizes, self.scratch);
        let kv_head = head / (q.heads / k.heads);
        let at = |key| [batch, kv_head, key];
        let whole = sizes.is_whole();
        if whole {
            pack(&k, at(0), 1.0, width, memory.packed);
            // SAFETY: the instructions are those of `S`, here and below.
            unsafe { turn_keys::<S>(&sizes, sizes.keys, memory.packed, memory.turned_k) };
            pack(&v, at(0), 1.0, width, memory.packed);
        }
        for first in (0..q.seq).step_by(BLOCK) {
            let rows = BLOCK.min(q.seq - first);
            let seen = of.seen(batch, first..first + rows);
            pack(&q, [batch, head, first], scale, width, memory.packed_q);
            for part in sizes.parts(seen.clone()) {
                let packed = if whole { 0 } else { part.start };
                if !whole {
                    let to = &mut memory.packed[..part.len() * width];
                    pack(&k, at(part.start), 1.0, width, to);
                    // SAFETY: as above.
                    unsafe { turn_keys::<S>(&sizes, part.len(), to, memory.turned_k) };
                }
                let keys = Matrix {
                    values: &memory.turned_k[part.start - packed..],
                    stride: sizes.part_stride(),
                };
                let queries = sizes.block_of(memory.packed_q);
                let scores = &mut memory.scores[part.start - seen.start..];
                let shape = [rows, sizes.d, part.len()];
                // SAFETY: as above.
                unsafe { product::<S>(keys, queries, shape, scores, stride, false) };
            }
            let mut reciprocals = [0.0; BLOCK];
            let scores = memory.scores.chunks_mut(stride);
            for ((query, scores), to) in (first..first + rows).zip(scores).zip(&mut reciprocals) {
                let scores = &mut scores[..seen.len()];
                *to = of.softmax(batch, query, &seen, scores).reciprocal;
            }
            if seen.is_empty() {
                memory.sums.fill(0.0);
            }
            for part in sizes.parts(seen.clone()) {
                let packed = if whole { 0 } else { part.start };
                if !whole {
                    let to = &mut memory.packed[..part.len() * width];
                    pack(&v, at(part.start), 1.0, width, to);
                }
                let values = sizes.block_of(&memory.packed[(part.start - packed) * width..]);
                let weights = Matrix {
                    values: &memory.scores[part.start - seen.start..],
                    stride,
                };
                let shape = [rows, part.len(), width];
                let add = part.start > seen.start;
                // SAFETY: as above.
                unsafe { product::<S>(values, weights, shape, memory.sums, width, add) };
            }
            let at = [batch, head, first];
            // SAFETY: this head of `y` is this task's own.
            unsafe { unpack(memory.sums, width, &q, at, |row| reciprocals[row], self.y) };
        }
    }
}

/// So many packed keys to `[width, part]`.
///
/// # Safety
///
/// As [`Simd`].
#[inline(always)]
pub(super) unsafe fn turn_keys<S: Simd>(
    sizes: &Sizes,
    keys: usize,
    packed: &[f32],
    turned: &mut [f32],
) {
    let shape = [keys, sizes.width];
    // SAFETY: as asked.
    unsafe { turn::<S>(packed, sizes.width, shape, turned, sizes.part_stride()) };
}
