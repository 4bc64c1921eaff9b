//! Estimates of the divergence from a reference at sampled tokens, and the control of its weight.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::{PeftError, Result};

/// An estimate of `KL(π‖π_ref)` at a token that π sampled, by `d = ln π − ln π_ref`
/// ([Schulman 2020](http://joschu.net/blog/kl-approx.html)).
///
/// | | value | expectation | gradient of the expectation as a loss, on samples of π |
/// |---|---|---|---|
/// | `K1` | `d` | the divergence | zero |
/// | `K2` | `½d²` | biased | that of `KL(π‖π_ref)` |
/// | `K3` | `e^(−d) − 1 + d` | the divergence | that of `KL(π_ref‖π)`; times the ratio ρ, that of `KL(π‖π_ref)` |
///
/// In a reward, which has no gradient, `K1` is the unbiased choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KlEstimator {
    /// `d`.
    K1,
    /// `½d²`, at least 0.
    K2,
    /// `e^(−d) − 1 + d`, at least 0.
    #[default]
    K3,
}

impl KlEstimator {
    /// The estimate for one token.
    pub fn value(self, d: f64) -> f64 {
        match self {
            Self::K1 => d,
            Self::K2 => 0.5 * d * d,
            Self::K3 => (-d).exp_m1() + d,
        }
    }

    /// The estimate for every token, with its gradient.
    pub fn tensor(self, d: Tensor<1>) -> Tensor<1> {
        match self {
            Self::K1 => d,
            Self::K2 => d.square() * 0.5,
            Self::K3 => (-d.clone()).exp() - 1.0 + d,
        }
    }
}

/// A weight of the divergence in the reward that follows a target ([Ziegler et al. 2019](https://arxiv.org/abs/1909.08593)).
///
/// ```text
/// e = clip(KL/target − 1, −0.2, 0.2)        β ← β·(1 + e·n/horizon)
/// ```
///
/// A fixed weight needs no object: it is the number given to [`RewardShaping`](super::RewardShaping).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdaptiveKl {
    coef: f64,
    target: f64,
    horizon: f64,
}

impl AdaptiveKl {
    /// From a first weight (0.2 is usual), a target of the divergence of a sequence in nats (6), and a horizon in sequences (10000).
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for a number that is not finite and above 0.
    pub fn new(coef: f64, target: f64, horizon: f64) -> Result<Self> {
        for (name, value) in [("coef", coef), ("target", target), ("horizon", horizon)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(PeftError::config(name, value, "a finite number above 0"));
            }
        }
        Ok(Self {
            coef,
            target,
            horizon,
        })
    }

    /// The weight now.
    pub fn coef(&self) -> f64 {
        self.coef
    }

    /// Takes a batch into account: `kl` is `Σ_t k1` of every sequence, as [`token_rewards`](super::token_rewards) gives it.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for no sequences, or a divergence that is not finite; the weight is as it was then.
    pub fn update(&mut self, kl: &[f32]) -> Result<()> {
        if kl.is_empty() {
            return Err(PeftError::config("kl", "[]", "one value for each sequence"));
        }
        crate::objective::segments::finite("kl", kl)?;
        let sequences = kl.len() as f64;
        let mean = kl.iter().map(|kl| f64::from(*kl)).sum::<f64>() / sequences;
        let error = (mean / self.target - 1.0).clamp(-0.2, 0.2);
        self.coef *= 1.0 + error * sequences / self.horizon;
        Ok(())
    }
}
