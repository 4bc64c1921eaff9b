//! `Y = softmax(scale · Q·Kᵀ)·V` over the keys that each query sees, and its gradients; scores never leave the cache.
//!
//! Queries are taken a block at a time, against the keys that any of them sees. Keys and values are packed, so that vectors run
//! over what lies contiguous. Backward computes the scores again. With `P` the softmax,
//!
//! ```text
//! dV = Pᵀ·dY     dP = dY·Vᵀ     dS = P ∘ (dP − rowsum(P ∘ dP))     dQ = scale · dS·K     dK = scale · dSᵀ·Q
//! ```
//!
//! # Memory
//!
//! A head's keys and values are packed once if they are [`PACKED`] values or fewer. Longer ones are packed a part at a time: forward,
//! for each block of queries; backward goes over a head twice, for `dQ` and for `dK` and `dV`, so that it needs no sums for all keys.
//! A thread has at most five matrices of [`PACKED`] values, a few blocks, and of a block of queries the scores: of each key 192
//! bytes forward and 384 backward.

mod backward;
mod forward;
#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;
use std::ops::Range;

use super::element::{exp, max, sum};
use super::heads::Heads;
use crate::cpu::matmul::small::Matrix;
use crate::cpu::parallel::{Shared, for_each};
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{Isa, Simd, dispatch};
use crate::cpu::value::Value;
use crate::fused::Visible;
use backward::{Backward, Memory as BackwardMemory};
use forward::{Forward, Memory as ForwardMemory};

/// Queries of a block, and what keys are taken in multiples of: whole vectors, and whole tiles, of any instruction set.
const BLOCK: usize = 48;
/// Values between the ends of rows in a scratch, so that their distance is no power of two, which caches dislike.
const PAD: usize = 16;
/// Values of a head's keys that are packed at a time, at most: a mebibyte.
pub(super) const PACKED: usize = 1 << 18;

/// The operands, all of one shape but for the numbers of heads and tokens.
#[derive(Clone, Copy)]
pub(super) struct Attention<'a, V> {
    pub(super) q: Heads<'a, V>,
    pub(super) k: Heads<'a, V>,
    pub(super) v: Heads<'a, V>,
    pub(super) visible: &'a Visible,
    pub(super) scale: f32,
    /// Values of a head's keys that are packed at a time, at most.
    pub(super) packed: usize,
}

