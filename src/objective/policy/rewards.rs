//! From the score of a completion to the rewards of its tokens.

use super::KlEstimator;
use crate::objective::{Ragged, segments};
use crate::{PeftError, Result};

/// Options of [`token_rewards`]. By default the score alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RewardShaping {
    /// β, the weight of the divergence from the reference, in every token's reward; at least 0.
    pub kl_coef: f64,
    /// The estimate of the divergence; `K1` is the unbiased one in a reward.
    pub estimator: KlEstimator,
    /// Taken off the score of a completion that did not end by itself; none leaves it.
    pub missing_end_penalty: Option<f64>,
    /// The bounds of the score after the penalty are `±` this; none is no bound.
    pub clip: Option<f64>,
}

impl Default for RewardShaping {
    fn default() -> Self {
        Self {
            kl_coef: 0.0,
            estimator: KlEstimator::K1,
            missing_end_penalty: None,
            clip: None,
        }
    }
}

impl RewardShaping {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// With the divergence from the reference in the reward.
    pub fn with_kl(mut self, coef: f64, estimator: KlEstimator) -> Self {
        self.kl_coef = coef;
        self.estimator = estimator;
        self
    }

    /// With a penalty for completions that did not end by themselves.
    pub fn with_missing_end_penalty(mut self, penalty: f64) -> Self {
        self.missing_end_penalty = Some(penalty);
        self
    }

    /// With bounds of the score.
    pub fn with_clip(mut self, clip: f64) -> Self {
        self.clip = Some(clip);
        self
    }

    fn check(&self) -> Result<()> {
        let at_least_zero = [
            ("kl_coef", Some(self.kl_coef)),
            ("missing_end_penalty", self.missing_end_penalty),
            ("clip", self.clip),
        ];
        for (name, value) in at_least_zero {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value >= 0.0)) {
                return Err(PeftError::config(
                    name,
                    value,
                    "a finite number, at least 0",
                ));
            }
        }
        Ok(())
    }
}

/// The rewards of tokens, and what they are made of.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenRewards {
    /// The reward of every token.
    pub rewards: Ragged,
    /// The score of every sequence, after penalty and bounds.
    pub scores: Vec<f32>,
    /// `Σ_t (ln π − ln π_ref)` of every sequence: for the log, and for [`AdaptiveKl`](super::AdaptiveKl).
    pub kl: Vec<f32>,
}

/// Rewards by token: the divergence from the reference at each, and the score at the last one.
///
/// ```text
/// r_t = −β·k(ln π(y_t) − ln π_ref(y_t)) + [t = n]·S        S = clip(score − penalty·[no end], ±c)
/// ```
///
/// - `scores`: one for each sequence
/// - `ended`: whether each completion ended with a stop token
/// - `old`, `reference`: log-probabilities of the sampled tokens, by the policy that sampled them and by the reference
///
/// # Errors
///
/// [`PeftError::Config`] for an option out of range; for a score or a log-probability that is not finite, and for a reference with other
/// sequences, which it names. [`PeftError::Shape`] where scores or ends are not one for each sequence.
pub fn token_rewards(
    scores: &[f32],
    ended: &[bool],
    old: &Ragged,
    reference: &Ragged,
    shaping: &RewardShaping,
) -> Result<TokenRewards> {
    shaping.check()?;
    segments::same_count("scores", scores.len(), old.sequences())?;
    segments::same_count("ended", ended.len(), old.sequences())?;
    segments::finite("scores", scores)?;
    segments::same_lens("reference", reference.lens(), old.lens())?;
    old.check_finite("old")?;
    reference.check_finite("reference")?;

    let mut rewards = Vec::with_capacity(old.tokens());
    let mut final_scores = Vec::with_capacity(scores.len());
    let mut kl = Vec::with_capacity(scores.len());
    let rows = old.rows().zip(reference.rows());
    for ((old, reference), (score, ended)) in rows.zip(scores.iter().zip(ended)) {
        let mut score = f64::from(*score);
        if let Some(penalty) = shaping.missing_end_penalty.filter(|_| !*ended) {
            score -= penalty;
        }
        if let Some(clip) = shaping.clip {
            score = score.clamp(-clip, clip);
        }
        let mut total = 0.0;
        for (t, (old_t, reference_t)) in old.iter().zip(reference).enumerate() {
            let d = f64::from(*old_t) - f64::from(*reference_t);
            total += d;
            let penalty = match shaping.kl_coef == 0.0 {
                true => 0.0,
                false => shaping.kl_coef * shaping.estimator.value(d),
            };
            let last = t + 1 == old.len();
            rewards.push((if last { score } else { 0.0 } - penalty) as f32);
        }
        final_scores.push(score as f32);
        kl.push(total as f32);
    }
    let rewards = old.with_values(rewards);
    rewards.check_finite("rewards")?;
    Ok(TokenRewards {
        rewards,
        scores: final_scores,
        kl,
    })
}
