//! Reward models: scores of pairs, by Bradley and Terry.

use burn::tensor::Tensor;
use burn::tensor::activation::log_sigmoid;

use super::{Loss, read, segments};
use crate::tensor::constant;
use crate::{PeftError, Result};

/// The loss of one (micro-)batch of scored pairs.
#[derive(Clone, Debug)]
pub struct RewardLoss {
    /// The sum over the pairs.
    pub loss: Loss,
    /// Scores of the chosen completions, `[pairs]`, without graph.
    pub chosen: Tensor<1>,
    /// Scores of the rejected completions, `[pairs]`, without graph.
    pub rejected: Tensor<1>,
}

/// Numbers over a batch of scored pairs, under the names that TRL logs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RewardMetrics {
    /// `accuracy`: the share of pairs with the higher score for the chosen one. Equal scores do not count.
    pub accuracy: f32,
    /// `margin`: the mean of chosen less rejected.
    pub margin: f32,
    /// `min_reward`: the least score.
    pub min: f32,
    /// `mean_reward`: the mean score.
    pub mean: f32,
    /// `max_reward`: the greatest score.
    pub max: f32,
}

/// The negative log-likelihood of preferences under Bradley and Terry's model.
///
/// ```text
/// loss = Σ_i [ −ln σ(s_c − s_r − margin) + c·(s_c + s_r)² ]
/// ```
///
/// The second term centres the scores: only their difference is learned otherwise ([Eisenstein et al. 2023](https://arxiv.org/abs/2312.09244);
/// `c` = 0.01 is usual, 0 leaves it out).
///
/// # Shapes
///
/// - `chosen`, `rejected`: `[pairs]`, the score at the last token of each completion
/// - `margins`: one for each pair, or none
///
/// # Errors
///
/// [`PeftError::Shape`] where there are not as many of each; [`PeftError::Config`] for no pairs, for a margin that is not finite (it names
/// the pair), and for `centering` below 0.
pub fn bradley_terry_loss(
    chosen: Tensor<1>,
    rejected: Tensor<1>,
    margins: Option<&[f32]>,
    centering: f64,
) -> Result<RewardLoss> {
    let [pairs] = chosen.dims();
    if pairs == 0 {
        return Err(PeftError::config("pairs", 0, "at least one"));
    }
    segments::same_count("rejected", rejected.dims()[0], pairs)?;
    if !(centering.is_finite() && centering >= 0.0) {
        return Err(PeftError::config(
            "centering",
            centering,
            "a finite number, at least 0",
        ));
    }
    let mut difference = chosen.clone() - rejected.clone();
    if let Some(margins) = margins {
        segments::same_count("margins", margins.len(), pairs)?;
        segments::finite("margins", margins)?;
        let margins = margins.iter().map(|margin| f64::from(*margin)).collect();
        difference = difference.clone() - segments::host(margins, &difference);
    }
    let mut sum = -log_sigmoid(difference).sum();
    if centering > 0.0 {
        sum = sum + (chosen.clone() + rejected.clone()).square().sum() * centering;
    }
    Ok(RewardLoss {
        loss: Loss { sum, count: pairs },
        chosen: constant(chosen),
        rejected: constant(rejected),
    })
}

impl RewardLoss {
    /// The numbers to log. Waits for the device.
    ///
    /// # Errors
    ///
    /// [`PeftError::DeviceRead`] when the device fails.
    pub fn metrics(&self) -> Result<RewardMetrics> {
        let chosen = read("chosen scores", self.chosen.clone())?;
        let rejected = read("rejected scores", self.rejected.clone())?;
        let pairs = || chosen.iter().zip(&rejected);
        let all = || chosen.iter().chain(&rejected);
        let count = chosen.len() as f64;
        let wins = pairs().filter(|(c, r)| c > r).count();
        let margin: f64 = pairs().map(|(c, r)| f64::from(*c) - f64::from(*r)).sum();
        let sum: f64 = all().map(|score| f64::from(*score)).sum();
        Ok(RewardMetrics {
            accuracy: (wins as f64 / count) as f32,
            margin: (margin / count) as f32,
            min: all().copied().fold(f32::INFINITY, f32::min),
            mean: (sum / (2.0 * count)) as f32,
            max: all().copied().fold(f32::NEG_INFINITY, f32::max),
        })
    }
}
