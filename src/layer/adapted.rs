//! A frozen base and a trainable delta as one layer: `y = x·W + b + Δ(x)`.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{FloatDType, Tensor, assert_shape};

use super::base::FrozenLinear;
use super::nf4_linear::Nf4Linear;
use crate::Result;
use crate::adapter::{Delta, Lora, LoraConfig, cast};
use crate::nf4::{Nf4Config, Nf4Weight};

/// A dense frozen [`Linear`] with a LoRA: `y = x·W + b + s·((drop(x)·A)·B)`.
pub type LoraLinear = Adapted<Linear, Lora>;

/// A packed frozen [`Nf4Linear`] with a LoRA: `y = x·deq(W)ᵀ + b + s·((drop(x)·A)·B)`.
pub type QLoraLinear = Adapted<Nf4Linear, Lora>;

/// A frozen base and a trainable delta.
///
/// The base's parameters require no gradient, also after `valid()` and `train()`. Calling Burn's `unfreeze()` on a model
/// enables its every float parameter, a dense base among them (a packed one has none).
#[derive(Module, Debug)]
pub struct Adapted<B: Module, D: Module> {
    /// The frozen base.
    pub base: B,
    /// The trainable change.
    pub delta: D,
}

/// What merging did to the numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MergeReport {
    /// The largest absolute change made to a merged weight by the cast from f32 to the layer's dtype; 0 for f32.
    pub max_cast_error: f32,
}

/// What merging into NF4 left of the change; see [`Adapted::merge_into_nf4`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nf4MergeReport {
    /// The share of the change that survived requantisation: `⟨W' - W, ΔW⟩ / ⟨ΔW, ΔW⟩` with `W'` and `W` the
    /// dequantised weights after and before. 1 is all of it, 0 none; 1 if there was no change to lose.
    pub survived: f32,
    /// `‖W' - (W + ΔW)‖ / ‖ΔW‖`, Frobenius: the error made in units of the change; 0 if there was no change.
    pub relative_error: f32,
}

impl LoraLinear {
    /// Freezes a dense layer and adds a fresh LoRA to it.
    ///
    /// # Errors
    ///
    /// As [`LoraConfig::init_on`].
    pub fn from_linear(linear: Linear, config: &LoraConfig) -> Result<Self> {
        let base = linear.no_grad();
        let device = base.weight.lazy_device();
        let [d_in, d_out] = FrozenLinear::dims(&base);
        let delta = match config.needs_weight() {
            // Without asking for the weight, which may not be there yet.
            false => config.init(d_in, d_out, &device)?,
            true => config.init_on(&base.frozen_map(), [d_in, d_out], &device)?,
        };
        Ok(Self { base, delta })
    }
}

impl QLoraLinear {
    /// Quantises a dense layer to NF4 and adds a fresh LoRA to it.
    ///
    /// # Errors
    ///
    /// As [`LoraConfig::init_on`] and [`Nf4Linear::from_linear`].
    pub fn from_linear(linear: Linear, nf4: &Nf4Config, config: &LoraConfig) -> Result<Self> {
        config.validate()?;
        Self::from_nf4(Nf4Linear::from_linear(linear, nf4)?, config)
    }

    /// Adds a fresh LoRA to a packed layer.
    ///
    /// # Errors
    ///
    /// As [`LoraConfig::init_on`].
    pub fn from_nf4(base: Nf4Linear, config: &LoraConfig) -> Result<Self> {
        let dims = FrozenLinear::dims(&base);
        let delta = config.init_on(&base.frozen_map(), dims, &base.weight.device())?;
        Ok(Self { base, delta })
    }
}

impl<B: FrozenLinear, D: Delta> Adapted<B, D> {
    /// The layer's output.
    ///
    /// # Shapes
    ///
    /// `[..., d_in] -> [..., d_out]`, in the dtype of the base's output.
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `x` is not `d_in`.
    pub fn forward<const N: usize>(&self, x: Tensor<N>) -> Tensor<N> {
        let [d_in, _] = self.base.dims();
        assert_shape!(x, [.., d_in]);
        self.delta.forward(x, &self.base.frozen_map())
    }

    /// One dense layer that computes the same: for an NF4 base, over its dequantised weight.
    ///
    /// The weight is computed in f32 and cast once, to the dtype of the base (of its bias, or f32, for an NF4 base).
    /// The result is frozen.
    pub fn merge(&self) -> (Linear, MergeReport) {
        let exact = self.delta.merge(self.base.dense_weight()).detach();
        let weight = cast(exact.clone(), self.base.dense_dtype());
        let error = (cast(weight.clone(), FloatDType::F32) - exact).abs();
        let report = MergeReport {
            max_cast_error: max(error),
        };
        let linear = Linear {
            weight: Param::from_tensor(weight).set_require_grad(false),
            bias: self.merged_bias(),
        };
        (linear, report)
    }

    fn merged_bias(&self) -> Option<Param<Tensor<1>>> {
        let bias = self.delta.merge_bias(self.base.bias());
        bias.map(|bias| Param::from_tensor(bias.detach()).set_require_grad(false))
    }

    /// Merges and quantises the result to NF4, which keeps little of a small change: see the report.
    ///
    /// A change below about 2 % of `‖W‖` falls between two codes and is lost almost whole; prefer [`merge`](Self::merge)
    /// or an unmerged adapter.
    ///
    /// # Errors
    ///
    /// [`PeftError::NotFinite`](crate::PeftError::NotFinite) if the merged weight is not finite.
    pub fn merge_into_nf4(&self, config: &Nf4Config) -> Result<(Nf4Linear, Nf4MergeReport)> {
        let before = self.base.dense_weight();
        let merged = self.delta.merge(before.clone()).detach();
        let (weight, report) = requantize("weight", before, merged, config)?;
        let bias = self.merged_bias();
        Ok((Nf4Linear { weight, bias }, report))
    }
}

/// Quantises `merged [d_in, d_out]`, which was `before`, both f32, and says what is left of the change.
pub(crate) fn requantize(
    name: &str,
    before: Tensor<2>,
    merged: Tensor<2>,
    config: &Nf4Config,
) -> Result<(Nf4Weight, Nf4MergeReport)> {
    let weight = Nf4Weight::quantize(name, merged.clone(), config)?;
    let after = weight.dequantize(FloatDType::F32).transpose();
    let change = merged.clone() - before.clone();
    let norm = sum(change.clone().powi_scalar(2));
    let report = if norm == 0.0 {
        Nf4MergeReport {
            survived: 1.0,
            relative_error: 0.0,
        }
    } else {
        Nf4MergeReport {
            survived: sum((after.clone() - before) * change) / norm,
            relative_error: (sum((after - merged).powi_scalar(2)) / norm).sqrt(),
        }
    };
    Ok((weight, report))
}

fn max(x: Tensor<2>) -> f32 {
    if x.shape().num_elements() == 0 {
        0.0
    } else {
        x.max().into_scalar::<f32>()
    }
}

fn sum(x: Tensor<2>) -> f32 {
    x.sum().into_scalar::<f32>()
}
