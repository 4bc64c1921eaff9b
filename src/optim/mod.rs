//! What a step on adapters has besides Burn's optimisers: one norm over all gradients, LoRA+'s two learning rates, LoRA-FA's
//! projected gradients, AdamW with 8-bit moments, and f32 moments of bf16 parameters.
//!
//! # What a trainer should check
//!
//! A fault that ends a run after hours is found in the first second if the trainer asks for it.
//!
//! | When | Call | What it finds |
//! |---|---|---|
//! | before the first step | [`check_writable`](crate::format::check_writable) | a folder that cannot be written: a missing mount, a read-only disk, a file in its place |
//! | before the first step | [`ModelReport::trainable_params`](crate::model::ModelReport::trainable_params) of `model.report()` | 0: nothing trains |
//! | after the first forward pass | [`ModelReport::composed`](crate::model::ModelReport::composed) | layers that do not call `forward_peft`, which cost memory and have no dropout |
//! | every step | [`check_loss`] | a loss that is NaN or infinite |
//! | every step | [`clip_grad_norm`] with [`PeftError::at_step`](crate::PeftError::at_step), or [`check_gradients`] | the first parameter whose gradient is NaN or infinite, before the optimiser writes it into the weights |
//!
//! ```
//! # use burn::module::Module;
//! # use burn::optim::{GradientsParams, ModuleOptimizer};
//! # use burn::tensor::Tensor;
//! # use burn_peft::model::PeftModel;
//! use burn_peft::format::check_writable;
//! use burn_peft::optim::{check_loss, clip_grad_norm};
//!
//! # fn train<M: Module>(
//! #     mut model: PeftModel<M>, mut optimizer: ModuleOptimizer, out: &std::path::Path, loss_of: impl Fn(&PeftModel<M>) -> Tensor<1>,
//! # ) -> burn_peft::Result<()> {
//! check_writable(out)?;
//! for step in 1..=100 {
//!     let loss = loss_of(&model);
//!     check_loss(&loss, step)?;
//!     let mut gradients = GradientsParams::from_grads(loss.backward(), &model);
//!     clip_grad_norm(&model, &mut gradients, 1.0).map_err(|error| error.at_step(step))?;
//!     model = optimizer.step(1e-4, model, gradients);
//! }
//! # Ok(())
//! # }
//! ```

mod accumulate;
mod adamw_8bit;
// What finds codes on the host serves Burn's CPU backend.
#[cfg_attr(not(feature = "flex"), allow(dead_code))]
pub(crate) mod block_wise;
mod clip;
#[cfg_attr(not(feature = "flex"), allow(dead_code))]
mod dynamic_map;
mod f32_state;
mod finite;
#[cfg(feature = "faer")]
mod lora_fa;
mod lora_plus;

pub use accumulate::grads_to_f32;
pub use adamw_8bit::{AdamW8bit, AdamW8bitConfig, AdamW8bitState};
pub use clip::clip_grad_norm;
pub use f32_state::{F32State, F32StateOf};
pub use finite::{check_gradients, check_loss};
#[cfg(feature = "faer")]
pub use lora_fa::LoraFa;
pub use lora_plus::{EMBEDDING_LR, LoraPlusGroups, lora_plus};
