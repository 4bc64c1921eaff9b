//! `Y = softmax(scale · Q·Kᵀ)·V` over the keys that each query sees, and its gradients; scores never leave the cache.
//!
//! Queries are taken a block at a time, against the keys that any of them sees. Keys and values are packed once a head,
//! so that vectors run over what lies contiguous. Backward computes the scores again. With `P` the softmax,
//!
//! ```text
//! dV = Pᵀ·dY     dP = dY·Vᵀ     dS = P ∘ (dP − rowsum(P ∘ dP))     dQ = scale · dS·K     dK = scale · dSᵀ·Q
//! ```

use std::mem::MaybeUninit;
use std::ops::Range;

use super::element::{exp, max, sum};
use super::heads::Heads;
use crate::cpu::matmul::small::{Matrix, product};
use crate::cpu::parallel::{Shared, for_each};
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch};
use crate::cpu::value::Value;
use crate::fused::Visible;

/// Queries of a block, and what keys are taken in multiples of: whole vectors, and whole tiles, of any instruction set.
const BLOCK: usize = 48;
/// Values between the ends of rows in a scratch, so that their distance is no power of two, which caches dislike.
const PAD: usize = 16;

/// The operands, all of one shape but for the numbers of heads and tokens.
#[derive(Clone, Copy)]
pub(super) struct Attention<'a, V> {
    pub(super) q: Heads<'a, V>,
    pub(super) k: Heads<'a, V>,
    pub(super) v: Heads<'a, V>,
    pub(super) visible: &'a Visible,
    pub(super) scale: f32,
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
            with_scratch(sizes.forward(), |scratch| {
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
            with_scratch(sizes.backward(), |scratch| {
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
        Sizes {
            d: self.q.d,
            width: self.q.d.next_multiple_of(16),
            keys: self.k.seq.next_multiple_of(BLOCK),
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

    /// Scores to `e^(score − largest)` of each row, zero where a key is not seen, and the reciprocal of their sum.
    #[inline(always)]
    fn exponentials(
        &self,
        batch: usize,
        query: usize,
        keys: &Range<usize>,
        scores: &mut [f32],
    ) -> f32 {
        let range = &self.visible.of_row(batch)[query];
        if range.is_empty() {
            scores.fill(0.0);
            return 0.0;
        }
        let (first, end) = (range.start - keys.start, range.end - keys.start);
        scores[..first].fill(0.0);
        scores[end..].fill(0.0);
        let scores = &mut scores[first..end];
        let largest = max(scores);
        for score in scores.iter_mut() {
            *score = exp(*score - largest);
        }
        1.0 / sum([&*scores], |[e]| e)
    }
}

/// The sizes of the scratches, in values.
#[derive(Clone, Copy)]
struct Sizes {
    d: usize,
    /// `d`, filled up.
    width: usize,
    /// Number of keys, filled up.
    keys: usize,
}

impl Sizes {
    /// `[keys, width]`
    fn rows(&self) -> usize {
        self.keys * self.width
    }

    /// `[width, keys]`, of which `d` rows count
    fn columns(&self) -> usize {
        self.width * (self.keys + PAD)
    }

    /// `[BLOCK, width]`
    fn block(&self) -> usize {
        BLOCK * self.width
    }

    /// `[BLOCK, keys]`
    fn scores(&self) -> usize {
        BLOCK * (self.keys + PAD)
    }

    /// `[keys, BLOCK]`
    fn turned(&self) -> usize {
        self.keys * (BLOCK + PAD)
    }

    fn forward(&self) -> usize {
        self.columns() + self.rows() + 2 * self.block() + self.scores()
    }

    fn backward(&self) -> usize {
        2 * self.columns() + 3 * self.rows() + 3 * self.block() + 2 * self.scores() + self.turned()
    }
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

/// One head of queries.
struct Forward<'a, V> {
    of: Attention<'a, V>,
    sizes: Sizes,
    batch: usize,
    head: usize,
    scratch: &'a mut [f32],
    y: Shared<V>,
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
        let Sizes { d, width, keys } = sizes;
        let stride = keys + PAD;
        let (turned_k, rest) = self.scratch.split_at_mut(sizes.columns());
        let (packed_v, rest) = rest.split_at_mut(sizes.rows());
        let (packed_q, rest) = rest.split_at_mut(sizes.block());
        let (sums, scores) = rest.split_at_mut(sizes.block());

        let shared = head / (q.heads / k.heads);
        pack(&k, [batch, shared, 0], 1.0, width, packed_v);
        // SAFETY: the instructions are those of `S`, here and below.
        unsafe { turn::<S>(packed_v, width, [keys, width], turned_k, stride) };
        pack(&v, [batch, shared, 0], 1.0, width, packed_v);
        for first in (0..q.seq).step_by(BLOCK) {
            let rows = BLOCK.min(q.seq - first);
            let seen = of.seen(batch, first..first + rows);
            pack(&q, [batch, head, first], scale, width, packed_q);
            let turned = Matrix {
                values: &turned_k[seen.start..],
                stride,
            };
            let queries = Matrix {
                values: packed_q,
                stride: width,
            };
            // SAFETY: as above.
            unsafe {
                product::<S>(
                    turned,
                    queries,
                    [rows, d, seen.len()],
                    scores,
                    stride,
                    false,
                )
            };
            let mut reciprocals = [0.0; BLOCK];
            for (row, (scores, reciprocal)) in scores
                .chunks_mut(stride)
                .zip(&mut reciprocals[..rows])
                .enumerate()
            {
                let scores = &mut scores[..seen.len()];
                *reciprocal = of.exponentials(batch, first + row, &seen, scores);
            }
            let values = Matrix {
                values: &packed_v[seen.start * width..],
                stride: width,
            };
            let weights = Matrix {
                values: scores,
                stride,
            };
            // SAFETY: as above, and this head of `y` is this task's own.
            unsafe {
                product::<S>(
                    values,
                    weights,
                    [rows, seen.len(), width],
                    sums,
                    width,
                    false,
                );
                let at = [batch, head, first];
                unpack(sums, width, &q, at, |row| reciprocals[row], self.y);
            }
        }
    }
}

/// One head of keys and values, and the queries that share it.
struct Backward<'a, V> {
    of: Attention<'a, V>,
    dy: Heads<'a, V>,
    sizes: Sizes,
    batch: usize,
    head: usize,
    scratch: &'a mut [f32],
    dq: Shared<V>,
    dk: Shared<V>,
    dv: Shared<V>,
}

impl<V: Value> Kernel for Backward<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self {
            of,
            dy,
            sizes,
            batch,
            head,
            ..
        } = self;
        let Attention { q, k, v, scale, .. } = of;
        let Sizes { d, width, keys } = sizes;
        let stride = keys + PAD;
        let turned_stride = BLOCK + PAD;
        let (turned_k, rest) = self.scratch.split_at_mut(sizes.columns());
        let (turned_v, rest) = rest.split_at_mut(sizes.columns());
        let (packed_k, rest) = rest.split_at_mut(sizes.rows());
        let (sums_k, rest) = rest.split_at_mut(sizes.rows());
        let (sums_v, rest) = rest.split_at_mut(sizes.rows());
        let (packed_q, rest) = rest.split_at_mut(sizes.block());
        let (packed_dy, rest) = rest.split_at_mut(sizes.block());
        let (sums_q, rest) = rest.split_at_mut(sizes.block());
        let (weights, rest) = rest.split_at_mut(sizes.scores());
        let (slopes, turned) = rest.split_at_mut(sizes.scores());

        pack(&v, [batch, head, 0], 1.0, width, packed_k);
        // SAFETY: the instructions are those of `S`, here and below.
        unsafe { turn::<S>(packed_k, width, [keys, width], turned_v, stride) };
        pack(&k, [batch, head, 0], 1.0, width, packed_k);
        // SAFETY: as above.
        unsafe { turn::<S>(packed_k, width, [keys, width], turned_k, stride) };
        sums_k.fill(0.0);
        sums_v.fill(0.0);

        let group = q.heads / k.heads;
        for head in head * group..(head + 1) * group {
            for first in (0..q.seq).step_by(BLOCK) {
                let rows = BLOCK.min(q.seq - first);
                let seen = of.seen(batch, first..first + rows);
                let n = seen.len();
                pack(&q, [batch, head, first], scale, width, packed_q);
                pack(&dy, [batch, head, first], 1.0, width, packed_dy);
                let block = |values| Matrix {
                    values,
                    stride: width,
                };
                // SAFETY: as above.
                unsafe {
                    let (k, v) = (&turned_k[seen.start..], &turned_v[seen.start..]);
                    let k = Matrix { values: k, stride };
                    let v = Matrix { values: v, stride };
                    product::<S>(k, block(packed_q), [rows, d, n], weights, stride, false);
                    product::<S>(v, block(packed_dy), [rows, d, n], slopes, stride, false);
                }
                let both = weights.chunks_mut(stride).zip(slopes.chunks_mut(stride));
                for (row, (weights, slopes)) in both.enumerate() {
                    let (weights, slopes) = (&mut weights[..n], &mut slopes[..n]);
                    if row >= rows {
                        weights.fill(0.0);
                        slopes.fill(0.0);
                        continue;
                    }
                    let reciprocal = of.exponentials(batch, first + row, &seen, weights);
                    for weight in weights.iter_mut() {
                        *weight *= reciprocal;
                    }
                    let mean = sum([&*weights, &*slopes], |[weight, slope]| weight * slope);
                    for (slope, &weight) in slopes.iter_mut().zip(&*weights) {
                        *slope = weight * (*slope - mean);
                    }
                }
                // SAFETY: as above, and this head of `dq` is this task's own.
                unsafe {
                    let at = seen.start * width;
                    turn::<S>(weights, stride, [BLOCK, n], turned, turned_stride);
                    let by_key = Matrix {
                        values: turned,
                        stride: turned_stride,
                    };
                    let sums = &mut sums_v[at..];
                    product::<S>(
                        block(packed_dy),
                        by_key,
                        [n, BLOCK, width],
                        sums,
                        width,
                        true,
                    );
                    turn::<S>(slopes, stride, [BLOCK, n], turned, turned_stride);
                    let by_key = Matrix {
                        values: turned,
                        stride: turned_stride,
                    };
                    let sums = &mut sums_k[at..];
                    product::<S>(
                        block(packed_q),
                        by_key,
                        [n, BLOCK, width],
                        sums,
                        width,
                        true,
                    );
                    let slopes = Matrix {
                        values: slopes,
                        stride,
                    };
                    let k = block(&packed_k[at..]);
                    product::<S>(k, slopes, [rows, n, width], sums_q, width, false);
                    unpack(sums_q, width, &q, [batch, head, first], |_| scale, self.dq);
                }
            }
        }
        // SAFETY: this head of both is this task's own.
        unsafe {
            unpack(sums_k, width, &k, [batch, head, 0], |_| 1.0, self.dk);
            unpack(sums_v, width, &v, [batch, head, 0], |_| 1.0, self.dv);
        }
    }
}
