//! `y = silu(g) · u` and its gradients, element by element.

use std::mem::MaybeUninit;

use super::element::sigmoid;
use crate::cpu::parallel::{Shared, for_each_chunk};
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch};
use crate::cpu::value::Value;

/// Elements of a task.
const CHUNK: usize = 1 << 14;
/// Steps that an element costs, against one multiply-add.
const COST: usize = 8;

pub(super) fn forward<V: Value>(isa: Isa, gate: &[V], up: &[V], y: &mut [MaybeUninit<V>]) {
    assert_eq!([gate.len(), up.len()], [y.len(); 2]);
    let work = COST * y.len();
    for_each_chunk(y, CHUNK, work, |index, y| {
        let at = index * CHUNK..index * CHUNK + y.len();
        let (gate, up) = (&gate[at.clone()], &up[at]);
        dispatch(isa, Forward { gate, up, y });
    });
}

struct Forward<'a, V> {
    gate: &'a [V],
    up: &'a [V],
    y: &'a mut [MaybeUninit<V>],
}

impl<V: Value> Kernel for Forward<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for ((y, &gate), &up) in self.y.iter_mut().zip(self.gate).zip(self.up) {
            let (gate, up): (f32, f32) = (gate.into(), up.into());
            y.write(V::round(gate * sigmoid(gate) * up));
        }
    }
}

/// `dg = dy · u · σ(g) · (1 + g · (1 − σ(g)))` and `du = dy · g · σ(g)`.
pub(super) fn backward<V: Value>(
    isa: Isa,
    gate: &[V],
    up: &[V],
    dy: &[V],
    d_gate: &mut [MaybeUninit<V>],
    d_up: &mut [MaybeUninit<V>],
) {
    assert_eq!(
        [gate.len(), up.len(), dy.len(), d_up.len()],
        [d_gate.len(); 4]
    );
    let work = 2 * COST * dy.len();
    let shared = Shared(d_up.as_mut_ptr());
    for_each_chunk(d_gate, CHUNK, work, |index, d_gate| {
        let start = index * CHUNK;
        let at = start..start + d_gate.len();
        let task = Backward {
            gate: &gate[at.clone()],
            up: &up[at.clone()],
            dy: &dy[at],
            // SAFETY: each chunk of `d_up` is one task's, and within it as that of `d_gate` is.
            d_up: unsafe { std::slice::from_raw_parts_mut(shared.at(start), d_gate.len()) },
            d_gate,
        };
        dispatch(isa, task);
    });
}

struct Backward<'a, V> {
    gate: &'a [V],
    up: &'a [V],
    dy: &'a [V],
    d_gate: &'a mut [MaybeUninit<V>],
    d_up: &'a mut [MaybeUninit<V>],
}

impl<V: Value> Kernel for Backward<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let inputs = self.gate.iter().zip(self.up).zip(self.dy);
        let outputs = self.d_gate.iter_mut().zip(self.d_up);
        for ((d_gate, d_up), ((&gate, &up), &dy)) in outputs.zip(inputs) {
            let (gate, up, dy): (f32, f32, f32) = (gate.into(), up.into(), dy.into());
            let sigmoid = sigmoid(gate);
            d_gate.write(V::round(dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))));
            d_up.write(V::round(dy * gate * sigmoid));
        }
    }
}
