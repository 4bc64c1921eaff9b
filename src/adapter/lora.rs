//! LoRA, low-rank adaptation: `Δ(x) = s·((drop(x)·A)·B)`.
//!
//! `x [rows, d_in]` the input of the frozen map, `A [d_in, r]` and `B [r, d_out]` the trainable factors of rank `r`,
//! `drop` dropout on the adapter's input only, `s = α/r`, or `α/√r` for rsLoRA. The product `A·B` is formed by a merge
//! only.
//!
//! Sources: LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732.

use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::{FloatDType, Tensor};

use super::folded::InitialFactors;
use super::frozen_layer::gain;
use super::{Delta, FrozenMap, LoraConfig, Slices, dora, low_rank};
use crate::tensor::{cast, matmul};
use crate::{PeftError, Result};

/// The trainable factors of a low-rank change `Δ(x) = s·((drop(x)·A)·B)`, with `s = α/r`, or `α/√r` for rsLoRA.
///
/// With a magnitude `m` it is DoRA: the weight becomes `m ∘ (W + s·A·B) / n`, `n` the norms of the columns of `W + s·A·B`, a
/// constant for the gradient that every forward pass computes anew (for answers alone, merge). Where dropout is active, `x` is dropped for all that differs from the frozen map, as in PEFT.
///
/// Sources: [LoRA](https://arxiv.org/abs/2106.09685), [rsLoRA](https://arxiv.org/abs/2312.03732),
/// [DoRA](https://arxiv.org/abs/2402.09353).
///
/// # Memory
///
/// `r·(d_in + d_out)` values. A forward under autodiff keeps its input (unless `A` is frozen) and `[rows, r]` values; DoRA
/// has `d_out` values more, and keeps the output before it is scaled.
#[derive(Module, Debug)]
pub struct Lora {
    /// `A`, of shape `[d_in, r]`; with `k` chosen slices of the outputs, `[d_in, k·r]`.
    pub a: Param<Tensor<2>>,
    /// `B`, of shape `[r, d_out]`; with slices, `[r, Σ n_i]`, the sum of their widths.
    pub b: Param<Tensor<2>>,
    /// DoRA's magnitude `m [d_out]`; a plain LoRA has none.
    pub magnitude: Option<Param<Tensor<1>>>,
    /// The bias `β [d_out]` of the factor `B`, with [`LoraConfig::bias`].
    pub bias: Option<Param<Tensor<1>>>,
    /// The initial factors that are left out of the change, if there are any.
    pub initial: Option<InitialFactors>,
    /// Dropout on the adapter's input; off in `valid()` and when frozen.
    pub dropout: Dropout,
    pub(super) alpha: f64,
    pub(super) rslora: bool,
    #[module(skip)]
    pub(super) slices: Slices,
    pub(super) freeze_a: bool,
}

impl Lora {
    /// DoRA of these factors: the norms of the changed weight's columns become `magnitude [d_out]`.
    ///
    /// # Errors
    ///
    /// [`PeftError::Shape`] for another shape.
    pub fn with_magnitude(mut self, magnitude: Tensor<1>) -> Result<Self> {
        let [_, d_out] = self.dims();
        if magnitude.dims() != [d_out] {
            return Err(PeftError::Shape {
                tensor: "magnitude".into(),
                expected: [d_out].into(),
                found: magnitude.dims().into(),
            });
        }
        self.magnitude = Some(Param::from_tensor(magnitude.detach()));
        Ok(self)
    }

    /// Adds a bias `[d_out]` of the factor `B`, which the scale multiplies as it does `B`.
    ///
    /// # Errors
    ///
    /// [`PeftError::Shape`] for another shape.
    pub fn with_bias(mut self, bias: Tensor<1>) -> Result<Self> {
        let [_, d_out] = self.dims();
        if bias.dims() != [d_out] {
            return Err(PeftError::Shape {
                tensor: "bias of B".into(),
                expected: [d_out].into(),
                found: bias.dims().into(),
            });
        }
        self.bias = Some(Param::from_tensor(bias.detach()));
        Ok(self)
    }

    /// The same with its `A` kept as it is, or trained again: [`LoraConfig::freeze_a`] for an adapter that is there already. In a
    /// model, [`swap_adapter`](crate::model::PeftModel::swap_adapter) puts it back.
    pub fn with_frozen_a(mut self, frozen: bool) -> Self {
        let trains = self.b.is_require_grad();
        self.freeze_a = frozen;
        self.a = self.a.set_require_grad(trains && !frozen);
        self
    }

    /// These values as new values of `other`'s parameters, where they have its shapes.
    pub(crate) fn with_ids_of(mut self, other: &Self) -> Self {
        take_id(&mut self.a, &other.a);
        take_id(&mut self.b, &other.b);
        for (value, other) in [
            (&mut self.magnitude, &other.magnitude),
            (&mut self.bias, &other.bias),
        ] {
            if let (Some(value), Some(other)) = (value, other) {
                take_id(value, other);
            }
        }
        self
    }

    /// Rank `r`, that of each slice.
    pub fn rank(&self) -> usize {
        self.b.lazy_shape()[0]
    }

    /// `[d_in, d_out]` of the map.
    pub fn dims(&self) -> [usize; 2] {
        let kept = self.b.lazy_shape()[1];
        let d_out = self.slices.d_out(kept).expect("checked with the factors");
        [self.a.lazy_shape()[0], d_out]
    }

    /// How many columns of `B` each slice has.
    #[cfg(all(feature = "faer", feature = "optim"))]
    pub(crate) fn slice_widths(&self) -> Vec<usize> {
        let [_, d_out] = self.dims();
        let ranges = self.slices.ranges(d_out).expect("checked with the factors");
        ranges.iter().map(ExactSizeIterator::len).collect()
    }

