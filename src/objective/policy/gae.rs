//! Generalised advantage estimation, and the reward to go.

use crate::objective::{Ragged, segments};
use crate::{PeftError, Result};

/// Advantages and returns of every token.
#[derive(Clone, Debug, PartialEq)]
pub struct Advantages {
    /// `A_t`, not whitened: [`whiten`](super::whiten) does that.
    pub advantages: Ragged,
    /// `R_t = A_t + V_t`, what the value head learns.
    pub returns: Ragged,
}

/// [Generalised advantage estimation](https://arxiv.org/abs/1506.02438).
///
/// ```text
/// δ_t = r_t + γ·V_{t+1} − V_t        A_t = δ_t + γλ·A_{t+1}        R_t = A_t + V_t        V_{n+1} = 0
/// ```
///
/// `values` are read at the hidden state that predicts each token. Sequences end at their last token, whether the completion ended or
/// was cut.
///
/// # Errors
///
/// [`PeftError::Config`] for γ or λ outside of 0..=1; for values of other sequences, or a number that is not finite, which it names.
pub fn gae(rewards: &Ragged, values: &Ragged, gamma: f64, lambda: f64) -> Result<Advantages> {
    check_share("gamma", gamma)?;
    check_share("lambda", lambda)?;
    segments::same_lens("values", values.lens(), rewards.lens())?;
    rewards.check_finite("rewards")?;
    values.check_finite("values")?;
    let mut advantages = Vec::with_capacity(rewards.tokens());
    let mut returns = Vec::with_capacity(rewards.tokens());
    for (rewards, values) in rewards.rows().zip(values.rows()) {
        let start = advantages.len();
        let [mut advantage, mut next] = [0.0, 0.0];
        for (reward, value) in rewards.iter().zip(values).rev() {
            let value = f64::from(*value);
            let delta = f64::from(*reward) + gamma * next - value;
            advantage = delta + gamma * lambda * advantage;
            next = value;
            advantages.push(advantage as f32);
            returns.push((advantage + value) as f32);
        }
        advantages[start..].reverse();
        returns[start..].reverse();
    }
    Ok(Advantages {
        advantages: rewards.with_values(advantages),
        returns: rewards.with_values(returns),
    })
}

/// `G_t = r_t + γ·G_{t+1}`: the advantages of [REINFORCE++](https://arxiv.org/abs/2501.03262) before they are whitened.
///
/// # Errors
///
/// [`PeftError::Config`] for γ outside of 0..=1, or a reward that is not finite, which it names.
pub fn reward_to_go(rewards: &Ragged, gamma: f64) -> Result<Ragged> {
    check_share("gamma", gamma)?;
    rewards.check_finite("rewards")?;
    let mut all = Vec::with_capacity(rewards.tokens());
    for row in rewards.rows() {
        let start = all.len();
        let mut sum = 0.0;
        for reward in row.iter().rev() {
            sum = f64::from(*reward) + gamma * sum;
            all.push(sum as f32);
        }
        all[start..].reverse();
    }
    Ok(rewards.with_values(all))
}

fn check_share(name: &str, value: f64) -> Result<()> {
    match (0.0..=1.0).contains(&value) {
        true => Ok(()),
        false => Err(PeftError::config(name, value, "0 to 1")),
    }
}
