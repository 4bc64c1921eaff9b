//! Odds ratio preference optimisation: a likelihood and a loss of pairs in one, without a reference.

use burn::tensor::Tensor;
use burn::tensor::activation::log_sigmoid;

use super::metrics::entropy;
use super::{Pairs, PreferenceLoss, check_not_negative};
use crate::Result;
use crate::objective::{LogProbs, Loss};
use crate::tensor::constant;

/// Options of [`orpo_loss`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OrpoConfig {
    /// β, the weight of the odds ratio (λ in the paper); 0.1 by default.
    pub beta: f64,
}

impl Default for OrpoConfig {
    fn default() -> Self {
        Self { beta: 0.1 }
    }
}

impl OrpoConfig {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// With another weight of the odds ratio.
    pub fn with_beta(mut self, beta: f64) -> Self {
        self.beta = beta;
        self
    }
}

/// [ORPO](https://arxiv.org/abs/2403.07691): the likelihood of completions to imitate, and the odds of chosen over rejected ones.
///
/// ```text
/// loss = −Σ ℓ / N − β · mean ln σ(o)        o = ln odds(e^L̄_c) − ln odds(e^L̄_r)        ln odds(p) = ln p − ln(1 − p)
/// ```
///
/// `imitate` are the log-probabilities that the likelihood is of; none takes the chosen completions. TRL takes the tokens of prompt
/// and chosen completion together.
///
/// `L̄ = 0`, a completion of probability 1, has infinite odds: it is taken as −1e-6, with a gradient of zero there. In f32 and f64
/// alike `ln(1 − e^x)` is computed without cancellation.
///
/// The rewards are `β·L̄`, as TRL logs them.
///
/// # Errors
///
/// [`PeftError::Config`](crate::PeftError::Config) for an option out of range.
pub fn orpo_loss(
    policy: &Pairs,
    imitate: Option<&LogProbs>,
    config: &OrpoConfig,
) -> Result<PreferenceLoss> {
    check_not_negative("beta", config.beta)?;
    let log_probs = [&policy.chosen, &policy.rejected].map(LogProbs::means);
    let [chosen, rejected] = log_probs.clone().map(log_odds);
    let log_odds = chosen - rejected;
    let terms = -log_sigmoid(log_odds.clone());
    let nll = match imitate {
        None => policy.negative_log_likelihood(),
        Some(imitate) => Loss {
            sum: -imitate.values.clone().sum(),
            count: imitate.tokens(),
        },
    };
    let [chosen_rewards, rejected_rewards] = log_probs.clone().map(|l| constant(l * config.beta));
    let [chosen_log_probs, rejected_log_probs] = log_probs.map(constant);
    Ok(PreferenceLoss {
        pairs: Loss {
            sum: terms.sum() * config.beta,
            count: policy.count(),
        },
        nll: constant(nll.mean()),
        tokens: Some(nll),
        chosen_rewards,
        rejected_rewards,
        chosen_log_probs,
        rejected_log_probs,
        log_odds: Some(constant(log_odds)),
        entropy: entropy(policy),
        is_top1: policy.chosen.is_top1.clone(),
    })
}

/// `x − ln(1 − e^x)` for `x < 0`.
fn log_odds(x: Tensor<1>) -> Tensor<1> {
    let x = x.clamp_max(-1e-6);
    x.clone() - log_one_minus_exp(x)
}

/// `ln(1 − e^x)` for `x ≤ −1e-6`: `ln1p(−e^x)` below −ln 2, else `ln(−expm1 x)`.
///
/// Burn has no `expm1`. `−expm1 x = 2·e^(x/2)·sinh(−x/2)`, and the hyperbolic sine of a number up to ½ ln 2 is a short series.
fn log_one_minus_exp(x: Tensor<1>) -> Tensor<1> {
    let small = x.clone().greater_elem(-std::f64::consts::LN_2);
    // Each branch is fed with values that it can take: the gradient of a branch not taken is zero times a finite number.
    let far = x.clone().mask_fill(small.clone(), -1.0);
    let far = (-far.exp()).log1p();
    let near = x.mask_fill(small.clone().bool_not(), -0.5);
    let half = near.clone() * -0.5;
    let square = half.clone().square();
    // Terms up to h^15/15!: the next is below 1e-21 of the first.
    let mut series = Tensor::ones_like(&square);
    for n in (1..8).rev() {
        series = series * square.clone() * (1.0 / f64::from(2 * n * (2 * n + 1))) + 1.0;
    }
    let near = (half * series * 2.0).log() + near * 0.5;
    far.mask_where(small, near)
}
