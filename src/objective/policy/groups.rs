//! Advantages from the rewards of several completions of one prompt.

use crate::objective::segments;
use crate::{PeftError, Result};

/// What divides the difference of a reward to its group's mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// The standard deviation of the group ([GRPO](https://arxiv.org/abs/2402.03300)).
    #[default]
    Group,
    /// The standard deviation of all rewards of the batch.
    Batch,
    /// Nothing ([Dr. GRPO](https://arxiv.org/abs/2503.20783)): a prompt that is nearly always, or nearly never solved has no more weight.
    None,
}

/// One advantage for each completion, and what to log of the rewards.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupAdvantages {
    /// One for each completion, in the order of the rewards.
    pub values: Vec<f32>,
    /// The mean reward of the batch.
    pub mean: f32,
    /// The standard deviation of the batch's rewards (n − 1).
    pub std: f32,
    /// The share of groups whose rewards are all equal: nothing is learned from them.
    pub equal_groups: f32,
}

/// Added to a standard deviation before it divides, as TRL does.
const EPSILON: f64 = 1e-4;

/// `A = (R − mean of the group) / (std + 1e-4)`, with the unbiased standard deviation (n − 1).
///
/// `rewards` holds group after group, `group` completions of one prompt each. [`Ragged::spread`](crate::objective::Ragged::spread)
/// gives every token its sequence's advantage.
///
/// # Errors
///
/// [`PeftError::Config`] for a group of fewer than two, for rewards that are not whole groups, and for a reward that is not finite, which
/// it names.
pub fn group_advantages(rewards: &[f32], group: usize, scale: Scale) -> Result<GroupAdvantages> {
    check(rewards, group)?;
    let batch_std = moments(rewards).1;
    let values = rewards.chunks(group).flat_map(|rewards| {
        let (mean, std) = moments(rewards);
        let divisor = match scale {
            Scale::Group => std + EPSILON,
            Scale::Batch => batch_std + EPSILON,
            Scale::None => 1.0,
        };
        rewards
            .iter()
            .map(move |reward| ((f64::from(*reward) - mean) / divisor) as f32)
    });
    Ok(described(values.collect(), rewards, group))
}

/// `A = R − mean of the others of the group` ([RLOO](https://arxiv.org/abs/2402.14740)).
///
/// RLOO has the divergence from the reference in the reward: `R − β·Σ_t (ℓ_t − ℓ^ref_t)`.
///
/// # Errors
///
/// As [`group_advantages`].
pub fn leave_one_out(rewards: &[f32], group: usize) -> Result<GroupAdvantages> {
    check(rewards, group)?;
    let values = rewards.chunks(group).flat_map(|rewards| {
        let sum: f64 = rewards.iter().map(|reward| f64::from(*reward)).sum();
        rewards.iter().map(move |reward| {
            let reward = f64::from(*reward);
            (reward - (sum - reward) / (group - 1) as f64) as f32
        })
    });
    Ok(described(values.collect(), rewards, group))
}

/// The weighted sum of several reward functions, one column of all completions each.
///
/// # Errors
///
/// [`PeftError::Config`] for no columns, and for a reward or a weight that is not finite; [`PeftError::Shape`] for a column of another
/// length than the first. The column and the row are named.
pub fn weighted_rewards(columns: &[(&[f32], f64)]) -> Result<Vec<f32>> {
    let rows = check_columns(columns)?;
    let sum = |row: usize| {
        let terms = columns.iter().map(|(column, w)| f64::from(column[row]) * w);
        terms.sum::<f64>() as f32
    };
    Ok((0..rows).map(sum).collect())
}

/// Advantages of several reward functions that are each normalised in its group, summed with their weights, and normalised over the
/// batch ([GDPO](https://arxiv.org/abs/2601.05242)): no function drowns another one of a smaller range.
///
/// # Errors
///
/// As [`weighted_rewards`] and [`group_advantages`].
pub fn normalized_then_summed(columns: &[(&[f32], f64)], group: usize) -> Result<GroupAdvantages> {
    let rows = check_columns(columns)?;
    let mut sums = vec![0.0; rows];
    for (column, weight) in columns {
        check(column, group)?;
        let groups = column.chunks(group).zip(sums.chunks_mut(group));
        for (rewards, sums) in groups {
            let (mean, std) = moments(rewards);
            for (reward, sum) in rewards.iter().zip(sums) {
                *sum += weight * (f64::from(*reward) - mean) / (std + EPSILON);
            }
        }
    }
    let mean = sums.iter().sum::<f64>() / rows as f64;
    let variance = sums.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (rows - 1) as f64;
    let scale = variance.sqrt() + EPSILON;
    let values = sums.iter().map(|sum| ((sum - mean) / scale) as f32);
    Ok(described(
        values.collect(),
        &weighted_rewards(columns)?,
        group,
    ))
}

fn described(values: Vec<f32>, rewards: &[f32], group: usize) -> GroupAdvantages {
    let (mean, std) = moments(rewards);
    let equal = |rewards: &&[f32]| rewards.iter().all(|reward| *reward == rewards[0]);
    let groups = rewards.len() / group;
    GroupAdvantages {
        values,
        mean: mean as f32,
        std: std as f32,
        equal_groups: (rewards.chunks(group).filter(equal).count() as f64 / groups as f64) as f32,
    }
}

/// Mean and unbiased standard deviation of at least two numbers.
fn moments(values: &[f32]) -> (f64, f64) {
    let all = || values.iter().map(|value| f64::from(*value));
    let mean = all().sum::<f64>() / values.len() as f64;
    let variance = all().map(|x| (x - mean).powi(2)).sum::<f64>() / (values.len() - 1) as f64;
    (mean, variance.sqrt())
}

fn check(rewards: &[f32], group: usize) -> Result<()> {
    if group < 2 {
        return Err(PeftError::config(
            "group",
            group,
            "at least 2 completions of each prompt: a single one has nothing to be compared with",
        ));
    }
    if rewards.is_empty() || !rewards.len().is_multiple_of(group) {
        return Err(PeftError::config(
            "rewards",
            rewards.len(),
            format!("a multiple of {group}, the completions of one prompt"),
        ));
    }
    segments::finite("rewards", rewards)
}

fn check_columns(columns: &[(&[f32], f64)]) -> Result<usize> {
    let Some((first, _)) = columns.first() else {
        return Err(PeftError::config(
            "reward functions",
            0,
            "at least one column of rewards",
        ));
    };
    for (index, (column, weight)) in columns.iter().enumerate() {
        let name = format!("rewards of function {index}");
        segments::same_count(&name, column.len(), first.len())?;
        segments::finite(&name, column)?;
        if !weight.is_finite() {
            let name = format!("weight of reward function {index}");
            return Err(PeftError::config(name, weight, "a finite number"));
        }
    }
    Ok(first.len())
}
