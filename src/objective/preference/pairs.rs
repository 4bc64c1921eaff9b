//! Pairs of completions, and what a loss of pairs returns.

use burn::tensor::Tensor;

use super::PreferenceMetrics;
use crate::objective::{LogProbs, Loss, segments};
use crate::{PeftError, Result};

/// The log-probabilities of preferred and of other completions, pair by pair.
#[derive(Clone, Debug)]
pub struct Pairs {
    /// Of the preferred completions.
    pub chosen: LogProbs,
    /// Of the others, in the same order.
    pub rejected: LogProbs,
}

impl Pairs {
    /// Pair `i` is sequence `i` of both.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] where both do not have as many sequences.
    pub fn new(chosen: LogProbs, rejected: LogProbs) -> Result<Self> {
        if chosen.sequences() != rejected.sequences() {
            return Err(PeftError::config(
                "rejected sequences",
                rejected.sequences(),
                format!("{}, one for each chosen one", chosen.sequences()),
            ));
        }
        Ok(Self { chosen, rejected })
    }

    /// Of a batch with all chosen completions before all rejected ones.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] where the count of sequences is odd.
    pub fn halves(batch: LogProbs) -> Result<Self> {
        let sequences = batch.sequences();
        if sequences % 2 == 1 {
            return Err(PeftError::config(
                "sequences",
                sequences,
                "an even count: chosen completions, then as many rejected ones",
            ));
        }
        let (chosen, rejected) = batch.split_at(sequences / 2);
        Ok(Self { chosen, rejected })
    }

    /// Count of pairs; at least one.
    pub fn count(&self) -> usize {
        self.chosen.sequences()
    }

    /// The same numbers without graph.
    pub fn detach(self) -> Self {
        Self {
            chosen: self.chosen.detach(),
            rejected: self.rejected.detach(),
        }
    }

    /// Refuses pairs that are not of the same completions as those of the policy.
    pub(super) fn check_reference(&self, reference: &Self) -> Result<()> {
        let [chosen, rejected] = ["reference.chosen", "reference.rejected"];
        segments::same_lens(chosen, reference.chosen.lens(), self.chosen.lens())?;
        segments::same_lens(rejected, reference.rejected.lens(), self.rejected.lens())
    }

    /// `−Σ ln π` of the chosen tokens.
    pub(super) fn negative_log_likelihood(&self) -> Loss {
        Loss {
            sum: -self.chosen.values.clone().sum(),
            count: self.chosen.tokens(),
        }
    }
}

/// The loss of one (micro-)batch of pairs.
///
/// It has two parts, as their counts differ: what is a mean over pairs, and what is a mean over tokens. The whole is the sum of both means.
#[derive(Clone, Debug)]
pub struct PreferenceLoss {
    /// The part that is counted in pairs.
    pub pairs: Loss,
    /// The likelihood of completions to imitate, with its weight, counted in tokens; none where the loss has no such part.
    pub tokens: Option<Loss>,
    /// The implicit reward of every chosen completion, `[pairs]`, without graph.
    pub chosen_rewards: Tensor<1>,
    /// The implicit reward of every rejected completion, `[pairs]`, without graph.
    pub rejected_rewards: Tensor<1>,
    /// The log-probability of every chosen completion as the loss read it (a sum, or a mean by token), `[pairs]`, without graph.
    pub chosen_log_probs: Tensor<1>,
    /// The log-probability of every rejected completion as the loss read it, `[pairs]`, without graph.
    pub rejected_log_probs: Tensor<1>,
    /// The log odds ratio of chosen over rejected (ORPO), `[pairs]`, without graph.
    pub log_odds: Option<Tensor<1>>,
    /// The mean of −ln π over the completions to imitate, `[1]`, without graph, also where it has no weight in the loss.
    pub nll: Tensor<1>,
    /// The entropy at every token of both completions, `[tokens]`, without graph, where the policy has it.
    pub entropy: Option<Tensor<1>>,
    /// 1 for every chosen token that is the most probable one, else 0, `[chosen tokens]`, where the policy has it.
    pub is_top1: Option<Tensor<1>>,
}

impl PreferenceLoss {
    /// The mean over this batch, `[1]`. Right for a step of one batch.
    pub fn mean(&self) -> Tensor<1> {
        let pairs = self.pairs.mean();
        match &self.tokens {
            None => pairs,
            Some(tokens) => pairs + tokens.mean(),
        }
    }

    /// This batch's part of a step of `pairs` pairs and `tokens` tokens to imitate, `[1]`. `tokens` is not read where the loss has no
    /// such part.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] when a total is less than this batch's own count.
    pub fn over(&self, pairs: usize, tokens: usize) -> Result<Tensor<1>> {
        let part = self.pairs.over(pairs)?;
        match &self.tokens {
            None => Ok(part),
            Some(own) => Ok(part + own.over(tokens)?),
        }
    }

    /// The numbers to log. Waits for the device.
    ///
    /// # Errors
    ///
    /// [`PeftError::DeviceRead`] when the device fails.
    pub fn metrics(&self) -> Result<PreferenceMetrics> {
        PreferenceMetrics::read(self)
    }
}
