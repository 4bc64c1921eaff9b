//! Single layers: a frozen base plus a delta, without a [`PeftModel`](crate::model::PeftModel).
//!
//! `y = x·W + b + Δ(x)`. The base is a dense [`Linear`](burn::nn::Linear) or a packed [`Nf4Linear`]. The delta is any
//! [`Delta`](crate::adapter::Delta). [`Adapted`] composes the two, so every base works with every delta.

mod adapted;
mod base;
mod conv;
mod embedding;
mod layout;
#[cfg(feature = "faer")]
mod loftq;
mod nf4_linear;

pub(crate) use adapted::requantize;
pub use adapted::{Adapted, LoraLinear, MergeReport, Nf4MergeReport, QLoraLinear};
pub use base::FrozenLinear;
pub(crate) use base::{DenseMap, Nf4Map, loader_transposes, weight_dims};
pub(crate) use conv::{Conv, ConvLayer};
pub(crate) use embedding::{EmbeddingLayer, attend_low_rank};
pub use layout::ExpertLayout;
pub(crate) use layout::{LayerKind, WeightLayout};
#[cfg(feature = "faer")]
pub use loftq::LoftqReport;
pub use nf4_linear::{Nf4Linear, Nf4LinearConfig};
