//! Adapters that begin at a product other than zero: `W' = W + s·(A·B - A₀·B₀)`.
//!
//! PiSSA and OLoRA train factors of the weight itself. Their papers move `A₀·B₀` out of the base, `W - s·A₀·B₀`; here `W` stays as
//! it is, also packed, and the constant `A₀ [d_in, r]`, `B₀ [r, d_out]` are subtracted beside it. Both are one product of rank
//! `2r`:
//!
//! ```text
//! A·B - A₀·B₀ = [A | A₀]·[B; -B₀]
//! ```
//!
//! which is also the plain LoRA that PEFT converts such an adapter to on saving.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

#[cfg(feature = "faer")]
use super::LoraInit;
use super::{Lora, LoraConfig, Slices, dora};
use crate::{PeftError, Result};

/// The constant factors that an adapter began with and whose product it leaves out.
#[derive(Module, Debug)]
pub struct InitialFactors {
    /// `A₀`, of shape `[d_in, r]`.
    pub a: Param<Tensor<2>>,
    /// `B₀`, of shape `[r, d_out]`.
    pub b: Param<Tensor<2>>,
}

impl Lora {
    /// Leaves the product of `a [d_in, r]` and `b [r, d_out]` out of the change, which becomes `s·(A·B - a·b)`.
    ///
    /// They never train. A forward costs what one of rank `2r` does, and `r·(d_in + d_out)` values more are kept.
    ///
    /// # Errors
    ///
    /// [`PeftError::Shape`] for other shapes than those of `A` and `B`.
    pub fn with_initial(mut self, a: Tensor<2>, b: Tensor<2>) -> Result<Self> {
        for (name, expected, found) in [
            ("initial A", self.a.lazy_shape().dims::<2>(), a.dims()),
            ("initial B", self.b.lazy_shape().dims(), b.dims()),
        ] {
            if found != expected {
                return Err(PeftError::Shape {
                    tensor: name.into(),
                    expected: expected.into(),
                    found: found.into(),
                });
            }
        }
        let [a, b] = [a, b].map(|factor| Param::from_tensor(factor.detach()).no_grad());
        self.initial = Some(InitialFactors { a, b });
        Ok(self)
    }

    /// Leaves out what `init` takes of `weight [d_in, d_out]`, whatever these factors became in training.
    #[cfg(feature = "faer")]
    pub(crate) fn without_part(self, init: LoraInit, weight: &Tensor<2>) -> Result<Self> {
        let a = self.a.val();
        let (rank, scale) = (self.rank(), self.scale());
        let (a0, b0) = super::init::of_weight(init, weight, rank, scale, &a.device())?;
        let [a0, b0] = [a0, b0].map(|factor| super::cast(factor, a.dtype().into()));
        self.with_initial(a0, b0)
    }

    /// The plain adapter of the same change, with the same dropout: of rank `2r` if initial factors are left out, `k·r` with `k`
    /// slices, or both; else itself. Its scale is that of this one, so `α` grows as the rank does, or as its root for rsLoRA.
    pub fn converted(&self) -> Self {
        let times = self.growth();
        if times == 1 && self.slices == Slices::Whole {
            return self.clone();
        }
        let (a, b) = self.factors();
        let param = |factor: Tensor<2>, as_before: &Param<Tensor<2>>| {
            Param::from_tensor(factor.detach()).set_require_grad(as_before.is_require_grad())
        };
        Self {
            a: param(a, &self.a),
            b: param(b, &self.b),
            initial: None,
            alpha: converted_alpha(self.alpha, self.rslora, times),
            slices: Slices::Whole,
            ..self.clone()
        }
    }

    /// How many times the rank it has once it is [converted](Self::converted).
    pub(crate) fn growth(&self) -> usize {
        self.config().growth_of(self.initial.is_some())
    }

    /// The factors of the whole change, `[d_in, r']` and `[r', d_out]`.
    pub(crate) fn factors(&self) -> (Tensor<2>, Tensor<2>) {
        let (a, b) = (self.a.val(), self.slices.spread(self.b.val()));
        let Some(initial) = &self.initial else {
            return (a, b);
        };
        // A constant even where `unfreeze` has reached it: training it as well would train the difference twice.
        let [a0, b0] = [&initial.a, &initial.b].map(|factor| dora::constant(factor.val()));
        let b0 = self.slices.spread(b0);
        (Tensor::cat(vec![a, a0], 1), Tensor::cat(vec![b, -b0], 0))
    }

    /// Makes the factors and the magnitude trainable or not; initial factors never are, nor an `A` that is to stay.
    pub(crate) fn set_trainable(self, trainable: bool) -> Self {
        let mut lora = self.set_require_grad(trainable);
        lora.initial = lora.initial.map(Module::no_grad);
        if lora.freeze_a {
            lora.a = lora.a.no_grad();
        }
        lora
    }

    /// How many values train.
    pub(crate) fn trainable_params(&self) -> usize {
        let frozen = if self.freeze_a {
            self.a.num_params()
        } else {
            0
        };
        self.num_params() - frozen - self.initial.as_ref().map_or(0, Module::num_params)
    }
}

impl LoraConfig {
    /// How many times the rank a fresh adapter of this configuration has once it is [converted](Lora::converted).
    pub(crate) fn growth(&self) -> usize {
        self.growth_of(self.init.folds())
    }

    fn growth_of(&self, folded: bool) -> usize {
        self.slices.chosen() * if folded { 2 } else { 1 }
    }
}

/// `α` of the adapter of `1/times` the rank and the same scale.
pub(crate) fn ungrown_alpha(alpha: f64, rslora: bool, times: usize) -> f64 {
    alpha / converted_alpha(1.0, rslora, times)
}

/// `α` of the adapter of `times` the rank and the same scale.
pub(crate) fn converted_alpha(alpha: f64, rslora: bool, times: usize) -> f64 {
    let times = times as f64;
    alpha * if rslora { times.sqrt() } else { times }
}
