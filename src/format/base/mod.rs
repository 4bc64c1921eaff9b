//! Base models: a Hugging Face checkpoint, one safetensors file or several with an index, how it comes into a model, and
//! how a model becomes one. Weights that bitsandbytes packed are read and written as they are.

mod bitsandbytes;
mod checkpoint;
mod four_bit;
mod fp4;
mod index;
mod load;
mod model_config;
mod options;
mod plan;
mod progress;
mod python_json;
mod quant_state;
mod report;
mod save;
mod shards;
mod stream;

pub use checkpoint::{BASE_FILE, BASE_INDEX_FILE, BaseCheckpoint, BaseTensor};
pub use index::{IndexFault, MAX_INDEX_BYTES, MAX_INDEX_TENSORS, MAX_SHARDS};
pub use options::{BaseOptions, MAX_BUFFER_BYTES, OnProgress};
pub use progress::LoadProgress;
pub use report::{BaseMismatch, BaseReport, DTypeMismatch};
/// Element type of a tensor as a safetensors file names it; of any kind, `U8` for packed weights among them.
pub use safetensors::Dtype;
pub use save::{MODEL_CONFIG_FILE, SaveBaseOptions, SaveBaseReport};
