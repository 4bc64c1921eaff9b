//! Burn's tensors in and out of the kernels, f32 or bf16, on the instruction set of this machine.

use burn::backend::{Flex, ops::FloatTensorOps, tensor::FloatTensor};
use burn::tensor::{DType, TensorData};
use half::bf16;

use super::attention::Attention;
use super::cross_entropy::{self, Labels, Partition};
use super::element::Value;
use super::heads::Heads;
use super::rms_norm::Rows;
use super::{rotate as rotation, swiglu as gate_unit};
use crate::cpu::simd::Isa;
use crate::fused::Visible;

pub(super) type Float = FloatTensor<Flex>;

/// Calls a function with the type of the values of a tensor.
macro_rules! of_dtype {
    ($tensor:expr, $function:ident($($argument:expr),* $(,)?)) => {
        match $tensor.dtype() {
            DType::BF16 => $function::<bf16>($($argument),*),
            _ => $function::<f32>($($argument),*),
        }
    };
}

fn shape<const D: usize>(tensor: &Float) -> [usize; D] {
    tensor.layout().shape().dims()
}

fn last(tensor: &Float) -> usize {
    let shape = tensor.layout().shape();
    shape[shape.num_dims() - 1]
}

fn slice<V: Value>(contiguous: &Float) -> &[V] {
    contiguous
        .as_slice()
        .expect("contiguous, and of this dtype")
}

/// A tensor of the shape of `like`, its values written by `f`.
fn filled<V: Value>(like: &Float, f: impl FnOnce(&mut [V])) -> Float {
    let shape = like.layout().shape().clone();
    let mut values = bytemuck::zeroed_vec(shape.num_elements());
    f(&mut values);
    Float::from_data(TensorData::new(values, shape))
}

pub(super) fn swiglu(gate: &Float, up: &Float) -> Float {
    fn of<V: Value>(gate: &Float, up: &Float) -> Float {
        let (gate, up) = (gate.to_contiguous(), up.to_contiguous());
        filled::<V>(&gate, |y| {
            gate_unit::forward(Isa::best(), slice(&gate), slice(&up), y)
        })
    }
    of_dtype!(gate, of(gate, up))
}

/// The gradients of `gate` and `up`.
pub(super) fn swiglu_backward(gate: &Float, up: &Float, dy: &Float) -> [Float; 2] {
    fn of<V: Value>(gate: &Float, up: &Float, dy: &Float) -> [Float; 2] {
        let [gate, up, dy] = [gate, up, dy].map(|tensor| tensor.to_contiguous());
        let mut d_up = None;
        let d_gate = filled::<V>(&gate, |d_gate| {
            d_up = Some(filled::<V>(&up, |d_up| {
                let [gate, up, dy] = [&gate, &up, &dy].map(slice);
                gate_unit::backward(Isa::best(), gate, up, dy, d_gate, d_up);
            }));
        });
        [d_gate, d_up.expect("written with the other")]
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
    let (x, gamma) = (x.to_contiguous(), gamma.to_contiguous());
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
            filled(x, |y| rows.forward(Isa::best(), y))
        })
    }
    of_dtype!(x, of(x, gamma, epsilon))
}

/// The gradient of `x`.
pub(super) fn rms_norm_backward(x: &Float, gamma: &Float, epsilon: f64, dy: &Float) -> Float {
    fn of<V: Value>(x: &Float, gamma: &Float, epsilon: f64, dy: &Float) -> Float {
        let dy = dy.to_contiguous();
        with_rows::<V, _>(x, gamma, epsilon, |x, rows| {
            filled(x, |dx| rows.backward(Isa::best(), slice(&dy), dx))
        })
    }
    of_dtype!(x, of(x, gamma, epsilon, dy))
}

