//! From logits to the distribution from which a token is drawn.

use super::sampler::Sampler;

/// How many of the most likely tokens are sorted at first; eight times as many whenever these do not reach top-p.
const SORTED: usize = 64;

/// The tokens that may be drawn, in ascending order, with their probabilities.
///
/// Tokens stand in the order of their numbers and not of their probabilities: a small change of the logits then moves the boundaries
/// between tokens by as little, and never makes two tokens change places.
#[derive(Clone, Debug, PartialEq)]
pub struct Distribution {
    /// `(token, exp(score − largest score))`.
    weights: Vec<(u32, f64)>,
    total: f64,
}

impl Distribution {
    /// Of logits that [`first_bad`] found nothing in.
    pub(super) fn new(
        sampler: &Sampler,
        logits: &[f32],
        context: impl Iterator<Item = u32>,
    ) -> Self {
        if sampler.repetition_penalty == 1.0 {
            return Self::of_scores(sampler, logits);
        }
        let mut scores = logits.to_vec();
        let penalty = sampler.repetition_penalty as f32;
        for token in context {
            // From the logit, so that a token that occurs twice is punished once.
            let logit = logits[token as usize];
            let score = match logit < 0.0 {
                true => logit * penalty,
                false => logit / penalty,
            };
            if logit > f32::NEG_INFINITY {
                scores[token as usize] = score.clamp(f32::MIN, f32::MAX);
            }
        }
        Self::of_scores(sampler, &scores)
    }

    fn of_scores(sampler: &Sampler, scores: &[f32]) -> Self {
        if sampler.is_greedy() {
            return Self {
                weights: vec![(first_best(scores) as u32, 1.0)],
                total: 1.0,
            };
        }
        let best = largest(scores);
        let mut lowest = f32::NEG_INFINITY;
        if let Some(k) = sampler.top_k.filter(|k| *k < scores.len()) {
            let mut values = scores.to_vec();
            let (_, kth, _) = values.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
            lowest = *kth;
        }
        let kept = scores.iter().enumerate();
        let kept = kept.filter(|(_, score)| **score >= lowest && **score > f32::NEG_INFINITY);
        let best = f64::from(best);
        let weight = |score: f32| ((f64::from(score) - best) / sampler.temperature).exp();
        let mut weights: Vec<(u32, f64)> = kept
            .map(|(token, score)| (token as u32, weight(*score)))
            .collect();
        if sampler.top_p < 1.0 {
            keep_top_p(&mut weights, sampler.top_p);
        }
        if sampler.min_p > 0.0 {
            // The best token's weight is 1, and it is always kept.
            weights.retain(|(_, weight)| *weight >= sampler.min_p);
        }
        weights.sort_unstable_by_key(|(token, _)| *token);
        Self {
            total: weights.iter().map(|(_, weight)| weight).sum(),
            weights,
        }
    }

    /// The tokens with their probabilities, which sum to 1, in ascending order of tokens.
    pub fn probabilities(&self) -> impl Iterator<Item = (u32, f64)> {
        self.weights
            .iter()
            .map(|(token, weight)| (*token, weight / self.total))
    }

    /// The probability of a token; 0 if it is never drawn.
    pub fn probability(&self, token: u32) -> f64 {
        let place = self
            .weights
            .binary_search_by_key(&token, |(token, _)| *token);
        place.map_or(0.0, |place| self.weights[place].1 / self.total)
    }

    /// The token at `uniform` in `[0, 1)` of the cumulative distribution, and its log-probability.
    pub fn draw(&self, uniform: f64) -> (u32, f64) {
        let mut left = uniform * self.total;
        let drawn = self.weights.iter().find(|(_, weight)| {
            left -= weight;
            left < 0.0
        });
        // Rounding may leave something after the last token. A weight that underflowed to zero is never drawn.
        let last = || self.weights.iter().rfind(|(_, weight)| *weight > 0.0);
        let (token, weight) = drawn.or_else(last).expect("a distribution has a token");
        (*token, (weight / self.total).ln())
    }
}

/// Keeps the heaviest tokens until their share of the total reaches `top_p`; the token that crosses it is kept.
fn keep_top_p(weights: &mut Vec<(u32, f64)>, top_p: f64) {
    let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
    let by_weight = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let mut sorted = SORTED;
    loop {
        let len = weights.len();
        let end = sorted.min(len);
        if end < len {
            weights.select_nth_unstable_by(end, by_weight);
        }
        weights[..end].sort_unstable_by(by_weight);
        let mut before = 0.0;
        let kept = weights[..end].iter().position(|(_, weight)| {
            let is_full = before >= top_p * total;
            before += weight;
            is_full
        });
        if let Some(kept) = kept {
            weights.truncate(kept.max(1));
            return;
        }
        if end == len {
            return;
        }
        sorted *= 8;
    }
}

/// The index of a logit from which no distribution follows: NaN, +∞, or the first of none that is finite.
pub(super) fn first_bad(logits: &[f32]) -> Option<usize> {
    // One pass without branches decides for nearly all rows.
    let is_fine = logits.iter().all(|logit| *logit < f32::INFINITY);
    match is_fine && logits.iter().any(|logit| *logit > f32::NEG_INFINITY) {
        true => None,
        false => {
            let bad = logits
                .iter()
                .position(|logit| logit.is_nan() || *logit == f32::INFINITY);
            Some(bad.unwrap_or(0))
        }
    }
}

/// The largest of logits without NaN.
pub(super) fn largest(logits: &[f32]) -> f32 {
    logits.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// `ln Σ exp(logits / temperature)`.
pub(super) fn log_sum(logits: &[f32], temperature: f64) -> f64 {
    let best = f64::from(largest(logits));
    let scaled = |logit: &f32| ((f64::from(*logit) - best) / temperature).exp();
    let sum: f64 = logits.iter().map(scaled).sum();
    best / temperature + sum.ln()
}

fn first_best(scores: &[f32]) -> usize {
    let best = largest(scores);
    let first = scores.iter().position(|score| *score == best);
    first.expect("scores have a largest one")
}
