//! Deltas: small trainable changes to a frozen linear map.
//!
//! A frozen map `x -> x·W + b`, `x [rows, d_in]`, `W [d_in, d_out]`, becomes `x -> x·W + b + Δ(x)` with a `Δ` of few
//! parameters. Each delta is one file; [`Lora`] is `Δ(x) = s·((drop(x)·A)·B)`.

mod lora;

pub(crate) use lora::cast;
pub use lora::{Lora, LoraConfig, LoraInit};

use burn::module::Module;
use burn::tensor::Tensor;

/// The frozen map that a delta changes: `x -> x·W + b`.
pub trait FrozenMap {
    /// `[rows, d_in] -> [rows, d_out]`, in the dtype of `x`.
    fn apply(&self, x: Tensor<2>) -> Tensor<2>;

    /// The map with a low-rank change of its weight, `x·(W + s·A·B) + b`: `A [d_in, r]`, `B [r, d_out]`.
    ///
    /// `[rows, d_in] -> [rows, d_out]`, in the dtype of `x`; the low-rank part is computed in the dtype of its factors.
    fn apply_low_rank(&self, x: Tensor<2>, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<2> {
        by_parts(self, x, a, b, scale)
    }
}

/// [`FrozenMap::apply_low_rank`] of any map: the output of the low-rank part is added to the map's.
pub(crate) fn by_parts(
    map: &(impl FrozenMap + ?Sized),
    x: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Tensor<2> {
    let y = map.apply(x.clone());
    let dtype = y.dtype().into();
    // The scale goes to the [rows, r] product, the smallest of the three.
    let u = cast(x, a.dtype().into()).matmul(a).mul_scalar(scale);
    y + cast(u.matmul(b), dtype)
}

/// A trainable change to a frozen linear map.
pub trait Delta: Module {
    /// The changed map: `[rows, d_in] -> [rows, d_out]`, in the dtype that the frozen map gives.
    fn forward(&self, x: Tensor<2>, base: &impl FrozenMap) -> Tensor<2>;

    /// The weight of the changed map for the weight `[d_in, d_out]` of the frozen one, both f32.
    ///
    /// Forms the dense change; used to merge, never in training.
    fn merge(&self, weight: Tensor<2>) -> Tensor<2>;
}