/// The gradient of `gamma`.
pub(super) fn rms_norm_backward_gamma(x: &Float, gamma: &Float, epsilon: f64, dy: &Float) -> Float {
    fn of<V: Value>(x: &Float, gamma: &Float, epsilon: f64, dy: &Float) -> Float {
        let dy = dy.to_contiguous();
        let gradient =
            with_rows::<V, _>(x, gamma, epsilon, |_, rows| rows.backward_gamma(slice(&dy)));
        let n = gradient.len();
        Float::from_data(TensorData::new(gradient, [n]))
    }
    of_dtype!(x, of(x, gamma, epsilon, dy))
}

/// A tensor `[batch, heads, seq, d]` whose rows are contiguous: itself, or a copy.
fn with_whole_rows(tensor: Float) -> Float {
    let strides = tensor.layout().strides();
    match strides[3] == 1 && strides.iter().all(|&stride| stride >= 0) {
        true => tensor,
        false => tensor.to_contiguous(),
    }
}

fn heads<V: Value>(tensor: &Float) -> Heads<'_, V> {
    let layout = tensor.layout();
    let strides = layout.strides();
    let strides = [0, 1, 2].map(|axis| strides[axis] as usize);
    let values = &tensor.storage()[layout.start_offset()..];
    Heads::new(values, shape(tensor), strides)
}

/// A tensor `[batch, heads, seq, d]`, its values written by `f` as `[batch, seq, heads, d]`, the order in which the
/// linear layer before or after has them.
fn by_token<V: Value>([batch, heads, seq, d]: [usize; 4], f: impl FnOnce(&mut [V])) -> Float {
    let mut values = bytemuck::zeroed_vec(batch * heads * seq * d);
    f(&mut values);
    let tensor = Float::from_data(TensorData::new(values, [batch, seq, heads, d]));
    Flex::float_swap_dims(tensor, 1, 2)
}

/// Rotates by the angles times `sign`.
pub(super) fn rotate(x: Float, cos: &Float, sin: &Float, sign: f32) -> Float {
    fn of<V: Value>(x: &Float, cos: &Float, sin: &Float, sign: f32) -> Float {
        by_token::<V>(shape(x), |y| {
            rotation::rotate(Isa::best(), heads(x), slice(cos), slice(sin), sign, y)
        })
    }
    let x = with_whole_rows(x);
    let (cos, sin) = (cos.to_contiguous(), sin.to_contiguous());
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
    }
}

pub(super) fn attention(qkv: [Float; 3], visible: &Visible, scale: f64) -> Float {
    fn of<V: Value>(qkv: [&Float; 3], visible: &Visible, scale: f64) -> Float {
        by_token::<V>(shape(qkv[0]), |y| {
            operands(qkv, visible, scale).forward(Isa::best(), y)
        })
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
        let (mut dk, mut dv) = (None, None);
        let dq = by_token::<V>(shape(qkv[0]), |dq| {
            dk = Some(by_token::<V>(shape(qkv[1]), |dk| {
                dv = Some(by_token::<V>(shape(qkv[2]), |dv| {
                    let attention = operands(qkv, visible, scale);
                    attention.backward(Isa::best(), heads(dy), [dq, dk, dv]);
                }));
            }));
        });
        let written = "written with the others";
        [dq, dk.expect(written), dv.expect(written)]
    }
    let qkv = qkv.map(with_whole_rows);
    let dy = with_whole_rows(dy);
    of_dtype!(dy, of(qkv.each_ref(), visible, scale, &dy))
}

/// The sum over labelled rows, and what backward needs.
pub(super) fn cross_entropy(logits: &Float, labels: &Labels) -> (Float, Vec<Partition>) {
    fn of<V: Value>(logits: &Float, labels: &Labels) -> (f32, Vec<Partition>) {
        let logits = logits.to_contiguous();
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
        let (isa, vocab) = (Isa::best(), last(logits));
        filled::<V>(logits, |dz| {
            cross_entropy::backward(isa, slice(logits), vocab, labels, partitions, dy, dz)
        })
    }
    let logits = logits.to_contiguous();
    let dy = slice::<f32>(&dy.to_contiguous())[0];
    of_dtype!(logits, of(&logits, labels, partitions, dy))
}
