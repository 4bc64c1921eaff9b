//! The one word at a call site: a forward that sees what is attached to a layer's weight.

use burn::nn::Linear;
use burn::tensor::{Tensor, assert_shape, module::linear};

use super::weight::PeftWeight;
use crate::adapter::FrozenMap;
use crate::layer::{DenseMap, weight_dims};

/// A forward pass that runs what is attached to a layer's weight factored and packed.
///
/// `linear.forward_peft(x)` in place of `linear.forward(x)`. Both give the same values; the difference is memory and
/// time. Burn's own `forward` composes the dense effective weight `W + s·A·B` and, in training, keeps it and computes
/// its dense gradient. `forward_peft` computes `x·W + s·((x·A)·B)` and keeps the packed weight, `x` and `[rows, r]` values.
///
/// A layer with nothing attached behaves as `forward`; one with an adapter of Burn's own
/// [`apply_lora`](burn::module::Module::apply_lora) runs factored too. Dropout of an adapter is part of this way only: a
/// composed weight has no input to drop.
pub trait PeftForward {
    /// The layer's output.
    ///
    /// # Shapes
    ///
    /// `[..., d_in] -> [..., d_out]`
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `x` is not `d_in`.
    fn forward_peft<const D: usize>(&self, x: Tensor<D>) -> Tensor<D>;
}

impl PeftForward for Linear {
    fn forward_peft<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let bias = || self.bias.as_ref().map(|bias| bias.val());
        if let Some(state) = self.weight.reparameterization::<PeftWeight>() {
            if state.nf4.is_none() && !state.is_changed() {
                // As the base computes it, to the bit: the rows of a batch in one product may round otherwise.
                return linear(x, self.weight.base(), bias());
            }
            let d_in = match &state.nf4 {
                Some(nf4) => nf4.shape()[1],
                None => weight_dims(&self.weight)[0],
            };
            assert_shape!(x, [.., d_in]);
            return state.forward(x, &self.weight, bias());
        }
        if let Some(lora) = self.weight.adapter() {
            let [d_in, _] = weight_dims(&self.weight);
            assert_shape!(x, [.., d_in]);
            let map = DenseMap {
                weight: self.weight.base(),
                bias: bias(),
            };
            return map.apply_low_rank(x, lora.a.val(), lora.b.val(), lora.scale);
        }
        self.forward(x)
    }
}