impl<V: Value> Attention<'_, V> {
    /// `y` as `[batch, seq, heads, d]`.
    pub(super) fn forward(self, isa: Isa, y: &mut [MaybeUninit<V>]) {
        let q = self.q;
        assert_eq!(y.len(), q.batch * q.seq * q.heads * q.d);
        let y = Shared(y.as_mut_ptr().cast::<V>());
        let work = 2 * q.batch * q.heads * q.seq * self.k.seq * q.d;
        for_each(q.batch * q.heads, work, |task| {
            let (batch, head) = (task / q.heads, task % q.heads);
            let sizes = self.sizes();
            with_scratch(ForwardMemory::len(&sizes), |scratch| {
                let task = Forward {
                    of: self,
                    sizes,
                    batch,
                    head,
                    scratch,
                    y,
                };
                dispatch(isa, task);
            });
        });
    }

    /// The gradients, as `[batch, seq, heads, d]` each.
    pub(super) fn backward(self, isa: Isa, dy: Heads<V>, [dq, dk, dv]: [&mut [MaybeUninit<V>]; 3]) {
        let (q, k) = (self.q, self.k);
        assert_eq!(
            [dy.batch, dy.heads, dy.seq, dy.d],
            [q.batch, q.heads, q.seq, q.d]
        );
        assert_eq!(dq.len(), q.batch * q.seq * q.heads * q.d);
        assert_eq!([dk.len(), dv.len()], [k.batch * k.seq * k.heads * k.d; 2]);
        let [dq, dk, dv] = [dq, dk, dv].map(|gradient| Shared(gradient.as_mut_ptr().cast::<V>()));
        let work = 5 * q.batch * q.heads * q.seq * k.seq * q.d;
        for_each(k.batch * k.heads, work, |task| {
            let (batch, head) = (task / k.heads, task % k.heads);
            let sizes = self.sizes();
            with_scratch(BackwardMemory::len(&sizes), |scratch| {
                let task = Backward {
                    of: self,
                    dy,
                    sizes,
                    batch,
                    head,
                    scratch,
                    dq,
                    dk,
                    dv,
                };
                dispatch(isa, task);
            });
        });
    }

    fn sizes(&self) -> Sizes {
        let width = self.q.d.next_multiple_of(16);
        let keys = self.k.seq.next_multiple_of(BLOCK);
        let most = self.packed / width / BLOCK * BLOCK;
        Sizes {
            d: self.q.d,
            width,
            keys,
            part: keys.min(most.max(BLOCK)),
        }
    }

    /// The keys that any of these queries sees, in whole blocks.
    #[inline(always)]
    fn seen(&self, batch: usize, queries: Range<usize>) -> Range<usize> {
        let ranges = &self.visible.of_row(batch)[queries];
        let ranges = ranges.iter().filter(|range| !range.is_empty());
        let (first, end) = ranges.fold((usize::MAX, 0), |(first, end), range| {
            (first.min(range.start), end.max(range.end))
        });
        match end {
            0 => 0..0,
            _ => first / BLOCK * BLOCK..end.next_multiple_of(BLOCK),
        }
    }

    /// All scores of a query, those of the keys `seen`, to `e^(score − largest)`, zero where it does not see a key.
    #[inline(always)]
    fn softmax(
        &self,
        batch: usize,
        query: usize,
        seen: &Range<usize>,
        scores: &mut [f32],
    ) -> Softmax {
        let scores = self.visible_part(batch, query, seen, scores);
        if scores.is_empty() {
            return Softmax {
                largest: 0.0,
                reciprocal: 0.0,
            };
        }
        let largest = max(scores);
        exponentials(scores, largest);
        Softmax {
            largest,
            reciprocal: 1.0 / sum([&*scores], |[e]| e),
        }
    }

    /// Scores of a query of the keys `part`: those that it sees. The others become zero.
    #[inline(always)]
    fn visible_part<'s>(
        &self,
        batch: usize,
        query: usize,
        part: &Range<usize>,
        scores: &'s mut [f32],
    ) -> &'s mut [f32] {
        let range = &self.visible.of_row(batch)[query];
        let within = |key: usize| key.clamp(part.start, part.end) - part.start;
        let (first, end) = match range.is_empty() {
            true => (0, 0),
            false => (within(range.start), within(range.end)),
        };
        scores[..first].fill(0.0);
        scores[end..].fill(0.0);
        &mut scores[first..end]
    }
}

#[inline(always)]
fn exponentials(scores: &mut [f32], largest: f32) {
    for score in scores.iter_mut() {
        *score = exp(*score - largest);
    }
}

/// Of a query: its largest score, and the reciprocal of the sum of `e^(score − largest)`; zeros of one that sees no key.
#[derive(Clone, Copy)]
struct Softmax {
    largest: f32,
    reciprocal: f32,
}

/// The sizes of a head, in values.
#[derive(Clone, Copy)]
struct Sizes {
    d: usize,
    /// `d`, filled up.
    width: usize,
    /// Number of keys, filled up.
    keys: usize,
    /// Keys that are packed at a time, whole blocks: all of them, or fewer.
    part: usize,
}

impl Sizes {
    /// Between the rows of what has a value for each key that is packed.
    fn part_stride(&self) -> usize {
        self.part + PAD
    }

    /// Between the rows of scores.
    fn stride(&self) -> usize {
        self.keys + PAD
    }

    /// Whether all keys are packed at once.
    fn is_whole(&self) -> bool {
        self.part == self.keys
    }

    /// `[part, width]`
    fn rows(&self) -> usize {
        self.part * self.width
    }

