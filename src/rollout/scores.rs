//! The scores of a batch of completions, by reward.

use std::fmt;

/// What completions are worth, in their order.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    /// The weighted sum of each completion: `Σ weight · score` over the rewards that apply to it. Finite.
    pub totals: Vec<f64>,
    /// The scores of each reward, unweighted.
    pub columns: Vec<RewardColumn>,
}

/// The scores of one reward.
#[derive(Clone, Debug, PartialEq)]
pub struct RewardColumn {
    /// Its name.
    pub name: String,
    /// Its weight.
    pub weight: f64,
    /// Its score of each completion, none where it does not apply. Finite.
    pub values: Vec<Option<f64>>,
}

/// Mean and spread of the scores of one reward.
#[derive(Clone, Debug, PartialEq)]
pub struct RewardSummary {
    /// Its name.
    pub name: String,
    /// How many completions it applied to.
    pub count: usize,
    /// Mean of the scores; 0 of none.
    pub mean: f64,
    /// Standard deviation of the scores, with `count − 1`; 0 of fewer than two.
    pub std: f64,
}

impl Scores {
    /// Mean and spread of every reward, in order.
    pub fn summary(&self) -> Vec<RewardSummary> {
        let of = |column: &RewardColumn| {
            let values: Vec<f64> = column.values.iter().copied().flatten().collect();
            RewardSummary::new(&column.name, &values)
        };
        self.columns.iter().map(of).collect()
    }

    /// Mean and spread of the weighted sums, under the name `total`.
    pub fn total(&self) -> RewardSummary {
        RewardSummary::new("total", &self.totals)
    }
}

impl RewardSummary {
    fn new(name: &str, values: &[f64]) -> Self {
        let count = values.len();
        let mean = values.iter().sum::<f64>() / count.max(1) as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let variance = squares / count.saturating_sub(1).max(1) as f64;
        Self {
            name: name.to_owned(),
            count,
            mean,
            std: variance.sqrt(),
        }
    }
}

impl fmt::Display for RewardSummary {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self {
            name,
            count,
            mean,
            std,
        } = self;
        write!(f, "{name} {mean:.4} ± {std:.4} (n = {count})")
    }
}
