//! How a LoRA is made: its rank, scale and options, and its first values.
//!
//! `s = α/r`, or `α/√r` for rsLoRA; what the initialisations are stands in [`LoraInit`].

use burn::config::Config;
use burn::module::Param;
use burn::nn::DropoutConfig;
use burn::tensor::{Device, Distribution, FloatDType, Tensor};

use super::{FrozenMap, Lora, LoraInit, Slices, cast};
use crate::{PeftError, Result};

/// Configuration of [`Lora`].
#[derive(Config, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank `r` of the change, at least 1. May exceed `min(d_in, d_out)`, which wastes parameters.
    pub rank: usize,
    /// Numerator `α` of the scale. Default: 8.
    #[config(default = 8.0)]
    pub alpha: f64,
    /// Probability of dropout on the adapter's input, in `[0, 1)`. Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
    /// Scale by `α/√r` (rank-stabilised LoRA) in place of `α/r`. Default: false.
    #[config(default = false)]
    pub rslora: bool,
    /// Train the norms of the weight's columns beside their directions (DoRA). Default: false.
    #[config(default = false)]
    pub dora: bool,
    /// Train a bias of the factor `B` beside it, `Δ(x) = s·((drop(x)·A)·B + β)`: PEFT's `lora_bias`. Not with DoRA, nor on
    /// embeddings, and with the initialisations `Kaiming` and `Random` only. Default: false.
    #[config(default = false)]
    pub bias: bool,
    /// Initialisation of the factors. Default: kaiming-uniform.
    #[config(default = "LoraInit::Kaiming")]
    pub init: LoraInit,
    /// Dtype of the factors, whatever the dtype of the base. Default: f32.
    #[config(default = "FloatDType::F32")]
    pub dtype: FloatDType,
    /// The slices of the outputs that have a change, each with factors of the rank `r` of its own. With
    /// [`dora`](Self::dora), the magnitudes are of all outputs all the same. Default: all outputs as one.
    #[config(default = "Slices::Whole")]
    pub slices: Slices,
    /// Train `B` alone and leave `A` as it is drawn ([LoRA-FA](https://arxiv.org/abs/2308.03303)): nothing keeps a layer's
    /// input for the backward pass then. Default: false.
    #[config(default = false)]
    pub freeze_a: bool,
}

