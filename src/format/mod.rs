//! Files: PEFT's adapter directory, read strictly and written atomically, on the host; and base models, streamed.
//!
//! An adapter is a directory with two files ([PEFT](https://github.com/huggingface/peft) 0.21):
//!
//! * `adapter_config.json` ([`AdapterConfig`]): rank, alpha, targets, and the other options that determine the scale of
//!   `ΔW = s·B·A`;
//! * `adapter_model.safetensors`: the factors `A [r, d_in]` and `B [d_out, r]` of each module, under
//!   `base_model.model.PATH.lora_A.weight` and `.lora_B.weight`, and DoRA's magnitude `[d_out]` under `.lora_magnitude_vector`.
//!
//! [`PeftModel::save_adapter`](crate::model::PeftModel::save_adapter) writes one and
//! [`load_adapter`](crate::model::PeftModel::load_adapter) reads one. [`AdapterFile`] is the adapter on the host, between model and files.
//! [`check_writable`] checks before training that a directory can be written.
//!
//! Reading treats every byte of a file as hostile until it is checked. Errors name the file and the key or tensor. Limits are named
//! constants. Nothing is allocated before its size is checked, and no string of a file is ever opened, fetched, imported or run. Module
//! paths are those of the file; a [`NameMap`] maps them to a model's own.
//!
//! A base model is one safetensors file, or several with an index ([`BaseCheckpoint`]).
//! [`PeftModel::load_base`](crate::model::PeftModel::load_base) reads it into a model, and
//! [`BaseCheckpoint::load_into`] reads it into any module. Both pack weights in NF4 while they read, where [`BaseOptions`] say so. They need
//! the memory of the model and one bounded buffer:
//!
//! ```no_run
//! # use burn::module::Module;
//! # fn main() -> burn_peft::Result<()> { load(Vec::<burn::nn::Linear>::new()) }
//! # fn load<M: Module>(model: M) -> burn_peft::Result<()> {
//! use burn_peft::format::BaseOptions;
//! use burn_peft::model::{PeftModel, TargetConfig};
//! use burn_peft::nf4::Nf4Config;
//!
//! let options = BaseOptions::new()
//!     .with_nf4(TargetConfig::all_linear(), Nf4Config::new().with_double_quant(true))
//!     .with_tied("lm_head.weight", "model.embed_tokens.weight")
//!     .with_ignored(["rotary_emb.inv_freq"])
//!     .with_progress(|progress| eprint!("\r{} of {}", progress.bytes, progress.total_bytes));
//! let mut model = PeftModel::new(model);
//! let report = model.load_base("Llama-3-8B", &options)?;
//! println!("{report}");
//! # Ok(())
//! # }
//! ```
//!
//! Weights that bitsandbytes has packed, as transformers saves them, are loaded as they are, without an option.
//! [`PeftModel::save_base`](crate::model::PeftModel::save_base) writes a base as transformers does, with packed weights in bitsandbytes'
//! format. So quantising once is enough: reading a packed base takes half the time of packing it.

mod adapter;
mod atomic;
mod base;
mod changes;
mod config;
mod digest;
mod disguise;
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
mod limits;
mod load;
mod mlx;
mod names;
mod places;
mod positional;
mod ranks;
mod read;
mod report;
mod save;
mod serving;
mod shapes;
mod sites;
mod stored;
mod summary;
mod tied;
mod version;
mod writable;
mod write;

pub(crate) use atomic::write_files;
pub(crate) use disguise::{not_json, recognise};
pub(crate) use json::object as json_object;
pub(crate) use read::read_bounded;

pub use adapter::{AdapterFile, LoraTensors, ParameterTensor, adapter_dir};
pub use base::{
    BASE_FILE, BASE_INDEX_FILE, BaseCheckpoint, BaseMismatch, BaseOptions, BaseReport, BaseTensor,
    COMMON_BUFFERS, DTypeMismatch, Dtype, Family, IndexFault, IndexFaultKind, LoadProgress,
    MAX_BUFFER_BYTES, MODEL_CONFIG_FILE, OnProgress, Proposal, Resized, SaveBaseOptions,
    SaveBaseReport,
};
pub use config::{
    AdapterConfig, CONFIG_FILE, InitLoraWeights, MAX_CONFIG_BYTES, MAX_NAMES, MAX_RANK,
    PEFT_VERSION,
};
pub use digest::DigestCheck;
pub use file::SafetensorsFile;
pub use keys::{Factor, PREFIX, parse_key, tensor_key};
pub use limits::{
    FileLimits, MAX_HEADER_BYTES, MAX_INDEX_BYTES, MAX_INDEX_TENSORS, MAX_SHARDS, MAX_TENSORS,
};
pub use load::{BaseValues, LoadOptions};
pub use mlx::MLX_WEIGHTS_FILE;
pub use names::NameMap;
pub use read::{MAX_WEIGHTS_BYTES, ReadOptions, WEIGHTS_FILE};
pub use report::{LoadReport, Mismatch};
pub use save::SaveOptions;
pub use serving::{Obstacle, Outcome, Server};
pub use writable::check_writable;
pub use write::WriteOptions;
