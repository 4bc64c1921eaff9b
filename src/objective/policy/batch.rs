//! What a policy loss is of.

use crate::Result;
use crate::objective::{LogProbs, Ragged, segments};

/// Sampled completions under the policy now, under the policy that sampled them, and their advantages.
#[derive(Clone, Copy, Debug)]
pub struct PolicyBatch<'a> {
    pub(super) new: &'a LogProbs,
    pub(super) old: &'a LogProbs,
    pub(super) advantages: &'a Ragged,
    pub(super) reference: Option<&'a LogProbs>,
    pub(super) weights: Option<&'a Ragged>,
}

impl<'a> PolicyBatch<'a> {
    /// - `new`: by the policy that is trained, with its gradient
    /// - `old`: by the policy before the first step on these samples; `new` itself where a single step is taken on them. Its gradient is
    ///   not used. [`Ragged::to_log_probs`] makes it of numbers that a sampler recorded.
    /// - `advantages`: by token; [`Ragged::spread`] makes them of one for each sequence
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`](crate::PeftError::Config) where they are not of the same sequences, or an advantage is not finite, which it names.
    pub fn new(new: &'a LogProbs, old: &'a LogProbs, advantages: &'a Ragged) -> Result<Self> {
        segments::same_lens("old", old.lens(), new.lens())?;
        segments::same_lens("advantages", advantages.lens(), new.lens())?;
        advantages.check_finite("advantages")?;
        Ok(Self {
            new,
            old,
            advantages,
            reference: None,
            weights: None,
        })
    }

    /// With the reference's log-probabilities, for a divergence in the loss.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`](crate::PeftError::Config) where they are of other sequences.
    pub fn with_reference(mut self, reference: &'a LogProbs) -> Result<Self> {
        segments::same_lens("reference", reference.lens(), self.new.lens())?;
        self.reference = Some(reference);
        Ok(self)
    }

    /// With a weight for every token's term, as [`importance_weights`](super::importance_weights) gives them. The divergence from the
    /// reference is not weighted.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`](crate::PeftError::Config) where they are of other sequences, or one is negative or not finite, which it names.
    pub fn with_weights(mut self, weights: &'a Ragged) -> Result<Self> {
        segments::same_lens("weights", weights.lens(), self.new.lens())?;
        weights.check_finite("weights")?;
        weights.check_each("weights", "at least 0", |weight| weight >= 0.0)?;
        self.weights = Some(weights);
        Ok(self)
    }
}
