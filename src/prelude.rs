//! What most programs use: `use burn_peft::prelude::*`.
//!
//! Fine-tuning with [`PeftModel`], its configurations, and the options of loading and saving. It has no [`Result`](crate::Result), which
//! would hide the standard library's. Everything else is imported from its module.
//!
//! # One way to make an adapter
//!
//! [`PeftModel::new`] and [`add_adapter`](PeftModel::add_adapter):
//!
//! ```
//! use burn::nn::{Linear, LinearConfig};
//! use burn::prelude::*;
//! use burn_peft::prelude::*;
//!
//! # fn main() -> burn_peft::Result<()> {
//! # let layers: Vec<Linear> = vec![LinearConfig::new(8, 8).init(&Device::default())];
//! let mut model = PeftModel::new(layers); // any module
//! let config = PeftConfig::new(LoraConfig::new(8).with_alpha(16.0), TargetConfig::all_linear());
//! println!("{}", model.add_adapter("default", &config)?);
//! # Ok(())
//! # }
//! ```
//!
//! The others are for what this one does not do:
//!
//! | I have | I want | Use |
//! |---|---|---|
//! | a model | to train a new adapter | [`PeftModel::add_adapter`] |
//! | a directory of PEFT | to use it, or to train it further | [`PeftModel::load_adapter`] |
//! | a model and example inputs | to train a new adapter that begins with EVA | `PeftModel::add_adapter_eva`, feature `faer` |
//! | adapters on a model | one adapter made of them, in PEFT's ways | [`PeftModel::add_weighted_adapter`], or `add_weighted_adapter_svd`, feature `faer` |
//! | adapters of any kind on a model | one plain LoRA that is nearest to them | `PeftModel::add_lora_of`, feature `faer` |
//! | factors that I computed, one [`Lora`](crate::adapter::Lora) per module | an adapter of them | [`PeftModel::insert_adapter`] |
//! | changes of parameters of any kind, also copies and rows | an adapter of them | [`PeftModel::insert_changes`] |
//! | an adapter and new factors or changes for it | to exchange them between two forward passes | [`PeftModel::swap_adapter`], [`PeftModel::swap_changes`] |
//! | a directory of PEFT, and no model | to read or write its tensors on the host | [`AdapterFile`](crate::format::AdapterFile) |
//! | one layer, and no model | a layer with LoRA | [`LoraLinear`](crate::layer::LoraLinear), [`QLoraLinear`](crate::layer::QLoraLinear) |
//! | an initialisation of my own | LoRA of one layer with given first values | [`LoraConfig::with_factors`] |

pub use crate::PeftError;
pub use crate::adapter::{LoraConfig, LoraInit};
pub use crate::format::{BaseOptions, LoadOptions, NameMap, SaveOptions, check_writable};
pub use crate::model::{
    BiasMode, DEFAULT_ADAPTER, PeftConfig, PeftForward, PeftModel, TargetConfig, TiedHead,
    TrainableTokens,
};
pub use crate::nf4::Nf4Config;
#[cfg(feature = "optim")]
pub use crate::optim::{check_loss, clip_grad_norm};