impl LoraConfig {
    /// Checks every value against its range.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] with the name, the value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let error = |name: &str, value: String, expected: &str| {
            Err(PeftError::config(name, value, expected))
        };
        if self.rank == 0 {
            return error("rank", self.rank.to_string(), "at least 1");
        }
        if !self.alpha.is_finite() {
            return error("alpha", self.alpha.to_string(), "a finite number");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return error(
                "dropout",
                self.dropout.to_string(),
                "a probability in [0, 1)",
            );
        }
        // As PEFT: of an adapter saved otherwise it would load nothing.
        if self.bias && self.dora {
            return error("bias", "true".into(), "false with DoRA");
        }
        if self.bias && !matches!(self.init, LoraInit::Kaiming | LoraInit::Random) {
            let init = format!("{:?}", self.init);
            return error("init", init, "`Kaiming` or `Random` with a bias of B");
        }
        self.slices.validate()?;
        self.init.validate(self.rank, self.alpha)
    }

    /// The scale `s`: `α/r`, or `α/√r` for rsLoRA.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// Whether a fresh adapter depends on the weight it is for.
    pub(crate) fn needs_weight(&self) -> bool {
        self.dora || self.init.folds()
    }

    /// A fresh adapter for a map from `d_in` to `d_out` features, without what comes from the map itself, which are DoRA's
    /// magnitude and factors that begin with a part of the weight: see [`init_on`](Self::init_on).
    ///
    /// # Errors
    ///
    /// As [`validate`](Self::validate), and [`PeftError::Config`] for an initialisation that
    /// [takes a part of the weight](LoraInit::folds).
    pub fn init(&self, d_in: usize, d_out: usize, device: &Device) -> Result<Lora> {
        self.validate()?;
        let slices = self.slices.ranges(d_out)?;
        let rank = self.rank;
        let kaiming = |fan_in: usize| {
            let bound = 1.0 / (fan_in.max(1) as f64).sqrt();
            Distribution::Uniform(-bound, bound)
        };
        let (a, b) = match self.init {
            LoraInit::Kaiming => (kaiming(d_in), None),
            LoraInit::Gaussian => (Distribution::Normal(0.0, 1.0 / rank as f64), None),
            LoraInit::Random => (kaiming(d_in), Some(kaiming(rank))),
            #[cfg(feature = "faer")]
            LoraInit::Orthogonal => {
                let (a, b) = super::init::beside(slices, |slice| {
                    super::init::orthogonal([d_in, slice.len()], rank, device)
                })?;
                return self.with_persistent(a, b, device);
            }
            // Those that take a part of the weight; without `faer` also `Orthogonal`, which `validate` has refused.
            init => {
                return Err(PeftError::config(
                    "init",
                    format!("{init:?}"),
                    "one that needs no weight, or `init_on` with the map",
                ));
            }
        };
        let kept = slices.iter().map(ExactSizeIterator::len).sum();
        // Drawn in f32 and cast, so that a seed gives the same adapter in every dtype. Factors live as long as their
        // model: keep them out of the pools of transient tensors.
        let (a, b) = device.memory_persistent_allocations((), |()| {
            let options = (device, FloatDType::F32.into());
            (
                Tensor::<2>::random([d_in, slices.len() * rank], a, options).cast(self.dtype),
                match b {
                    None => Tensor::<2>::zeros([rank, kept], (device, self.dtype.into())),
                    Some(b) => Tensor::<2>::random([rank, kept], b, options).cast(self.dtype),
                },
            )
        });
        let lora = self.with_factors(a, b)?;
        match self.bias {
            false => Ok(lora),
            // As a fresh linear layer's for `Random`, but zero: PEFT's, too, leaves a fresh adapter's output alone.
            true => lora.with_bias(Tensor::zeros([d_out], (device, self.dtype.into()))),
        }
    }

    /// A fresh adapter for the map `base` from `d_in` to `d_out` features. With [`dora`](Self::dora), its magnitude is
    /// that of the map's weight, and an initialisation that [takes a part of the weight](LoraInit::folds) has it, so that
    /// neither changes the map. The latter forms the dense weight, on the host, for as long as it is decomposed.
    ///
    /// # Errors
    ///
    /// As [`validate`](Self::validate). For a part of the weight also [`PeftError::Config`] for a rank above the weight's,
    /// [`PeftError::NotFinite`] and [`PeftError::Decomposition`].
    pub fn init_on(
        &self,
        base: &impl FrozenMap,
        dims: [usize; 2],
        device: &Device,
    ) -> Result<Lora> {
        self.validate()?;
        let lora = match self.init.folds() {
            false => self.init(dims[0], dims[1], device)?,
            true => self.init_folded(base, device)?,
        };
        match self.dora {
            false => Ok(lora),
            true => self.with_norms(lora, base),
        }
    }

    /// `lora` with DoRA's magnitude, so that it changes the map `base` no more than without.
    pub(crate) fn with_norms(&self, lora: Lora, base: &impl FrozenMap) -> Result<Lora> {
        let (a, b) = lora.factors();
        let norms = base.column_norms(a, b, lora.scale());
        lora.with_magnitude(cast(norms, self.dtype))
    }

    /// A fresh adapter for an embedding of `[tokens, features]`, without DoRA's magnitude: as in PEFT `A` is zero and
    /// `B ~ N(0, 1)`, or both are `N(0, 1)` for [`LoraInit::Random`].
    ///
    /// # Errors
    ///
    /// As [`validate`](Self::validate), and [`PeftError::Config`] for a [`bias`](Self::bias), which an embedding has not, and
    /// for an initialisation other than `Kaiming`, `Gaussian` and `Random`.
    pub fn init_embedding(&self, [tokens, features]: [usize; 2], device: &Device) -> Result<Lora> {
        self.validate()?;
        let error =
            |name: &str, value: String, expected: &str| PeftError::config(name, value, expected);
        if self.bias {
            return Err(error("bias", "true".into(), "false on an embedding"));
        }
        let random = match self.init {
            LoraInit::Kaiming | LoraInit::Gaussian => false,
            LoraInit::Random => true,
            init => {
                let expected = "`Kaiming`, `Gaussian` or `Random` on an embedding";
                return Err(error("init", format!("{init:?}"), expected));
            }
        };
        let (a, b) = device.memory_persistent_allocations((), |()| {
            let normal = |shape: [usize; 2]| {
                let any = Distribution::Normal(0.0, 1.0);
                Tensor::<2>::random(shape, any, (device, FloatDType::F32.into())).cast(self.dtype)
            };
            let shape = [tokens, self.rank];
            let a = match random {
                false => Tensor::zeros(shape, (device, self.dtype.into())),
                true => normal(shape),
            };
            (a, normal([self.rank, features]))
        });
        self.with_factors(a, b)
    }

    #[cfg(feature = "faer")]
    fn init_folded(&self, base: &impl FrozenMap, device: &Device) -> Result<Lora> {
        let weight = base.dense();
        let slices = self.slices.ranges(weight.dims()[1])?;
        let (a, b) = super::init::beside(slices, |slice| {
            let part = weight.clone().narrow(1, slice.start, slice.len());
            super::init::of_weight(self.init, &part, self.rank, self.scale(), device)
        })?;
        let lora = self.with_persistent(a, b, device)?;
        // The same tensors, so that what is subtracted is what is added, also in a narrow dtype.
        let (a, b) = (lora.a.val(), lora.b.val());
        lora.with_initial(a, b)
    }

    #[cfg(not(feature = "faer"))]
    fn init_folded(&self, _base: &impl FrozenMap, _device: &Device) -> Result<Lora> {
        // `validate` has said so already.
        Err(PeftError::config(
            "init",
            format!("{:?}", self.init),
            "the feature `faer`",
        ))
    }

    /// As [`with_factors`](Self::with_factors), of factors in f32, in this configuration's dtype and memory that lasts.
    #[cfg(feature = "faer")]
    pub(super) fn with_persistent(
        &self,
        a: Tensor<2>,
        b: Tensor<2>,
        device: &Device,
    ) -> Result<Lora> {
        let (a, b) = device.memory_persistent_allocations((a, b), |(a, b)| {
            (a.cast(self.dtype), b.cast(self.dtype))
        });
        self.with_factors(a, b)
    }

    /// An adapter of given factors, `a [d_in, r]` and `b [r, d_out]`, kept in the dtype they have; with `k` chosen
    /// [`slices`](Self::slices), `a [d_in, k·r]` and `b [r, Σ n_i]`. DoRA's magnitude is for [`Lora::with_magnitude`].
    ///
    /// # Errors
    ///
    /// As [`validate`](Self::validate), and [`PeftError::Shape`] if a factor has another rank than the configuration, or `b` is not
    /// of its slices.
    pub fn with_factors(&self, a: Tensor<2>, b: Tensor<2>) -> Result<Lora> {
        self.validate()?;
        let columns = self.slices.chosen() * self.rank;
        let kept = self.slices.kept(b.dims()[1]);
        for (name, found, expected) in [
            ("A", a.dims(), [a.dims()[0], columns]),
            ("B", b.dims(), [self.rank, kept]),
        ] {
            if found != expected {
                return Err(PeftError::Shape {
                    tensor: name.into(),
                    expected: expected.into(),
                    found: found.into(),
                });
            }
        }
        Ok(Lora {
            // Detached: a parameter is a leaf, whatever its first value came from.
            a: Param::from_tensor(a.detach()).set_require_grad(!self.freeze_a),
            b: Param::from_tensor(b.detach()),
            magnitude: None,
            bias: None,
            initial: None,
            dropout: DropoutConfig::new(self.dropout).init(),
            alpha: self.alpha,
            rslora: self.rslora,
            slices: self.slices.clone(),
            freeze_a: self.freeze_a,
        })
    }
}
