//! Adapters on whole models.
//!
//! [`PeftModel`] wraps any Burn module. It attaches each adapter to a weight as one of Burn's reparameterizations. So an unchanged model
//! computes `x·(W + s·A·B) + b` at once. With [`PeftForward`] at its call sites it computes `x·W + s·((x·A)·B) + b` instead, and `W` stays
//! packed if the model was [quantised](PeftModel::quantize_nf4).
//!
//! [`PeftModel::add_adapter`] makes an adapter; the [`prelude`](crate::prelude) has a table of the other ways. [`PeftModel::status`] says
//! what is attached and what trains, in the words of PEFT. [`AdaptersOnly`] is the same model for trainers: its checkpoints leave the base
//! out.

mod active;
mod adapters_only;
mod attach;
mod base;
mod choose;
mod combine;
mod compose;
mod config;
#[cfg(feature = "faer")]
mod convert;
mod dense_look;
mod describe;
#[cfg(feature = "faer")]
mod eva;
mod fingerprint;
mod forward;
mod fresh;
mod head_loss;
mod merge;
mod new_rows;
mod parameters;
mod peft_model;
mod quantize;
mod report;
mod resize;
mod shown_groups;
mod statistics;
mod status;
mod storage;
mod stored_base;
mod target;
mod tied;
#[cfg(feature = "optim")]
mod training;
mod transparent;
mod traverse;
mod vocabulary;
mod weight;

pub use active::Active;
pub use adapters_only::AdaptersOnly;
pub(crate) use attach::{Joining, check_adapter_name};
pub(crate) use base::{BaseParameter, NewBase, base_parameters, choose_linear, replace_bases};
pub use compose::ComposeOptions;
pub(crate) use config::Origin;
pub use config::{BiasMode, PeftConfig, TrainableTokens};
pub(crate) use describe::{Content, Description, Naming, by_path};
#[cfg(feature = "faer")]
pub use eva::EvaModule;
pub use forward::{PeftForward, TiedHead};
pub use head_loss::HeadLoss;
pub use new_rows::NewRows;
pub(crate) use new_rows::Table;
pub(crate) use parameters::is_named;
pub(crate) use peft_model::Parameter;
pub use peft_model::{DEFAULT_ADAPTER, PeftModel};
pub use quantize::QuantizeReport;
pub use report::{AdapterReport, AttachReport, Base, ChangeKind, ModelReport, WeightReport};
pub use resize::{ResizeReport, ResizedTable};
pub(crate) use statistics::is_statistic;
pub use status::{LayerStatus, ModelStatus, Regular};
pub use storage::{Amount, Storage, Stored};
pub(crate) use stored_base::{StoredParameter, StoredValue};
pub(crate) use target::{Adapted, OldPatterns};
pub use target::{
    ModuleNames, PatternMap, TargetConfig, TargetMatch, TargetMatcher, TargetModules, TargetReport,
    UnmatchedPattern,
};
pub use tied::TiedPart;
#[cfg(feature = "optim")]
pub(crate) use training::nothing_trains;
pub(crate) use vocabulary::{input_embedding, output_head};
pub use weight::{PeftWeight, Way};
