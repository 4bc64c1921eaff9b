//! LoftQ, a quantised weight and a LoRA that together stand for the dense one: `Q + s·A·B ≈ W`.
//!
//! From `A·B = 0`, a number of times:
//!
//! ```text
//! Q   = NF4(W - s·A·B)
//! A,B = the best of rank r for (W - Q) / s
//! ```
//!
//! The adapter is no change of `Q` but a part of the pair: it is not left out of the forward pass, and belongs to this `Q`. After
//! one iteration `Q` is `W` quantised as usual; after more it is another one.
//!
//! PEFT 0.21 does not divide by `s`, so that its pair misses `W` unless `s` is 1.
//!
//! Source: LoftQ, arXiv:2310.08659, algorithm 1.

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{FloatDType, Tensor};

use super::{FrozenLinear, Nf4Linear, QLoraLinear};
use crate::adapter::{FrozenMap, LoraConfig, cast};
use crate::nf4::{Nf4Config, Nf4Weight};
use crate::{PeftError, Result};

/// How near LoftQ came.
#[derive(Clone, Debug, PartialEq)]
pub struct LoftqReport {
    /// `‖W - Q‖ / ‖W‖` of `W` quantised alone, Frobenius.
    pub quantized: f32,
    /// `‖W - Q - s·A·B‖ / ‖W‖` after each iteration.
    pub errors: Vec<f32>,
}

impl QLoraLinear {
    /// Quantises a dense layer and fills a LoRA with what quantising lost, over `iterations` of LoftQ; the best of them is
    /// kept. The initialisation of `config` does not matter. With DoRA, the magnitude is that of `Q + s·A·B`.
    ///
    /// Holds a few dense copies of the weight in f32 meanwhile, and decomposes it on the host once an iteration.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for no iterations, and those of [`LoraConfig::from_delta`] and [`Nf4Linear::from_linear`].
    pub fn from_linear_loftq(
        linear: Linear,
        nf4: &Nf4Config,
        config: &LoraConfig,
        iterations: usize,
    ) -> Result<(Self, LoftqReport)> {
        let weight = linear.dense_weight();
        let size = norm(weight.clone());
        let relative = |error: Tensor<2>| match size {
            0.0 => 0.0,
            size => norm(error) / size,
        };
        let mut report = LoftqReport {
            quantized: 0.0,
            errors: Vec::new(),
        };
        let mut best = None;
        let mut target = weight.clone();
        for iteration in 0..iterations {
            let packed = Nf4Weight::quantize("weight", target, nf4)?;
            let lost = weight.clone() - packed.dequantize(FloatDType::F32).transpose();
            if iteration == 0 {
                report.quantized = relative(lost.clone());
            }
            let (lora, _) = config.from_delta(&lost)?;
            let change = lora.delta_weight().detach();
            let error = relative(lost - change.clone());
            if report.errors.iter().all(|&earlier| error < earlier) {
                best = Some((packed, lora));
            }
            report.errors.push(error);
            target = weight.clone() - change;
        }
        let (weight, lora) =
            best.ok_or_else(|| PeftError::config("iterations", iterations, "at least 1"))?;
        let bias: Option<Param<_>> = linear.bias.map(|bias| bias.set_require_grad(false));
        let base = Nf4Linear { weight, bias };
        let delta = match config.dora {
            false => lora,
            true => {
                let (a, b) = (lora.a.val(), lora.b.val());
                let norms = base.frozen_map().column_norms(a, b, lora.scale());
                lora.with_magnitude(cast(norms, config.dtype))?
            }
        };
        Ok((Self { base, delta }, report))
    }
}

fn norm(x: Tensor<2>) -> f32 {
    x.square().sum().sqrt().into_scalar::<f32>()
}
