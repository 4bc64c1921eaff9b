//! Losses for fine-tuning, as sums with counts, so that the caller normalises once over all that one step sees.

mod sft;

pub use sft::{SftLoss, sft_loss};
