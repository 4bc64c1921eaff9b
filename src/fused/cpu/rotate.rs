//! The rotary embedding, `y1 = x1·cos − x2·sin`, `y2 = x2·cos + x1·sin`; its transpose has the other sign of `sin`.

use std::mem::MaybeUninit;

use super::heads::Heads;
use crate::cpu::parallel::for_each_chunk;
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch};
use crate::cpu::value::Value;

/// Tokens of a task.
const CHUNK: usize = 32;
/// Steps that an element costs, against one multiply-add.
const COST: usize = 4;

/// `y` as `[batch, seq, heads, d]`; `cos` and `sin` as `[batch or 1, seq, d / 2]`, `sin` times `sign`.
pub(super) fn rotate<V: Value>(
    isa: Isa,
    x: Heads<V>,
    cos: &[f32],
    sin: &[f32],
    sign: f32,
    y: &mut [MaybeUninit<V>],
) {
    let token = x.heads * x.d;
    assert_eq!([cos.len(), y.len()], [sin.len(), x.batch * x.seq * token]);
    let work = COST * y.len();
    for_each_chunk(y, CHUNK * token, work, |index, y| {
        let task = Tokens {
            x,
            cos,
            sin,
            sign,
            first: index * CHUNK,
            y,
        };
        dispatch(isa, task);
    });
}

struct Tokens<'a, V> {
    x: Heads<'a, V>,
    cos: &'a [f32],
    sin: &'a [f32],
    sign: f32,
    first: usize,
    y: &'a mut [MaybeUninit<V>],
}

impl<V: Value> Kernel for Tokens<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (x, half) = (self.x, self.x.d / 2);
        for (token, y) in (self.first..).zip(self.y.chunks_exact_mut(x.heads * x.d)) {
            let at = token * half % self.cos.len();
            let (cos, sin) = (&self.cos[at..at + half], &self.sin[at..at + half]);
            for (head, y) in y.chunks_exact_mut(x.d).enumerate() {
                let x = x.row(token / x.seq, head, token % x.seq);
                let (x1, x2) = x.split_at(half);
                let (y1, y2) = y.split_at_mut(half);
                for i in 0..half {
                    let (x1, x2): (f32, f32) = (x1[i].into(), x2[i].into());
                    let (cos, sin) = (cos[i], self.sign * sin[i]);
                    y1[i].write(V::round(x1 * cos - x2 * sin));
                    y2[i].write(V::round(x2 * cos + x1 * sin));
                }
            }
        }
    }
}
