//! The one word at a call site: a forward that sees what is attached to a layer's weight.

use burn::nn::Linear;
use burn::tensor::{Tensor, assert_shape, module::linear};

use super::weight::PeftWeight;
use crate::adapter::cast;
use crate::layer::{rows, weight_dims};

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
            let [d_in, d_out] = match &state.nf4 {
                Some(nf4) => [nf4.shape()[1], nf4.shape()[0]],
                None => weight_dims(&self.weight),
            };
            assert_shape!(x, [.., d_in]);
            return rows(x, d_out, |x| state.forward(x, &self.weight, bias()));
        }
        if let Some(lora) = self.weight.adapter() {
            let [d_in, d_out] = weight_dims(&self.weight);
            assert_shape!(x, [.., d_in]);
            return rows(x, d_out, |x| {
                let (a, b) = (lora.a.val(), lora.b.val());
                let y = linear(x.clone(), self.weight.base(), bias());
                let delta = cast(x, a.dtype().into())
                    .matmul(a)
                    .mul_scalar(lora.scale)
                    .matmul(b);
                let dtype = y.dtype().into();
                y + cast(delta, dtype)
            });
        }
        self.forward(x)
    }
}
