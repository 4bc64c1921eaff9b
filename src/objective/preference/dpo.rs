//! Direct preference optimisation, and the losses that share its inputs.

use burn::tensor::Tensor;

use super::dpo_terms::Batch;
use super::{
    FDivergence, Pairs, PreferenceLoss, check_not_negative, check_positive, check_smoothing,
};
use crate::objective::Loss;
use crate::tensor::constant;
use crate::{PeftError, Result};

/// A loss of pairs with a reference. `u_c`, `u_r` are the log-ratios of the chosen and the rejected completion, `n_c`, `n_r` their
/// tokens, `s` the score of the [`FDivergence`] (`s(u) = u` as a rule), `x = β(s(u_c) − s(u_r))`, `a = β·u_c`, `b = β·u_r`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DpoLoss {
    /// `−(1−ε)·ln σ(x) − ε·ln σ(−x)`: [DPO](https://arxiv.org/abs/2305.18290), and conservative DPO for ε > 0.
    Sigmoid {
        /// ε, the share of labels taken for wrong; 0 for plain DPO.
        label_smoothing: f64,
    },
    /// `[−(1−ε)·ln σ(x) + ε·ln σ(−x)]/(1−2ε)`, unbiased under labels that are wrong with probability ε
    /// ([robust DPO](https://arxiv.org/abs/2403.00409)).
    Robust {
        /// ε, the probability of a wrong label; below one half.
        flip: f64,
    },
    /// `max(0, 1 − x)` ([SLiC](https://arxiv.org/abs/2305.10425)).
    Hinge,
    /// `(s(u_c)/n_c − s(u_r)/n_r − 1/(2β))²` ([IPO](https://arxiv.org/abs/2310.12036), by token, as its authors confirmed).
    Ipo,
    /// `−ln σ(β(s(u_c)/n_c − s(u_r)/n_r))`: DPO by token.
    SigmoidNorm,
    /// `σ(x)(ln σ(x) − ln(1−ε)) + σ(−x)(ln σ(−x) − ln ε)` ([EXO](https://arxiv.org/abs/2402.00856)).
    ExoPair {
        /// ε, above 0 and below 1; 1e-3 is usual.
        label_smoothing: f64,
    },
    /// `−ln σ(a) − ½·ln σ(−a) − ½·ln σ(−b)` ([NCA](https://arxiv.org/abs/2402.05369)).
    NcaPair,
    /// `−ln σ(a) − ln σ(−b)` ([BCO](https://arxiv.org/abs/2404.04656), without its shift).
    BcoPair,
    /// `(u_c − 1/(2β))² + (u_r + 1/(2β))²` ([SPPO](https://arxiv.org/abs/2405.00675), hard labels).
    SppoHard,
    /// `1 − σ(a) + σ(b)` ([APO](https://arxiv.org/abs/2408.06266)): for answers that are better than the model's own.
    ApoZero,
    /// `σ(a) + 1 − σ(β(u_c − u_r))` ([APO](https://arxiv.org/abs/2408.06266)): for answers that are worse than the model's own.
    ApoDown,
    /// The logistic loss of the differences `L_c − L_r` of policy and reference, each sorted over the batch
    /// ([AOT](https://arxiv.org/abs/2406.05882), paired). Its value depends on which pairs share a micro-batch.
    Aot {
        /// As of [`Sigmoid`](Self::Sigmoid).
        label_smoothing: f64,
    },
    /// The logistic loss of `u_c` and `u_r`, each sorted over the batch (AOT, unpaired). Its value depends on which pairs share a
    /// micro-batch.
    AotUnpaired {
        /// As of [`Sigmoid`](Self::Sigmoid).
        label_smoothing: f64,
    },
    /// `(1−m)·(−ln σ(x)) + m·e^(−x)`, `m = σ(x/τ)` ([DiscoPOP](https://arxiv.org/abs/2406.08414)).
    DiscoPop {
        /// τ, above 0; 0.05 is usual.
        temperature: f64,
    },
    /// `−Σ ℓ_c / Σ n_c`: the likelihood of the chosen completions, a mean over the tokens of the step.
    Sft,
}

