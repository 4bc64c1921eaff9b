//! Burn's tensors in and out of the kernels, f32 or bf16, on the instruction set of this machine.

use std::mem::MaybeUninit;

use burn::backend::{
    Flex,
    ops::{FloatTensorOps, ModuleOps},
};
use burn::tensor::{Shape, TensorData};

use super::attention::{Attention, PACKED};
use super::cross_entropy::{self, Labels, Partition};
use super::heads::Heads;
use super::rms_norm::Rows;
use super::{linear, rotate as rotation, swiglu as gate_unit};
use crate::cpu::flex::{
    Float, contiguous, filled, into_contiguous, last, of_dtype, shape, slice, to_rank,
    with_whole_rows,
};
use crate::cpu::matmul::skinny;
use crate::cpu::simd::Isa;
use crate::cpu::value::Value;
use crate::fused::Visible;

pub(super) fn frozen_linear(x: &Float, w: &Float) -> Float {
    match () {
        () if linear::is_of_few_rows(x, w) => linear::of_few_rows(x, w),
        () if linear::serves(x, w) => linear::forward(x, w, None),
        () => Flex::linear(x.clone(), w.clone(), None),
    }
}

/// `dy · Wᵀ + u · v`.
pub(super) fn frozen_linear_backward(dy: &Float, w: &Float, term: linear::Term) -> Float {
    if linear::serves(dy, w) {
        return linear::backward(dy, w, term);
    }
    let dx = Flex::linear_x_backward(w.clone(), dy.clone());
    match term {
        None => dx,
        Some((u, v)) => with_term(dx, &u, &v),
    }
}

/// The result, and `scale · x · a`.
///
/// The product with the weight is that of a layer without an adapter, so that a fresh one leaves a layer's output what it was, to the bit:
/// Burn's in training, and without it that of [`fused::linear`](crate::fused::linear).
pub(super) fn lora_linear(
    x: &Float,
    w: &Float,
    [a, b]: [&Float; 2],
    scale: f64,
    trains: bool,
) -> (Float, Float) {
    let u = to_rank(x, a, scale);
    let y = match !trains && linear::is_of_few_rows(x, w) {
        true => linear::of_few_rows(x, w),
        false => Flex::linear(x.clone(), w.clone(), None),
    };
    (with_term(y, &u, &contiguous(b)), u)
}

/// `y + u · v`, in the memory of `y` if no one else holds it.
fn with_term(y: Float, u: &Float, v: &Float) -> Float {
    fn of<V: Value>(y: &mut Float, u: &Float, v: &Float) {
        let (start, len) = (y.layout().start_offset(), y.layout().num_elements());
        let y = &mut y.storage_mut()[start..][..len];
        skinny::add::<V>(Isa::best(), slice(u), slice(v), last(u), y);
    }
    // Moved: a second handle would make a copy of it.
    let mut y = into_contiguous(y);
    of_dtype!(y, of(&mut y, u, v));
    y
}

pub(super) fn swiglu(gate: &Float, up: &Float) -> Float {
    fn of<V: Value>(gate: &Float, up: &Float) -> Float {
        let (gate, up) = (contiguous(gate), contiguous(up));
        let write = |[y]: [&mut [_]; 1]| {
            gate_unit::forward::<V>(Isa::best(), slice(&gate), slice(&up), y);
        };
        // SAFETY: all is written.
        let [y] = unsafe { filled([&gate], write) };
        y
    }
    of_dtype!(gate, of(gate, up))
}

/// The gradients of `gate` and `up`.
pub(super) fn swiglu_backward(gate: &Float, up: &Float, dy: &Float) -> [Float; 2] {
    fn of<V: Value>(gate: &Float, up: &Float, dy: &Float) -> [Float; 2] {
        let [gate, up, dy] = [gate, up, dy].map(contiguous);
        let write = |[d_gate, d_up]: [&mut [_]; 2]| {
            let [gate, up, dy] = [&gate, &up, &dy].map(slice::<V>);
            gate_unit::backward(Isa::best(), gate, up, dy, d_gate, d_up);
        };
        // SAFETY: all is written.
        unsafe { filled([&gate, &up], write) }
    }
    of_dtype!(gate, of(gate, up, dy))
}

