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