impl DpoLoss {
    /// Plain DPO.
    pub const SIGMOID: Self = Self::Sigmoid {
        label_smoothing: 0.0,
    };

    /// Whether it reads the log-ratios only in the difference of their scores. A divergence other than the reverse KL adds to a single
    /// score a constant that nobody knows.
    fn is_of_differences(self) -> bool {
        matches!(
            self,
            Self::Sigmoid { .. }
                | Self::Robust { .. }
                | Self::Hinge
                | Self::Ipo
                | Self::SigmoidNorm
                | Self::ExoPair { .. }
                | Self::DiscoPop { .. }
                | Self::Sft
        )
    }

    fn check(self) -> Result<()> {
        match self {
            Self::Sigmoid { label_smoothing }
            | Self::Aot { label_smoothing }
            | Self::AotUnpaired { label_smoothing } => {
                check_smoothing("label_smoothing", label_smoothing)
            }
            Self::Robust { flip } => check_smoothing("flip", flip),
            Self::ExoPair { label_smoothing } => {
                match label_smoothing > 0.0 && label_smoothing < 1.0 {
                    true => Ok(()),
                    false => Err(PeftError::config(
                        "label_smoothing of ExoPair",
                        label_smoothing,
                        "above 0 and below 1, as its logarithm is taken: 1e-3 is usual",
                    )),
                }
            }
            Self::DiscoPop { temperature } => check_positive("temperature", temperature),
            _ => Ok(()),
        }
    }
}

/// Options of [`dpo_loss`]. The defaults are those of DPO: β = 0.1, the sigmoid loss, the reverse KL.
#[derive(Clone, Debug, PartialEq)]
pub struct DpoConfig {
    /// β, above 0: how strongly the policy is held to the reference. For IPO the regularisation τ.
    pub beta: f64,
    /// The losses, each with its weight; the whole is their weighted sum.
    pub losses: Vec<(DpoLoss, f64)>,
    /// The divergence from the reference.
    pub divergence: FDivergence,
    /// α of [length-desensitised DPO](https://arxiv.org/abs/2409.06411), in 0..=1: the weight of the tokens beyond the shorter completion's
    /// length, of policy and reference; none is 1.
    pub ld_alpha: Option<f64>,
    /// Weighs every pair by the policy's own probability of both completions ([WPO](https://arxiv.org/abs/2406.11827)).
    /// [`Sft`](DpoLoss::Sft) is not of pairs, and has no weights.
    pub weighting: bool,
}

impl Default for DpoConfig {
    fn default() -> Self {
        Self {
            beta: 0.1,
            losses: vec![(DpoLoss::SIGMOID, 1.0)],
            divergence: FDivergence::ReverseKl,
            ld_alpha: None,
            weighting: false,
        }
    }
}

impl DpoConfig {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// With another β.
    pub fn with_beta(mut self, beta: f64) -> Self {
        self.beta = beta;
        self
    }

    /// With one loss.
    pub fn with_loss(mut self, loss: DpoLoss) -> Self {
        self.losses = vec![(loss, 1.0)];
        self
    }

    /// With several losses and their weights: `[(SIGMOID, 1.0), (Sft, 1.0)]` is the mixture of RPO.
    pub fn with_losses(mut self, losses: impl IntoIterator<Item = (DpoLoss, f64)>) -> Self {
        self.losses = losses.into_iter().collect();
        self
    }

    /// With another divergence.
    pub fn with_divergence(mut self, divergence: FDivergence) -> Self {
        self.divergence = divergence;
        self
    }

    /// With a weight for the tokens beyond the shorter completion.
    pub fn with_ld_alpha(mut self, ld_alpha: f64) -> Self {
        self.ld_alpha = Some(ld_alpha);
        self
    }

    /// With or without the weights of WPO.
    pub fn with_weighting(mut self, weighting: bool) -> Self {
        self.weighting = weighting;
        self
    }

