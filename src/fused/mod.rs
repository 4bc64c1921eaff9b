//! What stands between the linear layers of a transformer, each as one operation with a backward of its own.
//!
//! Composed of a framework's small operations, the norms, the rotary embedding, the softmax and the gates of a block
//! take longer on a CPU than its matrix products: every step goes over memory, and keeps its result for backward. Here
//! each is one pass on all threads, computed in f32 and rounded once, and backward computes again what is cheap
//! instead of keeping it.
//!
//! | operation | kept for backward |
//! |---|---|
//! | [`frozen_linear`] | the weight, shared |
//! | [`rms_norm`] | `x` |
//! | [`swiglu`] | `gate`, `up` |
//! | [`rotate`] | nothing but the angles |
//! | [`attention`] | `q`, `k`, `v`, and no scores |
//!
//! The kernels serve f32 and bf16 on Burn's CPU backend; everywhere else the same functions are composed of Burn's
//! operations, and there Burn's autodiff keeps what it needs.

mod composed;
#[cfg(feature = "flex")]
pub(crate) mod cpu;
#[cfg(test)]
mod tests;
mod visible;

use burn::tensor::Tensor;

pub use visible::Visible;

#[cfg(feature = "flex")]
use crate::tensor::row;
use crate::tensor::{self, cleared, constant, is_empty};

/// The product with a frozen dense weight, `y = x·W`, in the dtype of both: a head, say, that is not adapted.
///
/// `x` is of any shape `[…, d_in]`, `weight` `[d_in, d_out]`, row-major or the transpose of such a one, of which no copy is
/// made. A weight that requires a gradient gets it, by Burn's own product.
///
/// # Panics
///
/// If the last dimension of `x` is not `d_in`.
pub fn frozen_linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>) -> Tensor<D> {
    assert_eq!(
        x.dims()[D - 1],
        weight.dims()[0],
        "inner dimensions of x and the weight"
    );
    #[cfg(feature = "flex")]
    if D > 1
        && cpu::serves(&x)
        && cpu::serves(&weight)
        && x.dtype() == weight.dtype()
        && !weight.is_tracked()
    {
        return cpu::frozen_linear(x, weight);
    }
    linear(x, weight, None)
}

/// `x·W + b` over the last axis of `x`, of which any side may be zero: a layer without an adapter.
///
/// Where a few rows are asked for and no gradients, as one token at a time is, the weight is read once and nothing else: Burn's product
/// copies it. In training this is Burn's own.
pub(crate) fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if cpu::are_few_rows(&x, &weight) && x.dims()[D - 1] == weight.dims()[0] {
        let y = cpu::frozen_linear(x, weight);
        return match bias {
            Some(bias) => y + row(bias),
            None => y,
        };
    }
    tensor::linear(x, weight, bias)
}

/// `x·W + s·(x·A)·B` of a weight that requires no gradient, if there is a kernel for it.
///
/// `weight` is `[d_in, d_out]`, `a` `[d_in, r]`, `b` `[r, d_out]`. Without the factors' part, the result is that of Burn's
/// `linear` to the bit.
pub(crate) fn lora_linear<const D: usize>(
    x: &Tensor<D>,
    weight: &Tensor<2>,
    [a, b]: [&Tensor<2>; 2],
    scale: f64,
) -> Option<Tensor<D>> {
    #[cfg(feature = "flex")]
    if D > 1
        && cpu::serves(x)
        && cpu::serves(weight)
        && x.dtype() == weight.dtype()
        && !weight.is_tracked()
        && [a, b]
            .iter()
            .all(|t| cpu::serves(t) && t.dtype() == burn::tensor::DType::F32)
    {
        let factors = [a.clone(), b.clone()];
        return Some(cpu::lora_linear(x.clone(), weight.clone(), factors, scale));
    }
    #[cfg(not(feature = "flex"))]
    let _ = (x, weight, a, b, scale);
    None
}

/// The gate of a feed-forward network: `y = silu(gate) · up`, `silu(z) = z / (1 + e^−z)`, element by element.
///
/// Source: N. Shazeer, "GLU variants improve transformer", <https://arxiv.org/abs/2002.05202>.
///
/// # Panics
///
/// If the shapes differ.
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    assert_eq!(gate.dims(), up.dims(), "shapes of gate and up");
    #[cfg(feature = "flex")]
    if cpu::serves(&gate) && cpu::serves(&up) && gate.dtype() == up.dtype() {
        return cpu::swiglu(gate, up);
    }
    composed::swiglu(gate, up)
}

/// `y = gamma · x / √(mean(x²) + epsilon)`, the mean over the last dimension.
///
/// `x` is of any shape `[…, n]`, `gamma` `[n]` of the same dtype.
///
/// Source: B. Zhang, R. Sennrich, "Root mean square layer normalization", <https://arxiv.org/abs/1910.07467>.
///
/// # Panics
///
/// If `gamma` is not of the last dimension.
pub fn rms_norm<const D: usize>(x: Tensor<D>, gamma: Tensor<1>, epsilon: f64) -> Tensor<D> {
    assert_eq!([x.dims()[D - 1]], gamma.dims(), "length of gamma");
    #[cfg(feature = "flex")]
    if cpu::serves(&x) && cpu::serves(&gamma) && x.dtype() == gamma.dtype() {
        return cpu::rms_norm(x, gamma, epsilon);
    }
    composed::rms_norm(x, gamma, epsilon)
}

