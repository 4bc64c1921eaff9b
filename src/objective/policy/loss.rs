//! The loss of a policy on sampled completions.

use burn::tensor::Tensor;

use super::surrogate::Terms;
use super::{Aggregate, Level, PolicyBatch, PolicyConfig, PolicyMetrics};
use crate::objective::{Loss, segments};
use crate::tensor::constant;
use crate::{PeftError, Result};

/// The loss of one (micro-)batch of completions.
#[derive(Clone, Debug)]
pub struct PolicyLoss {
    /// The terms of the surrogate and of the divergence; the count is the one that [`Aggregate`] names.
    pub policy: Loss,
    /// `−c·Σ H`, counted in tokens; none where the entropy has no weight.
    pub entropy: Option<Loss>,
    pub(super) config: PolicyConfig,
    pub(super) lens: Vec<usize>,
    pub(super) advantages: Vec<f32>,
    pub(super) log_ratio: Tensor<1>,
    pub(super) kl: Option<Tensor<1>>,
    pub(super) entropies: Option<Tensor<1>>,
}

/// The surrogate of a policy's gradient over sampled completions.
///
/// ```text
/// loss = aggregate_t( w_t·surrogate(ρ_t, A_t) + β·[ρ_t·]k(ℓ_t − ℓ^ref_t) ) − c·mean_t H_t
/// ```
///
/// With `old` equal to `new` every ratio is 1: the value is that of `−A` then, and the gradient that of `−A·ℓ`.
///
/// Completions that were cut can be left out of the batch, and with them of every count.
///
/// # Errors
///
/// [`PeftError::Config`] for an option out of range; for a divergence without a reference; for an entropy bonus where the policy's
/// log-probabilities have no entropy.
pub fn policy_loss(batch: &PolicyBatch, config: &PolicyConfig) -> Result<PolicyLoss> {
    let new = batch.new;
    let lens = new.lens();
    config.check(*lens.iter().max().expect("at least one sequence"))?;

    let values = &new.values;
    let log_ratio = values.clone() - batch.old.beside(values);
    let by_sequence = |sequences: Tensor<1>| segments::spread(sequences, lens);
    let ratio = match config.level {
        Level::Token => log_ratio.clone(),
        Level::Sequence => by_sequence(segments::means(log_ratio.clone(), lens)),
        Level::SequenceSum => by_sequence(segments::sums(log_ratio.clone(), lens)),
    }
    .exp();

    let mut terms = config.surrogate.terms(Terms {
        lens,
        log_probs: values.clone(),
        log_ratio: log_ratio.clone(),
        ratio: ratio.clone(),
        advantages: batch.advantages.values(),
        weights: batch.weights.map(|weights| weights.values()),
    });
    let mut kl = None;
    if let Some(penalty) = config.kl {
        let Some(reference) = batch.reference else {
            return Err(PeftError::config(
                "reference",
                "none",
                "the reference's log-probabilities, as a divergence from it is in the loss",
            ));
        };
        let mut estimate = penalty
            .estimator
            .tensor(values.clone() - reference.beside(values));
        if penalty.corrected {
            estimate = estimate * ratio;
        }
        kl = Some(constant(estimate.clone()));
        terms = terms + estimate * penalty.coef;
    }

    let (sum, count) = match config.aggregate {
        Aggregate::TokenMean => (terms.sum(), new.tokens()),
        Aggregate::SequenceMean => (segments::means(terms, lens).sum(), new.sequences()),
        Aggregate::SequenceSum => (terms.sum(), new.sequences()),
        Aggregate::Constant(most) => (terms.sum(), new.sequences() * most),
    };
    let entropy = match (config.entropy_coef > 0.0, &new.entropy) {
        (false, _) => None,
        (true, Some(entropy)) => Some(Loss {
            sum: entropy.clone().sum() * -config.entropy_coef,
            count: new.tokens(),
        }),
        (true, None) => {
            return Err(PeftError::config(
                "entropy_coef",
                config.entropy_coef,
                "0, or log-probabilities of the policy with their entropy",
            ));
        }
    };
    Ok(PolicyLoss {
        policy: Loss { sum, count },
        entropy,
        config: *config,
        lens: lens.into(),
        advantages: batch.advantages.values().into(),
        log_ratio: constant(log_ratio),
        kl,
        entropies: new.entropy.clone().map(constant),
    })
}

impl PolicyLoss {
    /// The mean over this batch, `[1]`. Right for a step of one batch.
    pub fn mean(&self) -> Tensor<1> {
        let policy = self.policy.mean();
        match &self.entropy {
            None => policy,
            Some(entropy) => policy + entropy.mean(),
        }
    }

    /// This batch's part of a step: `total` is the sum of the [`count`](Loss::count)s of `policy`, `tokens` that of tokens, which is
    /// read only with an entropy bonus.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] when a total is less than this batch's own count.
    pub fn over(&self, total: usize, tokens: usize) -> Result<Tensor<1>> {
        let part = self.policy.over(total)?;
        match &self.entropy {
            None => Ok(part),
            Some(entropy) => Ok(part + entropy.over(tokens)?),
        }
    }

    /// The numbers to log. Waits for the device.
    ///
    /// # Errors
    ///
    /// [`PeftError::DeviceRead`] when the device fails.
    pub fn metrics(&self) -> Result<PolicyMetrics> {
        PolicyMetrics::read(self)
    }
}
