//! The fused operations on a CPU.
//!
//! * [`ops`]: operations of Burn's backend, with their backward; [`flex`]: its tensors in and out;
//! * [`swiglu`](mod@swiglu), [`rms_norm`](mod@rms_norm), [`rotate`](mod@rotate), [`attention`](mod@attention),
//!   [`cross_entropy`](mod@cross_entropy): the kernels, over [`element`];
//! * [`head`]: a head with its log-probabilities, over a weight of any kind, for [`crate::head`]; [`log_probs`]: those of rows whose logits
//!   come in chunks;
//! * [`linear`](mod@linear): products with a frozen dense weight.
#![allow(unsafe_code)]
// `backend_extension` checks the features of this crate and of Burn in what it generates.
#![allow(unexpected_cfgs)]

mod attention;
mod cross_entropy;
mod element;
mod flex;
pub(crate) mod head;
mod heads;
mod linear;
pub(crate) mod log_probs;
mod ops;
mod rms_norm;
mod rotate;
mod swiglu;

use burn::backend::{Dispatch, DispatchTensorKind};
use burn::tensor::{DType, Tensor};

use super::Visible;
use crate::cpu::matmul::few_rows;
use ops::FusedOps;

/// Whether the kernels here are for this tensor.
pub(crate) fn serves<const D: usize>(tensor: &Tensor<D>) -> bool {
    fn on_flex(kind: &DispatchTensorKind) -> bool {
        match kind {
            DispatchTensorKind::Flex(_) => true,
            DispatchTensorKind::Autodiff(inner) => on_flex(inner),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }
    matches!(tensor.dtype(), DType::F32 | DType::BF16)
        && tensor.shape().num_elements() > 0
        && on_flex(&tensor.clone().into_dispatch().kind)
}

/// Whether a product of these is one of a few rows, which no gradient is asked of.
pub(super) fn are_few_rows<const D: usize>(x: &Tensor<D>, weight: &Tensor<2>) -> bool {
    let on_flex = |kind: &DispatchTensorKind| matches!(kind, DispatchTensorKind::Flex(_));
    D > 1
        && x.dtype() == weight.dtype()
        && x.shape().num_elements() <= few_rows::MOST * x.dims()[D - 1]
        && serves(x)
        && serves(weight)
        && on_flex(&x.clone().into_dispatch().kind)
        && on_flex(&weight.clone().into_dispatch().kind)
}

/// `x · W`, of a weight `[d_in, d_out]` that requires no gradient.
pub(super) fn frozen_linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>) -> Tensor<D> {
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_frozen_linear(x, weight))
}

/// `x · W + scale · (x · A) · B`, of a weight `[d_in, d_out]` that requires no gradient.
pub(super) fn lora_linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    [a, b]: [Tensor<2>; 2],
    scale: f64,
) -> Tensor<D> {
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    let (a, b) = (a.into_dispatch(), b.into_dispatch());
    let y = <Dispatch as FusedOps>::fused_lora_linear(x, weight, a, b, scale);
    Tensor::from_dispatch(y)
}

pub(super) fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    let y = <Dispatch as FusedOps>::fused_swiglu(gate.into_dispatch(), up.into_dispatch());
    Tensor::from_dispatch(y)
}

pub(super) fn rms_norm<const D: usize>(x: Tensor<D>, gamma: Tensor<1>, epsilon: f64) -> Tensor<D> {
    let (x, gamma) = (x.into_dispatch(), gamma.into_dispatch());
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_rms_norm(x, gamma, epsilon))
}

pub(super) fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>) -> Tensor<4> {
    let [x, cos, sin] = [x, cos, sin].map(Tensor::into_dispatch);
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_rotate(x, cos, sin))
}

pub(super) fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    visible: Visible,
    scale: f64,
) -> Tensor<4> {
    let [q, k, v] = [q, k, v].map(Tensor::into_dispatch);
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_attention(
        q, k, v, visible, scale,
    ))
}

/// The sum of `−log softmax(logits[row])[label]` over `labels`, `(row, label)` in ascending order of rows.
pub(crate) fn cross_entropy(logits: Tensor<2>, labels: Vec<(usize, usize)>) -> Tensor<1> {
    let loss = <Dispatch as FusedOps>::fused_cross_entropy(logits.into_dispatch(), labels);
    Tensor::from_dispatch(loss)
}