    fn check(&self) -> Result<()> {
        check_positive("beta", self.beta)?;
        self.divergence.check()?;
        if self.losses.is_empty() {
            return Err(PeftError::config("losses", "[]", "at least one loss"));
        }
        for (loss, weight) in &self.losses {
            loss.check()?;
            check_not_negative(&format!("weight of {loss:?}"), *weight)?;
            if !self.divergence.is_reverse_kl() && !loss.is_of_differences() {
                return Err(PeftError::config(
                    "divergence",
                    format!("{:?}", self.divergence),
                    format!(
                        "ReverseKl for {loss:?}: it reads single scores, and those of another divergence hold an unknown constant"
                    ),
                ));
            }
        }
        match self.ld_alpha {
            Some(alpha) if !(0.0..=1.0).contains(&alpha) => {
                Err(PeftError::config("ld_alpha", alpha, "0 to 1"))
            }
            _ => Ok(()),
        }
    }
}

/// The loss of pairs by the log-ratios of a policy and its reference.
///
/// ```text
/// u = Σ_t (ℓ_t − ℓ^ref_t)        loss = Σ_k w_k · loss_k(u_c, u_r)      reward = β·u
/// ```
///
/// The log-ratio is summed from the differences by token, so that f32 loses nothing where policy and reference are close. The
/// reference has no gradient, whether or not its tensors have a graph.
///
/// The rewards are `β·u` for every loss, as TRL logs them. With `ld_alpha` the log-ratios and log-probabilities are weighted sums.
///
/// # Errors
///
/// [`PeftError::Config`] for an option out of range, for a divergence that a loss does not allow, for a reference with other sequences
/// (which it names), and with `weighting` for a policy without [`log_sum_sq`](crate::objective::LogProbs::log_sum_sq).
pub fn dpo_loss(policy: &Pairs, reference: &Pairs, config: &DpoConfig) -> Result<PreferenceLoss> {
    config.check()?;
    policy.check_reference(reference)?;
    let batch = Batch::new(policy, reference, config);
    let weights = match config.weighting {
        true => Some(weights(policy)?),
        false => None,
    };

    let mut pairs: Option<Tensor<1>> = None;
    let mut tokens: Option<Tensor<1>> = None;
    for (loss, weight) in &config.losses {
        let Some(mut terms) = batch.terms(*loss, config) else {
            let sum = policy.negative_log_likelihood().sum * *weight;
            tokens = Some(added(tokens, sum));
            continue;
        };
        if let Some(weights) = &weights {
            terms = terms * weights.clone();
        }
        pairs = Some(added(pairs, terms.sum() * *weight));
    }

    let nll = policy.negative_log_likelihood();
    Ok(PreferenceLoss {
        pairs: Loss {
            // A loss of `Sft` alone has no part of pairs.
            sum: pairs.unwrap_or_else(|| Tensor::zeros([1], (&nll.sum.device(), nll.sum.dtype()))),
            count: policy.count(),
        },
        tokens: tokens.map(|sum| Loss {
            sum,
            count: nll.count,
        }),
        chosen_rewards: constant(batch.chosen.clone() * config.beta),
        rejected_rewards: constant(batch.rejected.clone() * config.beta),
        chosen_log_probs: constant(batch.chosen_log_probs()),
        rejected_log_probs: constant(batch.rejected_log_probs()),
        log_odds: None,
        nll: constant(nll.mean()),
        entropy: super::metrics::entropy(policy),
        is_top1: policy.chosen.is_top1.clone(),
    })
}

fn added(sum: Option<Tensor<1>>, term: Tensor<1>) -> Tensor<1> {
    match sum {
        None => term,
        Some(sum) => sum + term,
    }
}

/// `w_c·w_r` of WPO, `w = exp(mean_t(ℓ_t − ln Σ_j p_tj²))`, `[pairs]`, without graph.
fn weights(policy: &Pairs) -> Result<Tensor<1>> {
    let log_weight = |side: &crate::objective::LogProbs| {
        let Some(log_sum_sq) = &side.log_sum_sq else {
            return Err(PeftError::config(
                "weighting",
                true,
                "log-probabilities of the policy with `log_sum_sq`, as the operation that computes them gives on request",
            ));
        };
        let aligned = side.beside(&side.values) - super::beside(log_sum_sq.clone(), &side.values);
        Ok(crate::objective::segments::means(aligned, side.lens()))
    };
    let log_weights = log_weight(&policy.chosen)? + log_weight(&policy.rejected)?;
    Ok(log_weights.exp())
}
