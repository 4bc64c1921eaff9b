//! Correction of the difference between the policy that sampled and the same policy as training computes it.

use super::Level;
use crate::objective::{Ragged, segments};
use crate::{PeftError, Result};

/// What becomes of a weight out of range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OutOfRange {
    /// It is the bound (truncated importance sampling).
    #[default]
    Truncate,
    /// It is zero: the token or sequence is not learned from (masked importance sampling).
    Drop,
}

/// Options of [`importance_weights`]. The default truncates by token at 3.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Correction {
    /// What a weight is of. [`Level::SequenceSum`] is TRL's for sequences: it grows with their length, so that rounding alone drops long
    /// ones. [`Level::Sequence`] does not.
    pub level: Level,
    /// The least weight; none is no bound.
    pub min: Option<f64>,
    /// The greatest weight; none is no bound.
    pub max: Option<f64>,
    /// What becomes of a weight out of range.
    pub out_of_range: OutOfRange,
}

impl Default for Correction {
    fn default() -> Self {
        Self {
            level: Level::Token,
            min: None,
            max: Some(3.0),
            out_of_range: OutOfRange::Truncate,
        }
    }
}

impl Correction {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// With weights of something else.
    pub fn with_level(mut self, level: Level) -> Self {
        self.level = level;
        self
    }

    /// With these bounds.
    pub fn with_bounds(mut self, min: Option<f64>, max: Option<f64>) -> Self {
        [self.min, self.max] = [min, max];
        self
    }

    /// With another treatment of weights out of range.
    pub fn with_out_of_range(mut self, out_of_range: OutOfRange) -> Self {
        self.out_of_range = out_of_range;
        self
    }

    fn check(&self) -> Result<()> {
        for (name, bound) in [("min", self.min), ("max", self.max)] {
            if let Some(bound) = bound.filter(|bound| !(bound.is_finite() && *bound >= 0.0)) {
                return Err(PeftError::config(
                    name,
                    bound,
                    "a finite number, at least 0",
                ));
            }
        }
        match (self.min, self.max) {
            (Some(min), Some(max)) if min > max => Err(PeftError::config(
                "min",
                min,
                format!("at most `max`, {max}"),
            )),
            _ => Ok(()),
        }
    }
}

/// How far sampling and training are apart on the same weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mismatch {
    /// The mean of `|ℓ^old − ℓ^sample|` over tokens, in nats.
    pub mean: f32,
    /// The greatest one.
    pub max: f32,
    /// The least weight.
    pub weight_min: f32,
    /// The mean weight: over tokens, or over sequences where weights are of sequences.
    pub weight_mean: f32,
    /// The greatest weight.
    pub weight_max: f32,
    /// The share of weights that were out of range.
    pub out_of_range: f32,
}

/// `w = e^(ℓ^old − ℓ^sample)`, bounded, for every token, and the mismatch that it corrects.
///
/// `old` is recomputed by the model as it trains, before the first step; `sampled` was recorded while sampling, under the distribution
/// that was drawn from. Where `sampled` itself is taken for the old policy, no correction is needed.
///
/// # Errors
///
/// [`PeftError::Config`] for bounds out of range or order; for log-probabilities of other sequences, or one that is not finite, which it
/// names.
pub fn importance_weights(
    old: &Ragged,
    sampled: &Ragged,
    correction: &Correction,
) -> Result<(Ragged, Mismatch)> {
    correction.check()?;
    segments::same_lens("sampled", sampled.lens(), old.lens())?;
    old.check_finite("old")?;
    sampled.check_finite("sampled")?;
    let min = correction.min.unwrap_or(f64::NEG_INFINITY);
    let max = correction.max.unwrap_or(f64::INFINITY);
    let mut outside = 0usize;
    let mut bounded = |weight: f64| {
        let inside = (min..=max).contains(&weight);
        outside += usize::from(!inside);
        match correction.out_of_range {
            _ if inside => weight,
            OutOfRange::Truncate => weight.clamp(min, max),
            OutOfRange::Drop => 0.0,
        }
    };

    let mut weights = Vec::with_capacity(old.tokens());
    let mut distinct = Vec::new();
    let [mut sum, mut most] = [0.0, 0f64];
    for (old, sampled) in old.rows().zip(sampled.rows()) {
        let pairs = old.iter().zip(sampled);
        let differences: Vec<f64> = pairs.map(|(o, s)| f64::from(*o) - f64::from(*s)).collect();
        for difference in &differences {
            sum += difference.abs();
            most = most.max(difference.abs());
        }
        let total: f64 = differences.iter().sum();
        let len = differences.len();
        let of_sequence = match correction.level {
            Level::Token => None,
            Level::Sequence => Some(total / len as f64),
            Level::SequenceSum => Some(total),
        };
        match of_sequence {
            None => {
                let own = differences.iter().map(|d| bounded(d.exp()));
                distinct.extend(own);
                weights.extend_from_slice(&distinct[distinct.len() - len..]);
            }
            Some(log_weight) => {
                let weight = bounded(log_weight.exp());
                distinct.push(weight);
                weights.extend(std::iter::repeat_n(weight, len));
            }
        }
    }
    let count = distinct.len() as f64;
    let mismatch = Mismatch {
        mean: (sum / old.tokens() as f64) as f32,
        max: most as f32,
        weight_min: distinct.iter().copied().fold(f64::INFINITY, f64::min) as f32,
        weight_mean: (distinct.iter().sum::<f64>() / count) as f32,
        weight_max: distinct.iter().copied().fold(0.0, f64::max) as f32,
        out_of_range: (outside as f64 / count) as f32,
    };
    let weights = old.with_values(weights.into_iter().map(|w| w as f32).collect());
    weights.check_finite("weights")?;
    Ok((weights, mismatch))
}

/// Weights that leave out sequences of negative advantage that the policy has moved away from: 0 where the advantage is negative and
/// `mean_t(ℓ^sample − ℓ)` is above the threshold, else 1 ([DeepSeek-V3.2](https://arxiv.org/abs/2512.02556)).
///
/// # Errors
///
/// [`PeftError::Config`] for log-probabilities of other sequences, or a number that is not finite, which it names.
/// [`PeftError::Shape`] where advantages are not one for each sequence.
pub fn off_policy_weights(
    current: &Ragged,
    sampled: &Ragged,
    advantages: &[f32],
    threshold: f64,
) -> Result<Ragged> {
    segments::same_lens("sampled", sampled.lens(), current.lens())?;
    segments::same_count("advantages", advantages.len(), current.sequences())?;
    segments::finite("advantages", advantages)?;
    current.check_finite("current")?;
    sampled.check_finite("sampled")?;
    if !threshold.is_finite() {
        return Err(PeftError::config("threshold", threshold, "a finite number"));
    }
    let rows = current.rows().zip(sampled.rows()).zip(advantages);
    let kept = rows.map(|((current, sampled), advantage)| {
        let pairs = current.iter().zip(sampled);
        let sum: f64 = pairs.map(|(c, s)| f64::from(*s) - f64::from(*c)).sum();
        let near = sum / current.len() as f64 <= threshold;
        f32::from(u8::from(*advantage >= 0.0 || near))
    });
    Ragged::spread(&kept.collect::<Vec<_>>(), current.shared_lens())
}
