//! What a training loop logs of a loss of pairs.

use burn::tensor::Tensor;
use burn::tensor::activation::log_sigmoid;

use super::{Pairs, PreferenceLoss};
use crate::Result;
use crate::objective::read;
use crate::tensor::constant;

/// Means over a batch of pairs, under the names that TRL logs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PreferenceMetrics {
    /// `rewards/chosen`: the mean implicit reward of the chosen completions.
    pub reward_chosen: f32,
    /// `rewards/rejected`: that of the rejected ones.
    pub reward_rejected: f32,
    /// `rewards/accuracies`: the share of pairs with a higher reward for the chosen one. Equal rewards do not count, so it is 0
    /// where policy and reference are equal.
    pub accuracy: f32,
    /// `rewards/margins`: the mean of chosen less rejected.
    pub margin: f32,
    /// `logps/chosen`: the mean log-probability of the chosen completions.
    pub log_probs_chosen: f32,
    /// `logps/rejected`: that of the rejected ones.
    pub log_probs_rejected: f32,
    /// `nll_loss`: the mean of −ln π over the tokens to imitate.
    pub nll: f32,
    /// `entropy`: the mean over the tokens of both completions.
    pub entropy: Option<f32>,
    /// `mean_token_accuracy`: the share of chosen tokens that are the most probable ones.
    pub token_accuracy: Option<f32>,
    /// `log_odds_chosen`: the mean log odds ratio (ORPO).
    pub log_odds: Option<f32>,
    /// `log_odds_ratio`: the mean of its ln σ (ORPO).
    pub log_odds_ratio: Option<f32>,
}

impl PreferenceMetrics {
    pub(super) fn read(loss: &PreferenceLoss) -> Result<Self> {
        let [chosen, rejected] = [&loss.chosen_rewards, &loss.rejected_rewards];
        let wins = chosen.clone().greater(rejected.clone()).float();
        let wins = crate::tensor::cast(wins, chosen.dtype().into());
        let margins = chosen.clone() - rejected.clone();
        let mut means: Vec<Tensor<1>> = vec![
            chosen.clone().mean(),
            rejected.clone().mean(),
            wins.mean(),
            margins.mean(),
            loss.chosen_log_probs.clone().mean(),
            loss.rejected_log_probs.clone().mean(),
            loss.nll.clone(),
        ];
        let ratio = loss.log_odds.clone().map(log_sigmoid);
        let optional = [&loss.entropy, &loss.is_top1, &loss.log_odds, &ratio];
        means.extend(optional.iter().filter_map(|x| x.as_ref()).map(|x| {
            let mean = x.clone().mean();
            crate::tensor::cast(mean, chosen.dtype().into())
        }));

        let mut values = read("metrics", Tensor::cat(means, 0))?.into_iter();
        let mut next = || values.next().expect("one value for each mean");
        let required: [f32; 7] = std::array::from_fn(|_| next());
        let [entropy, token_accuracy, log_odds, log_odds_ratio] =
            optional.map(|x| x.as_ref().map(|_| next()));
        let [
            reward_chosen,
            reward_rejected,
            accuracy,
            margin,
            log_probs_chosen,
            log_probs_rejected,
            nll,
        ] = required;
        Ok(Self {
            reward_chosen,
            reward_rejected,
            accuracy,
            margin,
            log_probs_chosen,
            log_probs_rejected,
            nll,
            entropy,
            token_accuracy,
            log_odds,
            log_odds_ratio,
        })
    }
}

/// The entropy of both completions' tokens, without graph, where the policy has it.
pub(super) fn entropy(policy: &Pairs) -> Option<Tensor<1>> {
    let sides = [&policy.chosen, &policy.rejected];
    let sides: Option<Vec<_>> = sides.iter().map(|side| side.entropy.clone()).collect();
    sides.map(|sides| constant(Tensor::cat(sides, 0)))
}