/// Calls `f` with the rows of `x`.
fn with_rows<V: Value, T>(
    x: &Float,
    gamma: &Float,
    epsilon: f64,
    f: impl FnOnce(&Float, Rows<V>) -> T,
) -> T {
    let (x, gamma) = (contiguous(x), contiguous(gamma));
    let rows = Rows {
        x: slice(&x),
        gamma: slice(&gamma),
        epsilon: epsilon as f32,
    };
    f(&x, rows)
}

pub(super) fn rms_norm(x: &Float, gamma: &Float, epsilon: f64) -> Float {
    fn of<V: Value>(x: &Float, gamma: &Float, epsilon: f64) -> Float {
        with_rows::<V, _>(x, gamma, epsilon, |x, rows| {
            // SAFETY: all is written.
            let [y] = unsafe { filled([x], |[y]| rows.forward(Isa::best(), y)) };
            y
        })
    }
    of_dtype!(x, of(x, gamma, epsilon))
}

/// The gradient of `x`.
pub(super) fn rms_norm_backward(x: &Float, gamma: &Float, epsilon: f64, dy: &Float) -> Float {
    fn of<V: Value>(x: &Float, gamma: &Float, epsilon: f64, dy: &Float) -> Float {
        let dy = contiguous(dy);
        with_rows::<V, _>(x, gamma, epsilon, |x, rows| {
            let write = |[dx]: [&mut [_]; 1]| rows.backward(Isa::best(), slice(&dy), dx);
            // SAFETY: all is written.
            let [dx] = unsafe { filled([x], write) };
            dx
        })
    }
    of_dtype!(x, of(x, gamma, epsilon, dy))
}

/// The gradient of `gamma`.
pub(super) fn rms_norm_backward_gamma(x: &Float, gamma: &Float, epsilon: f64, dy: &Float) -> Float {
    fn of<V: Value>(x: &Float, gamma: &Float, epsilon: f64, dy: &Float) -> Float {
        let dy = contiguous(dy);
        let gradient = with_rows::<V, _>(x, gamma, epsilon, |_, rows| {
            rows.backward_gamma(Isa::best(), slice(&dy))
        });
        let n = gradient.len();
        Float::from_data(TensorData::new(gradient, [n]))
    }
    of_dtype!(x, of(x, gamma, epsilon, dy))
}

fn heads<V: Value>(tensor: &Float) -> Heads<'_, V> {
    let layout = tensor.layout();
    let strides = layout.strides();
    let strides = [0, 1, 2].map(|axis| strides[axis] as usize);
    let values = &tensor.storage()[layout.start_offset()..];
    Heads::new(values, shape(tensor), strides)
}

/// Tensors `[batch, heads, seq, d]`, their values written by `f` as `[batch, seq, heads, d]`, the order in which the
/// linear layer before or after has them.
///
/// # Safety
///
/// `f` writes every value.
unsafe fn by_token<V: Value, const N: usize>(
    like: [&Float; N],
    f: impl FnOnce([&mut [MaybeUninit<V>]; N]),
) -> [Float; N] {
    // SAFETY: as above.
    let tensors = unsafe { filled(like, f) };
    tensors.map(|tensor| {
        let [batch, heads, seq, d] = shape(&tensor);
        let tensor = Flex::float_reshape(tensor, Shape::from([batch, seq, heads, d]));
        Flex::float_swap_dims(tensor, 1, 2)
    })
}

/// Rotates by the angles times `sign`.
pub(super) fn rotate(x: Float, cos: &Float, sin: &Float, sign: f32) -> Float {
    fn of<V: Value>(x: &Float, cos: &Float, sin: &Float, sign: f32) -> Float {
        let write = |[y]: [&mut [_]; 1]| {
            rotation::rotate::<V>(Isa::best(), heads(x), slice(cos), slice(sin), sign, y);
        };
        // SAFETY: all is written.
        let [y] = unsafe { by_token([x], write) };
        y
    }
    let x = with_whole_rows(x);
    let (cos, sin) = (contiguous(cos), contiguous(sin));
    of_dtype!(x, of(&x, &cos, &sin, sign))
}

