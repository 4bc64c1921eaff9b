//! What a step on adapters has besides Burn's optimisers: one norm over all gradients, and LoRA+'s two learning rates.

mod clip;
mod lora_plus;

pub use clip::clip_grad_norm;
pub use lora_plus::{LoraPlusGroups, lora_plus};
