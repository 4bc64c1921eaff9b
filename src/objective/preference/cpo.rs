//! Contrastive preference optimisation and SimPO: losses of pairs without a reference.

use burn::tensor::Tensor;

use super::metrics::entropy;
use super::{
    Pairs, PreferenceLoss, check_not_negative, check_positive, check_smoothing, logistic, relu,
};
use crate::objective::Loss;
use crate::tensor::constant;
use crate::{PeftError, Result};

/// A loss of pairs without a reference. `L` is the sum of a completion's log-probabilities, `L̄` their mean by token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CpoLoss {
    /// The logistic loss of `β(L_c − L_r)` ([CPO](https://arxiv.org/abs/2401.08417)).
    Sigmoid,
    /// `max(0, 1 − β(L_c − L_r))`.
    Hinge,
    /// `(L̄_c − L̄_r − 1/(2β))²`.
    Ipo,
    /// The logistic loss of `β(L̄_c − L̄_r) − γ` ([SimPO](https://arxiv.org/abs/2405.14734)).
    SimPo {
        /// γ, the margin to reach; 0.5 is usual with β = 2.
        margin: f64,
    },
}

/// Options of [`cpo_loss`]. The defaults are those of CPO: β = 0.1, the sigmoid loss, the likelihood of the chosen completions with
/// weight 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CpoConfig {
    /// β, above 0.
    pub beta: f64,
    /// The loss of a pair.
    pub loss: CpoLoss,
    /// ε, the share of labels taken for wrong; only in the logistic losses.
    pub label_smoothing: f64,
    /// Weight of `−Σ ℓ_c / Σ n_c`, the likelihood of the chosen completions.
    pub nll_weight: f64,
    /// α of [AlphaPO](https://arxiv.org/abs/2501.03884): the reward is `(1 − e^(−α·L))/α` in place of `L` (with SimPO and IPO of `L̄`);
    /// 0 is `L` itself.
    pub alpha: f64,
}

impl Default for CpoConfig {
    fn default() -> Self {
        Self {
            beta: 0.1,
            loss: CpoLoss::Sigmoid,
            label_smoothing: 0.0,
            nll_weight: 1.0,
            alpha: 0.0,
        }
    }
}

impl CpoConfig {
    /// The defaults of CPO.
    pub fn new() -> Self {
        Self::default()
    }

    /// Pure SimPO with the options of its paper: β = 2, γ = 0.5, no likelihood.
    pub fn simpo() -> Self {
        Self {
            beta: 2.0,
            loss: CpoLoss::SimPo { margin: 0.5 },
            nll_weight: 0.0,
            ..Self::default()
        }
    }

    /// With another β.
    pub fn with_beta(mut self, beta: f64) -> Self {
        self.beta = beta;
        self
    }

    /// With another loss.
    pub fn with_loss(mut self, loss: CpoLoss) -> Self {
        self.loss = loss;
        self
    }

    /// With a share of labels taken for wrong.
    pub fn with_label_smoothing(mut self, label_smoothing: f64) -> Self {
        self.label_smoothing = label_smoothing;
        self
    }

    /// With another weight of the likelihood.
    pub fn with_nll_weight(mut self, nll_weight: f64) -> Self {
        self.nll_weight = nll_weight;
        self
    }

    /// With the reward of AlphaPO.
    pub fn with_alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }

    fn check(&self) -> Result<()> {
        check_positive("beta", self.beta)?;
        check_smoothing("label_smoothing", self.label_smoothing)?;
        check_not_negative("nll_weight", self.nll_weight)?;
        if !self.alpha.is_finite() {
            return Err(PeftError::config("alpha", self.alpha, "a finite number"));
        }
        if self.label_smoothing > 0.0 && matches!(self.loss, CpoLoss::Hinge | CpoLoss::Ipo) {
            return Err(PeftError::config(
                "label_smoothing",
                self.label_smoothing,
                format!("0 for {:?}, which has no smoothed form", self.loss),
            ));
        }
        match self.loss {
            CpoLoss::SimPo { margin } if !margin.is_finite() => {
                Err(PeftError::config("margin", margin, "a finite number"))
            }
            _ => Ok(()),
        }
    }

    /// Whether the loss reads means by token.
    fn by_token(&self) -> bool {
        matches!(self.loss, CpoLoss::Ipo | CpoLoss::SimPo { .. })
    }
}

/// The loss of pairs by the policy's log-probabilities alone.
///
/// The rewards are `β·L` (`β·L̄` for SimPO and IPO), as TRL logs them.
///
/// # Errors
///
/// [`PeftError::Config`] for an option out of range.
pub fn cpo_loss(policy: &Pairs, config: &CpoConfig) -> Result<PreferenceLoss> {
    config.check()?;
    let log_probs = [&policy.chosen, &policy.rejected].map(|side| match config.by_token() {
        true => side.means(),
        false => side.sums(),
    });
    let rewards = log_probs.clone().map(|l| match config.alpha == 0.0 {
        true => l,
        false => (-(l * -config.alpha).exp() + 1.0) * (1.0 / config.alpha),
    });
    let [chosen, rejected] = rewards.clone();
    let difference = chosen - rejected;
    let terms: Tensor<1> = match config.loss {
        CpoLoss::Sigmoid => logistic(difference * config.beta, config.label_smoothing),
        CpoLoss::SimPo { margin } => {
            logistic(difference * config.beta - margin, config.label_smoothing)
        }
        CpoLoss::Hinge => relu(-(difference * config.beta) + 1.0),
        CpoLoss::Ipo => (difference - 0.5 / config.beta).square(),
    };

    let nll = policy.negative_log_likelihood();
    let [chosen_rewards, rejected_rewards] = rewards.map(|r| constant(r * config.beta));
    let [chosen_log_probs, rejected_log_probs] = log_probs.map(constant);
    Ok(PreferenceLoss {
        pairs: Loss {
            sum: terms.sum(),
            count: policy.count(),
        },
        tokens: (config.nll_weight > 0.0).then(|| Loss {
            sum: nll.sum.clone() * config.nll_weight,
            count: nll.count,
        }),
        chosen_rewards,
        rejected_rewards,
        chosen_log_probs,
        rejected_log_probs,
        log_odds: None,
        nll: constant(nll.mean()),
        entropy: entropy(policy),
        is_top1: policy.chosen.is_top1.clone(),
    })
}

/// [SimPO](https://arxiv.org/abs/2405.14734): `−ln σ(β(L̄_c − L̄_r) − γ)`, with [`CpoConfig::simpo`] otherwise.
///
/// # Errors
///
/// [`PeftError::Config`] for an option out of range.
pub fn simpo_loss(policy: &Pairs, beta: f64, margin: f64) -> Result<PreferenceLoss> {
    let config = CpoConfig::simpo()
        .with_beta(beta)
        .with_loss(CpoLoss::SimPo { margin });
    cpo_loss(policy, &config)
}
