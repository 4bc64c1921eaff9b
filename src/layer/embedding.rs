//! An embedding as a frozen layer: `f(t; E) = E[t]`, `E [tokens, features]`.

use burn::tensor::{Int, Tensor, module::embedding};

use super::base::DenseMap;
use crate::adapter::{FrozenLayer, FrozenMap, Lora, cast};
use crate::tensor::linear;

/// The rows of a dense `E` that tokens name.
pub(crate) struct EmbeddingLayer {
    pub weight: Tensor<2>,
}

impl FrozenLayer<3> for EmbeddingLayer {
    type Input = Tensor<2, Int>;

    fn apply(&self, x: Tensor<2, Int>) -> Tensor<3> {
        embedding(self.weight.clone(), x)
    }

    fn low_rank(&self, x: Tensor<2, Int>, a: Tensor<2>, b: Tensor<2>) -> Tensor<3> {
        linear(embedding(a, x), b, None)
    }

    /// Tokens cannot be dropped; PEFT's dropout does not act here either.
    fn dropped(&self, _x: &Tensor<2, Int>, _lora: &Lora) -> Option<Tensor<2, Int>> {
        None
    }

    fn column_norms(&self, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<1> {
        let (weight, bias) = (self.weight.clone(), None);
        DenseMap { weight, bias }.column_norms(a, b, scale)
    }

    fn along_outputs(&self, values: Tensor<1>) -> Tensor<3> {
        values.unsqueeze()
    }

    fn rows(x: &Tensor<2, Int>, rows: Tensor<1, Int>) -> Tensor<2, Int> {
        x.clone().select(0, rows)
    }
}

/// `x·(E + s·A·B)ᵀ` without that sum: `[..., features] -> [..., tokens]`, in the dtype of `x`.
pub(crate) fn attend_low_rank<const D: usize>(
    x: &Tensor<D>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Tensor<D> {
    let dtype = x.dtype().into();
    let x = cast(x.clone(), a.dtype().into());
    let low = linear(x, b.transpose(), None).mul_scalar(scale);
    cast(linear(low, a.transpose(), None), dtype)
}
