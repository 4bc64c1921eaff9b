//! Losses for fine-tuning, as sums with counts, so that the caller normalises once over all that one step sees.

mod head;
mod labels;
mod log_probs;
mod loss;
mod neftune;
pub mod policy;
pub mod preference;
mod ragged;
mod reward;
mod segments;
mod sft;
mod stored;
mod supervised;

pub use crate::head::{HeadChunks, HeadSize};
pub use head::{LogProbsConfig, head_log_probs, sft_head_loss};
pub use labels::Labels;
pub use log_probs::LogProbs;
pub use loss::Loss;
pub use neftune::neftune;
pub use ragged::Ragged;
pub use reward::{RewardLoss, RewardMetrics, bradley_terry_loss};
pub use sft::{SftLoss, sft_loss};
pub use stored::StoredLogProbs;
pub use supervised::{SupervisedKind, supervised_loss};

use log_probs::read;
