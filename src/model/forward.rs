//! The one word at a call site: a forward that sees what is attached to a layer's weight.

use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Embedding, Linear};
use burn::tensor::{Int, Tensor, assert_shape};

use super::active::Active;
use super::weight::{PeftWeight, composed_value};
use crate::adapter::{Change, FrozenLayer, FrozenMap, cast, layer_rows, layer_sum};
use crate::fused::{frozen_linear, linear};
use crate::layer::{Conv, ConvLayer, DenseMap, EmbeddingLayer, weight_dims};

/// A forward pass that runs what is attached to a layer's weight factored and packed.
///
/// `linear.forward_peft(x)` in place of `linear.forward(x)`, and the same for `Embedding`, `Conv1d` and `Conv2d`. Both give the
/// same values; the difference is memory and time. Burn's own `forward` composes the dense effective weight `W + s·A·B` and, in
/// training, keeps it and computes its dense gradient. `forward_peft` computes `x·W + s·((x·A)·B)` and keeps the packed weight,
/// `x` and `[rows, r]` values.
///
/// A layer with nothing attached behaves as `forward`; one with an adapter of Burn's own
/// [`apply_lora`](burn::module::Module::apply_lora) runs factored too. Dropout of an adapter is part of this way only: a
/// composed weight has no input to drop. (Dropout does not act on tokens.)
///
/// # Shapes
///
/// | layer | input | output |
/// |---|---|---|
/// | `Linear` | `[..., d_in]` | `[..., d_out]` |
/// | `Embedding` | tokens `[batch, length]` | `[batch, length, features]` |
/// | `Conv1d` | `[batch, channels_in, length]` | `[batch, channels_out, length']` |
/// | `Conv2d` | `[batch, channels_in, height, width]` | `[batch, channels_out, height', width']` |
pub trait PeftForward<Input> {
    /// What comes out.
    type Output;

    /// The layer's output.
    ///
    /// # Panics
    ///
    /// Panics as Burn's `forward` does where the input does not fit the layer, and for a batch of another size than the rows that
    /// [`with_adapter_rows`](super::PeftModel::with_adapter_rows) gave adapters.
    fn forward_peft(&self, x: Input) -> Self::Output;
}

impl<const D: usize> PeftForward<Tensor<D>> for Linear {
    type Output = Tensor<D>;

    fn forward_peft(&self, x: Tensor<D>) -> Tensor<D> {
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
        let weight = self.weight.val();
        let [d_in, _] = weight.dims();
        assert_shape!(x, [.., d_in]);
        linear(x, weight, bias())
    }
}

impl PeftForward<Tensor<2, Int>> for Embedding {
    type Output = Tensor<3>;

    fn forward_peft(&self, x: Tensor<2, Int>) -> Tensor<3> {
        let state = match self.weight.reparameterization::<PeftWeight>() {
            Some(state) if state.is_changed() => state,
            _ => return self.forward(x),
        };
        let base = self.weight.base();
        let dtype = state.effective_dtype(base.dtype());
        let old = state.frozen_values(base.clone());
        let layer = EmbeddingLayer {
            weight: state.whole_values(base),
        };
        let y = run(state, &layer, x.clone(), x.dims()[0], None);
        let changes = state.in_use().unwrap_or_default();
        let mut parts = changes.iter().filter(|(change, _)| !change.is_base());
        // Rows of one adapter alone are looked up as they are: `E + (R - E)` is not `R` in every dtype.
        let alone = matches!(parts.next(), Some((Change::Rows(_), 1.0))) && parts.next().is_none();
        let y = changes
            .into_iter()
            .fold(y, |y, (change, factor)| match change {
                Change::Rows(rows) if alone => rows.lookup(x.clone(), y, &old),
                Change::Rows(rows) => {
                    let change = rows.change(x.clone(), &old).mul_scalar(factor);
                    let change = cast(change, y.dtype().into());
                    y + change
                }
                _ => y,
            });
        cast(y, dtype)
    }
}

impl PeftForward<Tensor<3>> for Conv1d {
    type Output = Tensor<3>;

    fn forward_peft(&self, x: Tensor<3>) -> Tensor<3> {
        convolution(self, x, Conv1d::forward)
    }
}

impl PeftForward<Tensor<4>> for Conv2d {
    type Output = Tensor<4>;

    fn forward_peft(&self, x: Tensor<4>) -> Tensor<4> {
        convolution(self, x, Conv2d::forward)
    }
}

fn convolution<const D: usize, C: Conv<D>>(
    conv: &C,
    x: Tensor<D>,
    forward: fn(&C, Tensor<D>) -> Tensor<D>,
) -> Tensor<D> {
    let state = conv.weight().reparameterization::<PeftWeight>();
    if let Some(state) = state {
        state.note_groups(conv.groups());
    }
    match state {
        Some(state) if state.is_changed() && !state.has_trained_copy() => {
            let weight = state.whole_values(conv.weight().base());
            let batch = x.dims()[0];
            let layer = ConvLayer { conv, weight };
            run(state, &layer, x, batch, conv.bias())
        }
        Some(_) => forward(&conv.with_weight(composed_value(conv.weight())), x),
        None => forward(conv, x),
    }
}

fn run<const D: usize, L: FrozenLayer<D>>(
    state: &PeftWeight,
    layer: &L,
    x: L::Input,
    batch: usize,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    state.read_factored();
    match &state.active {
        Active::Sum(_) => layer_sum(layer, x, &state.loras(), bias),
        Active::Rows(_) => layer_rows(layer, x, &state.row_groups(batch), bias),
    }
}

/// The output head of a model that shares the weight of the embedding, transposed.
pub trait TiedHead {
    /// `x·Eᵀ` with `E [vocabulary, features]` as adapters change it: `[..., features] -> [..., vocabulary]`.
    ///
    /// `embedding.attend_peft(x)` in place of `x.matmul(embedding.weight.val().transpose())`. It never forms the changed `E`, nor the
    /// gradient of a frozen one: of a LoRA it computes `x·Eᵀ + s·(x·Bᵀ)·Aᵀ`. And it knows that it is the head: what an adapter changes
    /// in the lookup alone, as LoRA on the embedding without
    /// [`ensure_weight_tying`](super::PeftConfig::ensure_weight_tying) does in PEFT too, is not in its `E`, and what an adapter changes in
    /// the head alone is.
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `x` is not that of the features, and while the rows of a batch have adapters of their own that change
    /// the lookup and the head alike.
    fn attend_peft<const D: usize>(&self, x: Tensor<D>) -> Tensor<D>;
}

impl TiedHead for Embedding {
    fn attend_peft<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self.weight.reparameterization::<PeftWeight>() {
            Some(state) => state.attend(x, self.weight.base()),
            None => frozen_linear(x, self.weight.val().transpose()),
        }
    }
}
