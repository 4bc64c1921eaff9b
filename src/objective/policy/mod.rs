//! Policy gradients: PPO, the family of GRPO, RLOO and REINFORCE++, as primitives over sampled completions.
//!
//! A step, with what each part returns:
//!
//! ```text
//! scores of completions -> token_rewards -> gae -> whiten     (PPO)
//!                       -> group_advantages | leave_one_out    (GRPO, RLOO)
//!                       -> reward_to_go -> whiten              (REINFORCE++)
//! advantages by token   -> policy_loss(..).over(..)            [+ c_v · value_loss]
//! ```
//!
//! REINFORCE++ with a baseline takes the group's mean off the scores first: [`group_advantages`] with [`Scale::None`].
//!
//! Scores, rewards and advantages are numbers of the host in f32, computed with in f64: a scan over some thousands of them. Losses
//! are tensors.
//!
//! ```
//! use burn::tensor::{DType, Device, Tensor};
//! use burn_peft::objective::policy::{PolicyBatch, PolicyConfig, Scale, group_advantages, policy_loss};
//! use burn_peft::objective::{LogProbs, Ragged};
//!
//! # fn main() -> burn_peft::Result<()> {
//! // Two completions of one prompt, of three tokens and of one, as the sampler recorded them.
//! let sampled = Ragged::from_rows(&[vec![-0.5, -1.0, -0.2], vec![-2.0]])?;
//! let advantages = group_advantages(&[1.0, 0.0], 2, Scale::Group)?;
//! let advantages = Ragged::spread(&advantages.values, sampled.lens())?;
//!
//! let device = Device::default().autodiff();
//! let values = Tensor::<1>::from_floats([-0.4, -1.1, -0.2, -1.9], &device).require_grad();
//! let new = LogProbs::new(values.clone(), sampled.lens())?;
//! let old = sampled.to_log_probs(&device, DType::F32);
//! let batch = PolicyBatch::new(&new, &old, &advantages)?;
//! let loss = policy_loss(&batch, &PolicyConfig::grpo())?;
//! let gradients = loss.mean().backward();
//! assert!(values.grad(&gradients).is_some());
//! println!("{:?}", loss.metrics()?);
//! # Ok(())
//! # }
//! ```

mod batch;
mod config;
mod correction;
mod gae;
mod groups;
mod kl;
mod loss;
mod metrics;
mod rewards;
mod surrogate;
mod value;
mod whiten;

pub use batch::PolicyBatch;
pub use config::{Aggregate, KlPenalty, Level, PolicyConfig};
pub use correction::{Correction, Mismatch, OutOfRange, importance_weights, off_policy_weights};
pub use gae::{Advantages, gae, reward_to_go};
pub use groups::{
    GroupAdvantages, Scale, group_advantages, leave_one_out, normalized_then_summed,
    weighted_rewards,
};
pub use kl::{AdaptiveKl, KlEstimator};
pub use loss::{PolicyLoss, policy_loss};
pub use metrics::PolicyMetrics;
pub use rewards::{RewardShaping, TokenRewards, token_rewards};
pub use surrogate::Surrogate;
pub use value::{ValueLoss, ValueMetrics, explained_variance, value_loss};
pub use whiten::whiten;
