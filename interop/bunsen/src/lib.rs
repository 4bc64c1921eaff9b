//! burn-peft on models that nobody wrote for it: four of [bunsen](https://docs.rs/bunsen), as published.
//!
//! A file per model holds all that a user of burn-peft writes for it: the names of its checkpoint ([`NameMap`]) and how it is loaded
//! ([`BaseOptions`]), between two comments. `scripts/interop` counts these lines. Everything else is in `tests/`, once for all models.
//!
//! None of these models calls [`forward_peft`]: adapters and packed weights act through Burn's own `forward`.
//!
//! [`NameMap`]: burn_peft::format::NameMap
//! [`BaseOptions`]: burn_peft::format::BaseOptions
//! [`forward_peft`]: burn_peft::model::PeftForward::forward_peft

pub mod qwen3;
pub mod resnet;
pub mod swin;
pub mod whisper;