/// The rotary position embedding of queries or keys, in the half-split form of Hugging Face.
///
/// A head of width `d` is split into `x1 = x[..d/2]` and `x2 = x[d/2..]`, and
///
/// ```text
/// y1 = x1·cos − x2·sin        y2 = x2·cos + x1·sin
/// ```
///
/// # Shapes
///
/// - `x`: `[batch, heads, seq, d]`
/// - `cos`, `sin`: `[batch or 1, 1, seq, d / 2]`, f32; no gradient flows to them
///
/// Source: J. Su et al., "RoFormer", <https://arxiv.org/abs/2104.09864>, which rotates neighbouring pairs instead.
///
/// # Panics
///
/// If the shapes do not fit.
pub fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>) -> Tensor<4> {
    let [batch, _, seq, width] = x.dims();
    let rows = cos.dims()[0];
    assert!(
        width.is_multiple_of(2) && (rows == 1 || rows == batch),
        "cos of {:?} for x of {:?}",
        cos.dims(),
        x.dims()
    );
    assert_eq!(cos.dims(), [rows, 1, seq, width / 2], "shape of cos");
    assert_eq!(cos.dims(), sin.dims(), "shapes of cos and sin");
    let [cos, sin] = [cos, sin].map(constant);
    #[cfg(feature = "flex")]
    if cpu::serves(&x)
        && [&cos, &sin]
            .iter()
            .all(|t| cpu::serves(t) && t.dtype() == burn::tensor::DType::F32)
    {
        return cpu::rotate(x, cos, sin);
    }
    composed::rotate(x, cos, sin)
}

/// Grouped-query attention, `softmax(scale · Q·Kᵀ)·V`, the softmax over the keys that a query sees.
///
/// Groups of `heads / kv_heads` query heads share one head of keys and values. A query that sees no key gives zeros.
///
/// # Shapes
///
/// - `q`: `[batch, heads, queries, d]`
/// - `k`, `v`: `[batch, kv_heads, keys, d]`
/// - the result: as `q`
///
/// Sources: A. Vaswani et al., <https://arxiv.org/abs/1706.03762>; J. Ainslie et al., "GQA",
/// <https://arxiv.org/abs/2305.13245>; that scores are computed again in backward: T. Dao et al., "FlashAttention",
/// <https://arxiv.org/abs/2205.14135>.
///
/// # Panics
///
/// If the shapes do not fit each other or `visible`.
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    visible: &Visible,
    scale: f64,
) -> Tensor<4> {
    let [batch, heads, queries, d] = q.dims();
    let [_, kv_heads, keys, _] = k.dims();
    assert_eq!(k.dims(), [batch, kv_heads, keys, d], "shape of k");
    assert_eq!(v.dims(), k.dims(), "shapes of k and v");
    assert!(
        kv_heads > 0 && heads.is_multiple_of(kv_heads),
        "{heads} heads, {kv_heads} of keys and values"
    );
    assert_eq!(
        [visible.queries(), visible.keys()],
        [queries, keys],
        "queries and keys of `visible`"
    );
    assert!(
        visible.rows() == 1 || visible.rows() == batch,
        "`visible` of {} rows, batch of {batch}",
        visible.rows()
    );
    if is_empty(&q) || is_empty(&k) {
        return of_nothing(q, [k, v]);
    }
    #[cfg(feature = "flex")]
    if [&q, &k, &v]
        .iter()
        .all(|t| cpu::serves(t) && t.dtype() == q.dtype())
    {
        return cpu::attention(q, k, v, visible.clone(), scale);
    }
    composed::attention(q, k, v, visible, scale)
}

/// Attention without a query, a key or a feature: zeros, if there is room for any, and gradients that are zero.
fn of_nothing(q: Tensor<4>, keys_and_values: [Tensor<4>; 2]) -> Tensor<4> {
    let sums = keys_and_values
        .into_iter()
        .filter(Tensor::is_tracked)
        .map(|tensor| tensor.sum_dim(2).sum_dim(1));
    sums.fold(cleared(q), |y, sum| y + sum)
}

/// The sum of `−log softmax(logits[row])[label]` over `labels`, which are `(row, label)` in ascending order of rows:
/// `[rows, vocab] -> [1]`, in f32 (f64 for f64 logits).
pub(crate) fn cross_entropy(logits: Tensor<2>, labels: Vec<(usize, usize)>) -> Tensor<1> {
    if labels.is_empty() {
        return cleared(composed::widened(logits)).sum();
    }
    #[cfg(feature = "flex")]
    if cpu::serves(&logits) {
        return cpu::cross_entropy(logits, labels);
    }
    composed::cross_entropy(logits, &labels)
}