    /// The scale `s`: `α/r`, or `α/√r` for rsLoRA.
    pub fn scale(&self) -> f64 {
        let rank = self.rank() as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// The configuration of this adapter; the initialisation, which leaves no trace, is the default one.
    pub fn config(&self) -> LoraConfig {
        LoraConfig::new(self.rank())
            .with_alpha(self.alpha)
            .with_dropout(self.dropout.prob)
            .with_rslora(self.rslora)
            .with_dora(self.magnitude.is_some())
            .with_bias(self.bias.is_some())
            .with_dtype(self.a.val().dtype().into())
            .with_slices(self.slices.clone())
            .with_freeze_a(self.freeze_a)
    }

    /// `Δ(x)`, of the factors alone: `[..., d_in] -> [..., d_out]`, in their dtype.
    pub fn delta<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let x = self.dropout.forward(x);
        let (a, b) = self.factors();
        self.shifted(low_rank(x, a, b, self.scale()), 1.0)
    }

    /// The dense change `s·A·B`, less the initial product if there is one, `[d_in, d_out]`, in f32.
    pub fn delta_weight(&self) -> Tensor<2> {
        if let (Some(count), None) = (self.slices.all_equal(), &self.initial) {
            return self.delta_of_slices(count);
        }
        let (a, b) = self.factors();
        let [a, b] = [a, b].map(|factor| cast(factor, FloatDType::F32));
        matmul(a, b).mul_scalar(self.scale())
    }
}

impl Lora {
    /// The dense change of `count` equal slices that all have one, as as many products: spread, `B` would be zero for the most
    /// part.
    fn delta_of_slices(&self, count: usize) -> Tensor<2> {
        let [a, b] = [&self.a, &self.b].map(|factor| cast(factor.val(), FloatDType::F32));
        let ([d_in, _], [rank, d_out]) = (a.dims(), b.dims());
        let a = a.reshape([d_in, count, rank]).swap_dims(0, 1);
        let b = b.reshape([rank, count, d_out / count]).swap_dims(0, 1);
        let products = a.matmul(b).mul_scalar(self.scale());
        products.swap_dims(0, 1).reshape([d_in, d_out])
    }

    /// Whether dropout acts on this input, as `Dropout` itself decides.
    pub(crate) fn drops<const D: usize>(&self, x: &Tensor<D>) -> bool {
        self.dropout.prob > 0.0 && self.dropout.training.is_enabled() && x.device().is_autodiff()
    }

    /// `s·β`, what a bias of `B` adds to every output.
    pub(crate) fn shift(&self) -> Option<Tensor<1>> {
        let bias = self.bias.as_ref()?;
        Some(bias.val().mul_scalar(self.scale()))
    }

    /// `y [.., d_out]` with `weight` times the bias of `B`, if there is one.
    pub(crate) fn shifted<const D: usize>(&self, y: Tensor<D>, weight: f64) -> Tensor<D> {
        match self.shift() {
            None => y,
            Some(shift) => {
                let shift = cast(shift.mul_scalar(weight), y.dtype().into());
                y + shift.unsqueeze()
            }
        }
    }

    /// What it adds to the frozen map's output `y` for `x`, in the dtype of `y`.
    pub(super) fn change<const D: usize>(
        &self,
        x: Tensor<D>,
        y: &Tensor<D>,
        base: &impl FrozenMap,
    ) -> Tensor<D> {
        match &self.magnitude {
            None => cast(self.delta(x), y.dtype().into()),
            Some(magnitude) if self.drops(&x) => {
                let x = self.dropout.forward(x);
                self.rescaled(x.clone(), magnitude, base) - base.apply(x)
            }
            Some(magnitude) => self.rescaled(x, magnitude, base) - y.clone(),
        }
    }

    /// DoRA's map without dropout.
    fn rescaled<const D: usize>(
        &self,
        x: Tensor<D>,
        magnitude: &Param<Tensor<1>>,
        base: &impl FrozenMap,
    ) -> Tensor<D> {
        let ((a, b), scale) = (self.factors(), self.scale());
        let norms = base.column_norms(a.clone(), b.clone(), scale);
        let gain = gain(magnitude, norms);
        base.apply_scaled(x, a, b, scale, gain)
    }
}

impl Delta for Lora {
    fn forward<const D: usize>(&self, x: Tensor<D>, base: &impl FrozenMap) -> Tensor<D> {
        match &self.magnitude {
            _ if self.drops(&x) => {
                let y = base.apply(x.clone());
                let change = self.change(x, &y, base);
                y + change
            }
            None => {
                let (a, b) = self.factors();
                self.shifted(base.apply_low_rank(x, a, b, self.scale()), 1.0)
            }
            Some(magnitude) => self.rescaled(x, magnitude, base),
        }
    }

    fn merge(&self, weight: Tensor<2>) -> Tensor<2> {
        let weight = weight + self.delta_weight();
        match &self.magnitude {
            None => weight,
            Some(magnitude) => dora::rescale(weight, magnitude.val()),
        }
    }

    fn merge_bias(&self, bias: Option<Tensor<1>>) -> Option<Tensor<1>> {
        match (bias, self.shift()) {
            (Some(bias), Some(shift)) => {
                let shift = cast(shift, bias.dtype().into());
                Some(bias + shift)
            }
            (bias, shift) => bias.or(shift),
        }
    }
}

/// Gives a value the id of `other`, where it has its shape.
pub(super) fn take_id<const D: usize>(value: &mut Param<Tensor<D>>, other: &Param<Tensor<D>>) {
    if value.lazy_shape() == other.lazy_shape() {
        *value = Param::initialized(other.id, value.val());
    }
}
