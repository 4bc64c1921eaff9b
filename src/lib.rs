// The README's links are relative, which leads nowhere from rendered documentation. Of two definitions of a link
// Markdown takes the first.
#![doc = concat!("[picture]: ", env!("CARGO_PKG_REPOSITORY"), "/raw/HEAD/docs/images/finetune.png")]
#![doc = concat!("[design]: ", env!("CARGO_PKG_REPOSITORY"), "/blob/HEAD/docs/design.md")]
#![doc = concat!("[keys]: ", env!("CARGO_PKG_REPOSITORY"), "/blob/HEAD/docs/peft-config.md")]
#![doc = concat!("[interchange]: ", env!("CARGO_PKG_REPOSITORY"), "/blob/HEAD/docs/interchange.md")]
#![doc = concat!("[hostile]: ", env!("CARGO_PKG_REPOSITORY"), "/blob/HEAD/docs/hostile.md")]
#![doc = concat!("[gpu]: ", env!("CARGO_PKG_REPOSITORY"), "/blob/HEAD/docs/gpu.md")]
#![doc = concat!("[memory]: ", env!("CARGO_PKG_REPOSITORY"), "/blob/HEAD/docs/memory.md")]
#![doc = concat!("[finetune]: ", env!("CARGO_PKG_REPOSITORY"), "/blob/HEAD/docs/finetune.md")]
#![doc = concat!("[changelog]: ", env!("CARGO_PKG_REPOSITORY"), "/blob/HEAD/CHANGELOG.md")]
#![doc = concat!("[security]: ", env!("CARGO_PKG_REPOSITORY"), "/blob/HEAD/SECURITY.md")]
#![doc = concat!("[mit]: ", env!("CARGO_PKG_REPOSITORY"), "/blob/HEAD/LICENSE-MIT")]
#![doc = concat!("[apache]: ", env!("CARGO_PKG_REPOSITORY"), "/blob/HEAD/LICENSE-APACHE")]
#![doc = include_str!("../README.md")]
#![deny(missing_docs)]
#![deny(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod adapter;
#[cfg(feature = "optim")]
pub mod checkpointing;
mod cpu;
pub mod dataset;
mod error;
pub mod format;
pub mod fused;
mod head;
pub mod layer;
pub mod memory;
pub mod model;
pub mod nf4;
pub mod objective;
#[cfg(feature = "optim")]
pub mod optim;
pub mod prelude;
#[cfg(feature = "optim")]
pub mod resume;
pub mod rollout;
mod splitmix;
mod tensor;

pub use error::{PeftError, Result};
