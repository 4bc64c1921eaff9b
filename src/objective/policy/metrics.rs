//! What a training loop logs of a policy loss.

use super::{Level, PolicyLoss};
use crate::Result;
use crate::objective::read;

/// Means over a batch of completions. "Mean" is over tokens with ratios of tokens, over sequences with ratios of sequences, as TRL logs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyMetrics {
    /// `clip_ratio/low_mean`: the share with a ratio below the lower bound and a negative advantage.
    pub clip_low: f32,
    /// `clip_ratio/high_mean`: the share with a ratio above the upper bound and a positive advantage (CISPO: above its maximum).
    pub clip_high: f32,
    /// `clip_ratio/region_mean`: the sum of both; PPO's clip fraction.
    pub clip_fraction: f32,
    /// `clip_ratio/low_min`: the least share of a sequence.
    pub clip_low_min: f32,
    /// `clip_ratio/high_max`: the greatest share of a sequence.
    pub clip_high_max: f32,
    /// The mean ratio. PPO of TRL left out batches above 10.
    pub ratio_mean: f32,
    /// The greatest ratio.
    pub ratio_max: f32,
    /// `½·mean (ℓ − ℓ^old)²` over tokens: how far this policy is from the one that sampled.
    pub approx_kl: f32,
    /// `kl`: the mean of the divergence in the loss over tokens, with its ratio where the loss has that.
    pub kl: Option<f32>,
    /// `entropy`: the mean over tokens, where the policy has it.
    pub entropy: Option<f32>,
}

impl PolicyMetrics {
    pub(super) fn read(loss: &PolicyLoss) -> Result<Self> {
        let log_ratio = read("log-ratios", loss.log_ratio.clone())?;
        let mean_of = |name, x: &Option<burn::tensor::Tensor<1>>| match x {
            None => Ok(None),
            Some(x) => Ok(Some(read(name, x.clone().mean())?[0])),
        };
        let (kl, entropy) = (
            mean_of("kl", &loss.kl)?,
            mean_of("entropy", &loss.entropies)?,
        );

        let (lowest, highest) = loss.config.surrogate.bounds();
        let mut start = 0;
        let mut all = Sums::default();
        let [mut low_min, mut high_max] = [f64::INFINITY, f64::NEG_INFINITY];
        for len in &loss.lens {
            let tokens = start..start + len;
            start = tokens.end;
            let advantages = &loss.advantages[tokens.clone()];
            let row: Vec<f64> = log_ratio[tokens].iter().map(|r| f64::from(*r)).collect();
            let sum: f64 = row.iter().sum();
            let ratio = |t: usize| match loss.config.level {
                Level::Token => row[t].exp(),
                Level::Sequence => (sum / *len as f64).exp(),
                Level::SequenceSum => sum.exp(),
            };
            let mut own = Sums::default();
            for (t, advantage) in advantages.iter().enumerate() {
                let ratio = ratio(t);
                own.low += f64::from(ratio < lowest && *advantage < 0.0);
                own.high += f64::from(ratio > highest && *advantage > 0.0);
                own.ratio += ratio;
                own.ratio_max = own.ratio_max.max(ratio);
                own.squares += row[t] * row[t];
            }
            low_min = low_min.min(own.low / *len as f64);
            high_max = high_max.max(own.high / *len as f64);
            // A ratio of a sequence counts once, not once for each token.
            let weight = match loss.config.level {
                Level::Token => 1.0,
                _ => 1.0 / *len as f64,
            };
            all.low += own.low * weight;
            all.high += own.high * weight;
            all.ratio += own.ratio * weight;
            all.ratio_max = all.ratio_max.max(own.ratio_max);
            all.squares += own.squares;
        }
        let tokens = log_ratio.len() as f64;
        let count = match loss.config.level {
            Level::Token => tokens,
            _ => loss.lens.len() as f64,
        };
        Ok(Self {
            clip_low: (all.low / count) as f32,
            clip_high: (all.high / count) as f32,
            clip_fraction: ((all.low + all.high) / count) as f32,
            clip_low_min: low_min as f32,
            clip_high_max: high_max as f32,
            ratio_mean: (all.ratio / count) as f32,
            ratio_max: all.ratio_max as f32,
            approx_kl: (0.5 * all.squares / tokens) as f32,
            kl,
            entropy,
        })
    }
}

/// Sums over tokens.
#[derive(Default)]
struct Sums {
    low: f64,
    high: f64,
    ratio: f64,
    ratio_max: f64,
    squares: f64,
}
