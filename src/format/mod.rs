//! Files: PEFT's adapter directory, read strictly and written atomically, on the host.
//!
//! An adapter is a directory with two files ([PEFT](https://github.com/huggingface/peft) 0.21):
//!
//! * `adapter_config.json` ([`AdapterConfig`]): rank, alpha, targets, and what else fixes the scale of
//!   `ΔW = s·B·A`;
//! * `adapter_model.safetensors`: the factors `A [r, d_in]` and `B [d_out, r]` of each module, under
//!   `base_model.model.PATH.lora_A.weight` and `.lora_B.weight`, and DoRA's magnitude `[d_out]` under `.lora_magnitude_vector`.
//!
//! [`PeftModel::save_adapter`](crate::model::PeftModel::save_adapter) writes one and
//! [`load_adapter`](crate::model::PeftModel::load_adapter) reads one; [`AdapterFile`] is what lies between, on the host. Everything in a file is hostile until it was checked: errors name the file and the key or
//! tensor, limits are named constants, nothing is allocated before its size was checked, and no string of a file is ever
//! opened, fetched, imported or run. Module paths are those of the file; a [`NameMap`] maps them to a model's own.

mod adapter;
mod atomic;
mod base;
mod config;
mod digest;
mod disk;
pub(crate) mod elements;
mod explicit;
#[cfg(test)]
mod faulty;
mod fields;
mod file;
mod fit;
mod header;
mod json;
mod keys;
mod load;
mod mlx;
mod names;
mod positional;
mod read;
mod report;
mod save;
mod serving;
mod shapes;
mod sites;
mod stored;
mod tied;
mod write;

#[cfg(feature = "optim")]
pub(crate) use atomic::write_files;
pub(crate) use json::object as json_object;
pub(crate) use read::read_bounded;

pub use adapter::{AdapterFile, LoraTensors, ParameterTensor, adapter_dir};
pub use base::{
    BASE_FILE, BASE_INDEX_FILE, BaseCheckpoint, BaseMismatch, BaseOptions, BaseReport, BaseTensor,
    DTypeMismatch, Dtype, IndexFault, LoadProgress, MAX_BUFFER_BYTES, MAX_INDEX_BYTES,
    MAX_INDEX_TENSORS, MAX_SHARDS, OnProgress,
};
pub use config::{
    AdapterConfig, CONFIG_FILE, InitLoraWeights, MAX_CONFIG_BYTES, MAX_NAMES, MAX_RANK,
    PEFT_VERSION,
};
pub use digest::DigestCheck;
pub use file::{MAX_HEADER_BYTES, SafetensorsFile};
pub use header::MAX_TENSORS;
pub use keys::{Factor, PREFIX, parse_key, tensor_key};
pub use load::LoadOptions;
pub use mlx::MLX_WEIGHTS_FILE;
pub use names::NameMap;
pub use read::{MAX_WEIGHTS_BYTES, ReadOptions, WEIGHTS_FILE};
pub use report::{LoadReport, Mismatch};
pub use save::SaveOptions;
pub use serving::{Obstacle, Outcome, Server};
pub use write::WriteOptions;
