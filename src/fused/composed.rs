//! The same, of Burn's own operations: for every backend, and what the kernels are tested against.

use burn::tensor::activation::{log_softmax, silu, softmax};
use burn::tensor::{DType, Int, Tensor, TensorData};

use super::Visible;
use crate::tensor::{is_empty, matmul, reshape, row};

pub(super) fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    silu(gate) * up
}

pub(super) fn rms_norm<const D: usize>(x: Tensor<D>, gamma: Tensor<1>, epsilon: f64) -> Tensor<D> {
    let dtype = x.dtype();
    // Burn has no mean of no values.
    if is_empty(&x) {
        return x * row(gamma);
    }
    let x = widened(x);
    let mean = x.clone().square().mean_dim(D - 1);
    (x / mean.add_scalar(epsilon).sqrt()).cast(dtype) * gamma.unsqueeze()
}

pub(super) fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>) -> Tensor<4> {
    let (dtype, half) = (x.dtype(), x.dims()[3] / 2);
    if is_empty(&x) {
        return x;
    }
    let x = widened(x);
    let (cos, sin) = (cos.cast(x.dtype()), sin.cast(x.dtype()));
    let x1 = x.clone().narrow(3, 0, half);
    let x2 = x.narrow(3, half, half);
    let y1 = x1.clone() * cos.clone() - x2.clone() * sin.clone();
    let y2 = x2 * cos + x1 * sin;
    Tensor::cat(vec![y1, y2], 3).cast(dtype)
}

pub(super) fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    visible: &Visible,
    scale: f64,
) -> Tensor<4> {
    let ([batch, heads, queries, d], [_, kv_heads, keys, _]) = (q.dims(), k.dims());
    let (group, dtype) = (heads / kv_heads, q.dtype());
    let hidden = visible.hidden(&q.device());
    // The query heads of a group stand below each other, so that keys and values are not repeated. Scaling the queries
    // scales the scores, which are many more.
    let q = reshape(q, [batch, kv_heads, group * queries, d]) * scale;
    let scores = widened(matmul(q, k.swap_dims(2, 3)));
    let scores = reshape(scores, [batch, heads, queries, keys]);
    // Finite, so that a query that sees nothing does not give NaN.
    let lowest = scores
        .dtype()
        .finfo()
        .map_or(f64::from(f32::MIN), |info| info.min);
    let weights = softmax(scores.mask_fill(hidden.clone(), lowest), 3).mask_fill(hidden, 0.0);
    let weights = reshape(weights, [batch, kv_heads, group * queries, keys]);
    let y = matmul(weights.cast(dtype), v);
    reshape(y, [batch, heads, queries, d])
}

pub(super) fn cross_entropy(logits: Tensor<2>, labels: &[(usize, usize)]) -> Tensor<1> {
    let (device, count) = (logits.device(), labels.len());
    let (rows, labels): (Vec<_>, Vec<_>) = labels
        .iter()
        .map(|&(row, label)| (row as i64, label as i64))
        .unzip();
    let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [count]), &device);
    let labels = Tensor::<2, Int>::from_data(TensorData::new(labels, [count, 1]), &device);
    let logits = widened(logits.select(0, rows));
    log_softmax(logits, 1).gather(1, labels).sum().neg()
}

/// In f32, where narrower.
pub(super) fn widened<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    match x.dtype() {
        DType::F64 => x,
        _ => x.cast(DType::F32),
    }
}
