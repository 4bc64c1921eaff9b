//! What a step on adapters has besides Burn's optimisers: one norm over all gradients, LoRA+'s two learning rates, and LoRA-FA's
//! projected gradients.

mod clip;
#[cfg(feature = "faer")]
mod lora_fa;
mod lora_plus;

pub use clip::clip_grad_norm;
#[cfg(feature = "faer")]
pub use lora_fa::LoraFa;
pub use lora_plus::{LoraPlusGroups, lora_plus};
