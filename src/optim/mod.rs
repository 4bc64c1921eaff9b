//! What a step on adapters has besides Burn's optimisers: one norm over all gradients, LoRA+'s two learning rates, LoRA-FA's
//! projected gradients, AdamW with 8-bit moments, and f32 moments of bf16 parameters.

mod accumulate;
mod adamw_8bit;
// What finds codes on the host serves Burn's CPU backend.
#[cfg_attr(not(feature = "flex"), allow(dead_code))]
pub(crate) mod block_wise;
mod clip;
#[cfg_attr(not(feature = "flex"), allow(dead_code))]
mod dynamic_map;
mod f32_state;
#[cfg(feature = "faer")]
mod lora_fa;
mod lora_plus;

pub use accumulate::grads_to_f32;
pub use adamw_8bit::{AdamW8bit, AdamW8bitConfig, AdamW8bitState};
pub use clip::clip_grad_norm;
pub use f32_state::{F32State, F32StateOf};
#[cfg(feature = "faer")]
pub use lora_fa::LoraFa;
pub use lora_plus::{EMBEDDING_LR, LoraPlusGroups, lora_plus};
