//! The terms of tokens that policy losses are sums of.

use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;

use crate::objective::segments;
use crate::tensor::constant;
use crate::{PeftError, Result};

/// The term of a token, to be made small: `A` is its advantage, `ρ` its ratio, `ℓ` its log-probability, `sg` cuts the graph.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Surrogate {
    /// `−min(ρ·A, clip(ρ, 1−low, 1+high)·A)`; with `dual` for `A < 0` never above `−dual·A`.
    Clip {
        /// ε, 0 to 1.
        low: f64,
        /// ε above one; DAPO's "clip-higher" is 0.28 with ε = 0.2.
        high: f64,
        /// The most that a ratio counts for, above `1 + high`; 3 is usual ([dual clip](https://arxiv.org/abs/1912.09729)).
        dual: Option<f64>,
    },
    /// `−sg(min(ρ, max))·A·ℓ` ([CISPO](https://arxiv.org/abs/2506.13585)): every token keeps a gradient.
    Cispo {
        /// The most that a ratio counts for; above 0.
        max: f64,
    },
    /// `−A·4σ(τ(ρ−1))/τ`, with τ by the sign of `A` ([SAPO](https://arxiv.org/abs/2511.20347)): bounds without corners.
    Sapo {
        /// τ where `A > 0`.
        positive: f64,
        /// τ elsewhere.
        negative: f64,
    },
    /// `−sg(φ)·A·ℓ` ([VESPO](https://arxiv.org/abs/2602.10693)) with `φ = w^k·e^(λ−λw)`, `w = e^(L − L^old)` of the sequence, and `(k, λ)` by the sign of `A`; the log-ratios of tokens
    /// count for ±20 at most, that of the sequence for ln 1e-8 to 20.
    Vespo {
        /// `(k, λ)` where `A ≥ 0`; (2, 3) is usual.
        positive: (f64, f64),
        /// `(k, λ)` where `A < 0`; (3, 2) is usual.
        negative: (f64, f64),
    },
    /// `−A·ℓ`: no ratio, for samples of the policy itself.
    Reinforce,
}

impl Default for Surrogate {
    fn default() -> Self {
        Self::clip(0.2, 0.2)
    }
}

/// What the term of a token is made of: tensors `[tokens]`.
pub(super) struct Terms<'a> {
    pub lens: &'a [usize],
    /// `ℓ`.
    pub log_probs: Tensor<1>,
    /// `ℓ − ℓ^old`.
    pub log_ratio: Tensor<1>,
    /// `ρ`, at the level asked for.
    pub ratio: Tensor<1>,
    /// `A`, on the host.
    pub advantages: &'a [f32],
    /// Weights of the correction between sampling and training, on the host.
    pub weights: Option<&'a [f32]>,
}

impl Surrogate {
    /// The clipped surrogate without dual clip.
    pub fn clip(low: f64, high: f64) -> Self {
        Self::Clip {
            low,
            high,
            dual: None,
        }
    }

    pub(super) fn check(self) -> Result<()> {
        let positive = |name: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(PeftError::config(name, value, "a finite number above 0")),
        };
        match self {
            Self::Clip { low, high, dual } => {
                if !(0.0..=1.0).contains(&low) {
                    return Err(PeftError::config("clip.low", low, "0 to 1"));
                }
                if !(high.is_finite() && high >= 0.0) {
                    return Err(PeftError::config(
                        "clip.high",
                        high,
                        "a finite number, at least 0",
                    ));
                }
                match dual {
                    Some(dual) if !(dual.is_finite() && dual > 1.0 + high) => {
                        Err(PeftError::config(
                            "clip.dual",
                            dual,
                            format!("a finite number above {}, the upper bound", 1.0 + high),
                        ))
                    }
                    _ => Ok(()),
                }
            }
            Self::Cispo { max } => positive("cispo.max", max),
            Self::Sapo {
                positive: p,
                negative: n,
            } => positive("sapo.positive", p).and(positive("sapo.negative", n)),
            Self::Vespo {
                positive: (k_p, l_p),
                negative: (k_n, l_n),
            } => positive("vespo.positive.0", k_p)
                .and(positive("vespo.positive.1", l_p))
                .and(positive("vespo.negative.0", k_n))
                .and(positive("vespo.negative.1", l_n)),
            Self::Reinforce => Ok(()),
        }
    }

    /// The ratios below and above which a token with an advantage of the other sign has no gradient, for the log.
    pub(super) fn bounds(self) -> (f64, f64) {
        match self {
            Self::Clip { low, high, .. } => (1.0 - low, 1.0 + high),
            Self::Cispo { max } => (f64::NEG_INFINITY, max),
            _ => (f64::NEG_INFINITY, f64::INFINITY),
        }
    }

    /// The term of every token, `[tokens]`.
    pub(super) fn terms(self, of: Terms) -> Tensor<1> {
        let like = of.log_probs.clone();
        let host = |values: Vec<f64>| segments::host(values, &like);
        let by_sign = |positive: f64, negative: f64, is_positive: fn(f32) -> bool| {
            let choose = |a: &f32| if is_positive(*a) { positive } else { negative };
            host(of.advantages.iter().map(choose).collect())
        };
        let weights = of
            .weights
            .map(|w| host(w.iter().map(|w| f64::from(*w)).collect()));
        let advantages = host(of.advantages.iter().map(|a| f64::from(*a)).collect());
        let terms = match self {
            Self::Clip { low, high, dual } => {
                let clipped = of.ratio.clone().clamp(1.0 - low, 1.0 + high) * advantages.clone();
                let ratio = match dual {
                    None => of.ratio,
                    Some(dual) => of.ratio.clamp_max(dual),
                };
                -(ratio * advantages).min_pair(clipped)
            }
            Self::Cispo { max } => -(constant(of.ratio.clamp_max(max)) * advantages * of.log_probs),
            Self::Sapo { positive, negative } => {
                let tau = by_sign(positive, negative, |a| a > 0.0);
                -(sigmoid((of.ratio - 1.0) * tau.clone()) * 4.0 / tau * advantages)
            }
            Self::Vespo { positive, negative } => {
                // The correction is a part of the sequence's ratio here.
                let (least, most) = (1e-8f64.ln(), 20.0);
                let log_ratio = constant(of.log_ratio).clamp(-20.0, 20.0);
                let mut log_w = segments::sums(log_ratio, of.lens);
                if let Some(weights) = weights {
                    let log_weights = weights.log().clamp(least, most);
                    log_w = log_w + segments::sums(log_weights, of.lens);
                }
                let log_w = segments::spread(log_w.clamp(least, most), of.lens);
                let k = by_sign(positive.0, negative.0, |a| a >= 0.0);
                let lambda = by_sign(positive.1, negative.1, |a| a >= 0.0);
                let log_phi = lambda.clone() + k * log_w.clone() - lambda * log_w.exp();
                return -(log_phi.exp() * advantages * of.log_probs);
            }
            Self::Reinforce => -(advantages * of.log_probs),
        };
        match weights {
            None => terms,
            Some(weights) => terms * weights,
        }
    }
}
