//! Deltas: small trainable changes to a frozen linear map.
//!
//! A frozen map `x -> x·W + b` with `x [rows, d_in]` and `W [d_in, d_out]` becomes `x -> x·W + b + Δ(x)`, where `Δ` has few parameters.
//! [`Lora`] is `Δ(x) = s·((drop(x)·A)·B)`. With a magnitude it is DoRA. [`LoraConfig`] says how one is made.
//!
//! To adapt a whole model, use [`PeftModel`](crate::model::PeftModel). This module is for single layers and for your own initialisations.

mod change;
mod combine;
#[cfg(feature = "faer")]
mod combine_svd;
#[cfg(feature = "faer")]
mod convert;
#[cfg(feature = "faer")]
mod decompose;
pub(crate) mod dora;
#[cfg(feature = "faer")]
mod eva;
mod folded;
mod frozen_layer;
mod init;
mod lora;
mod lora_config;
mod resize;
mod several;
mod slices;
mod trained_copy;
mod trained_rows;

pub(crate) use crate::tensor::cast;
pub use change::Change;
pub use combine::{Combination, MajoritySign};
#[cfg(feature = "faer")]
pub use convert::{DeltaReport, Truncation};
#[cfg(all(feature = "faer", feature = "optim"))]
pub(crate) use decompose::gram_inverse;
#[cfg(feature = "faer")]
pub(crate) use eva::{Directions, share_out};
pub use folded::InitialFactors;
pub(crate) use folded::{converted_alpha, ungrown_alpha};
pub(crate) use frozen_layer::{FrozenLayer, layer_rows, layer_sum};
pub use init::LoraInit;
pub use lora::Lora;
pub use lora_config::LoraConfig;
#[cfg(feature = "faer")]
pub(crate) use several::change_of;
pub(crate) use several::{forward_rows, forward_sum, merge_sum, side_by_side};
pub use slices::Slices;
pub use trained_copy::TrainedCopy;
pub use trained_rows::TrainedRows;

use burn::module::Module;
use burn::tensor::Tensor;

use crate::tensor::linear;

/// The frozen map that a delta changes: `x -> x·W + b`, over the last axis of an input of any rank.
pub trait FrozenMap {
    /// `[..., d_in] -> [..., d_out]`, in the dtype of `x`.
    fn apply<const D: usize>(&self, x: Tensor<D>) -> Tensor<D>;

    /// The map with a low-rank change of its weight, `x·(W + s·A·B) + b`: `A [d_in, r]`, `B [r, d_out]`.
    ///
    /// `[..., d_in] -> [..., d_out]`, in the dtype of `x`; the low-rank part is computed in the dtype of its factors.
    fn apply_low_rank<const D: usize>(
        &self,
        x: Tensor<D>,
        a: Tensor<2>,
        b: Tensor<2>,
        scale: f64,
    ) -> Tensor<D> {
        by_parts(self, x, a, b, scale)
    }

    /// The map with a low-rank change of its weight and scaled outputs, `(x·(W + s·A·B)) ∘ gain + b`: `gain [d_out]`.
    ///
    /// `[..., d_in] -> [..., d_out]`, in the dtype of `x`.
    fn apply_scaled<const D: usize>(
        &self,
        x: Tensor<D>,
        a: Tensor<2>,
        b: Tensor<2>,
        scale: f64,
        gain: Tensor<1>,
    ) -> Tensor<D>;

    /// The norms of the columns of `W + s·A·B`, `[d_out]`, in f32; a constant for the gradient.
    fn column_norms(&self, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<1>;

    /// The dense `W [d_in, d_out]` in f32, without its gradient: for what decomposes it, never in a forward pass.
    fn dense(&self) -> Tensor<2>;
}

/// [`FrozenMap::apply_low_rank`] of any map: the output of the low-rank part is added to the map's.
pub(crate) fn by_parts<const D: usize>(
    map: &(impl FrozenMap + ?Sized),
    x: Tensor<D>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Tensor<D> {
    let y = map.apply(x.clone());
    let dtype = y.dtype().into();
    y + cast(low_rank(x, a, b, scale), dtype)
}

/// `s·(x·A)·B`, in the dtype of the factors. The scale goes to `x·A`, the smallest of the three.
pub(crate) fn low_rank<const D: usize>(
    x: Tensor<D>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Tensor<D> {
    let x = cast(x, a.dtype().into());
    linear(linear(x, a, None).mul_scalar(scale), b, None)
}

/// A trainable change to a frozen linear map.
pub trait Delta: Module {
    /// The changed map: `[..., d_in] -> [..., d_out]`, in the dtype that the frozen map gives.
    fn forward<const D: usize>(&self, x: Tensor<D>, base: &impl FrozenMap) -> Tensor<D>;

    /// The weight of the changed map for the weight `[d_in, d_out]` of the frozen one, both f32.
    ///
    /// Forms the dense change; used to merge, never in training.
    fn merge(&self, weight: Tensor<2>) -> Tensor<2>;

    /// The bias `[d_out]` of the changed map for that of the frozen one.
    fn merge_bias(&self, bias: Option<Tensor<1>>) -> Option<Tensor<1>> {
        bias
    }
}