fn operands<'a, V: Value>(
    [q, k, v]: [&'a Float; 3],
    visible: &'a Visible,
    scale: f64,
) -> Attention<'a, V> {
    Attention {
        q: heads(q),
        k: heads(k),
        v: heads(v),
        visible,
        scale: scale as f32,
        packed: PACKED,
    }
}

pub(super) fn attention(qkv: [Float; 3], visible: &Visible, scale: f64) -> Float {
    fn of<V: Value>(qkv: [&Float; 3], visible: &Visible, scale: f64) -> Float {
        let attention = operands::<V>(qkv, visible, scale);
        // SAFETY: all is written.
        let [y] = unsafe { by_token([qkv[0]], |[y]| attention.forward(Isa::best(), y)) };
        y
    }
    let qkv = qkv.map(with_whole_rows);
    of_dtype!(qkv[0], of(qkv.each_ref(), visible, scale))
}

/// The gradients of `q`, `k` and `v`.
pub(super) fn attention_backward(
    qkv: [Float; 3],
    visible: &Visible,
    scale: f64,
    dy: Float,
) -> [Float; 3] {
    fn of<V: Value>(qkv: [&Float; 3], visible: &Visible, scale: f64, dy: &Float) -> [Float; 3] {
        let attention = operands::<V>(qkv, visible, scale);
        let write =
            |gradients: [&mut [_]; 3]| attention.backward(Isa::best(), heads(dy), gradients);
        // SAFETY: all is written.
        unsafe { by_token(qkv, write) }
    }
    let qkv = qkv.map(with_whole_rows);
    let dy = with_whole_rows(dy);
    of_dtype!(dy, of(qkv.each_ref(), visible, scale, &dy))
}

/// The sum over labelled rows, and what backward needs.
pub(super) fn cross_entropy(logits: &Float, labels: &Labels) -> (Float, Vec<Partition>) {
    fn of<V: Value>(logits: &Float, labels: &Labels) -> (f32, Vec<Partition>) {
        let logits = contiguous(logits);
        cross_entropy::forward::<V>(Isa::best(), slice(&logits), last(&logits), labels)
    }
    let (loss, partitions) = of_dtype!(logits, of(logits, labels));
    (Float::from_data(TensorData::from([loss])), partitions)
}

pub(super) fn cross_entropy_backward(
    logits: &Float,
    labels: &Labels,
    partitions: &[Partition],
    dy: &Float,
) -> Float {
    fn of<V: Value>(logits: &Float, labels: &Labels, partitions: &[Partition], dy: f32) -> Float {
        let vocab = last(logits);
        // Zero where no row is labelled.
        let mut dz = bytemuck::zeroed_vec(logits.layout().num_elements());
        let logits_values = slice::<V>(logits);
        cross_entropy::backward(
            Isa::best(),
            logits_values,
            vocab,
            labels,
            partitions,
            dy,
            &mut dz,
        );
        Float::from_data(TensorData::new(dz, logits.layout().shape().clone()))
    }
    let logits = contiguous(logits);
    let dy = slice::<f32>(&contiguous(dy))[0];
    of_dtype!(logits, of(&logits, labels, partitions, dy))
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn a_term_is_added_where_the_result_lies() {
        fn check<V: Value>() {
            let matrix = |values: Vec<f32>, shape| Float::from_data(TensorData::new(values, shape));
            let y = TensorData::new(vec![V::round(1.0); 6], [2, 3]);
            let y = Float::from_data(y);
            let (u, v) = (matrix(vec![2.0, 3.0], [2, 1]), matrix(vec![1.0; 3], [1, 3]));
            let memory = y.bytes().as_ptr();
            let sum = with_term(y, &u, &v);
            assert_eq!(sum.bytes().as_ptr(), memory);
            let found: Vec<f32> = slice::<V>(&sum).iter().map(|&value| value.into()).collect();
            assert_eq!(found, [3.0, 3.0, 3.0, 4.0, 4.0, 4.0]);
            // Someone else's values stay.
            let other = sum.clone();
            let again = with_term(sum, &u, &v);
            assert_ne!(again.bytes().as_ptr(), memory);
            assert_eq!(slice::<V>(&other)[0].into(), 3.0);
        }
        check::<f32>();
        check::<bf16>();
    }
}
