//! Base models: the tensors of a Hugging Face checkpoint, one safetensors file or several with an index.

mod bitsandbytes;
mod checkpoint;
mod fp4;
mod index;
mod model_config;
mod python_json;
mod quant_state;
mod report;
mod save;
mod shards;

pub use checkpoint::{BASE_FILE, BASE_INDEX_FILE, BaseCheckpoint, BaseTensor};
pub use index::{IndexFault, MAX_INDEX_BYTES, MAX_INDEX_TENSORS, MAX_SHARDS};
pub use report::{BaseMismatch, BaseReport, DTypeMismatch};
/// Element type of a tensor as a safetensors file names it; of any kind, `U8` for packed weights among them.
pub use safetensors::Dtype;
pub use save::{MODEL_CONFIG_FILE, SaveBaseOptions, SaveBaseReport};