    /// `[width, part]`, of which `d` rows count
    fn columns(&self) -> usize {
        self.width * self.part_stride()
    }

    /// `[BLOCK, width]`
    fn block(&self) -> usize {
        BLOCK * self.width
    }

    /// `[BLOCK, keys]`
    fn scores(&self) -> usize {
        BLOCK * self.stride()
    }

    /// `[part, BLOCK]`
    fn turned(&self) -> usize {
        self.part * (BLOCK + PAD)
    }

    /// The parts of these keys, each within one that is packed.
    fn parts(&self, keys: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let part = self.part;
        let mut start = keys.start;
        std::iter::from_fn(move || {
            let end = keys.end.min((start / part.max(1) + 1) * part);
            let found = (start < keys.end).then_some(start..end);
            start = end;
            found
        })
    }

    /// Rows of `width` values.
    fn block_of<'a>(&self, values: &'a [f32]) -> Matrix<'a> {
        Matrix {
            values,
            stride: self.width,
        }
    }
}

/// Takes so many values from the beginning of a scratch.
fn take<'a>(scratch: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (taken, rest) = std::mem::take(scratch).split_at_mut(len);
    *scratch = rest;
    taken
}

/// Packs rows of a head from `first` on, times `scale`, and zeros to the end of `to`: `[…, width]`.
#[inline(always)]
fn pack<V: Value>(
    from: &Heads<V>,
    [batch, head, first]: [usize; 3],
    scale: f32,
    width: usize,
    to: &mut [f32],
) {
    for (token, to) in (first..).zip(to.chunks_exact_mut(width)) {
        if token >= from.seq {
            to.fill(0.0);
            continue;
        }
        let row = from.row(batch, head, token);
        for (to, &value) in to.iter_mut().zip(row) {
            *to = scale * value.into();
        }
        to[row.len()..].fill(0.0);
    }
}

/// `to[c · to_stride + r] = from[r · from_stride + c]` for `rows` and `columns` that are multiples of 8.
///
/// # Safety
///
/// As [`Simd`].
#[inline(always)]
unsafe fn turn<S: Simd>(
    from: &[f32],
    from_stride: usize,
    [rows, columns]: [usize; 2],
    to: &mut [f32],
    to_stride: usize,
) {
    assert!(rows == 0 || columns == 0 || (rows - 1) * from_stride + columns <= from.len());
    assert!(rows == 0 || columns == 0 || (columns - 1) * to_stride + rows <= to.len());
    assert!(rows.is_multiple_of(8) && columns.is_multiple_of(8));
    for c in (0..columns).step_by(8) {
        for r in (0..rows).step_by(8) {
            // SAFETY: eight rows and columns from here lie within both, as asserted.
            unsafe {
                S::transpose(
                    from.as_ptr().add(r * from_stride + c),
                    from_stride,
                    to.as_mut_ptr().add(c * to_stride + r),
                    to_stride,
                );
            }
        }
    }
}

/// Writes rows `[…, width]` of a head from token `first` on, each times its scale, to `[batch, seq, heads, d]`.
///
/// # Safety
///
/// `to` is of the shape of `like`, and no one else touches this head.
#[inline(always)]
unsafe fn unpack<V: Value>(
    from: &[f32],
    width: usize,
    like: &Heads<V>,
    [batch, head, first]: [usize; 3],
    scale: impl Fn(usize) -> f32,
    to: Shared<V>,
) {
    let d = like.d;
    for (i, from) in from.chunks_exact(width).take(like.seq - first).enumerate() {
        let at = ((batch * like.seq + first + i) * like.heads + head) * d;
        // SAFETY: within `to`, and this task's own.
        let to: &mut [MaybeUninit<V>] =
            unsafe { std::slice::from_raw_parts_mut(to.at(at).cast(), d) };
        let scale = scale(i);
        for (to, &value) in to.iter_mut().zip(from) {
            to.write(V::round(scale * value));
        }
    }
}
