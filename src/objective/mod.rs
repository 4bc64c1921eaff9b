//! Losses for fine-tuning, as sums with counts, so that the caller normalises once over all that one step sees.

mod head;
mod log_probs;
mod loss;
pub mod policy;
pub mod preference;
mod ragged;
mod reward;
mod segments;
mod sft;

pub use crate::head::{HeadChunks, HeadSize};
pub use head::sft_head_loss;
pub use log_probs::LogProbs;
pub use loss::Loss;
pub use ragged::Ragged;
pub use reward::{RewardLoss, RewardMetrics, bradley_terry_loss};
pub use sft::{SftLoss, sft_loss};

use log_probs::read;
