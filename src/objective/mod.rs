//! Losses for fine-tuning, as sums with counts, so that the caller normalises once over all that one step sees.

mod head;
mod sft;

pub use crate::head::{HeadChunks, HeadSize};
pub use head::sft_head_loss;
pub use sft::{SftLoss, sft_loss};
