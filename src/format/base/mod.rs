//! Base models: a Hugging Face checkpoint, one safetensors file or several with an index, and how it comes into a model.

mod checkpoint;
mod index;
mod load;
mod options;
mod plan;
mod progress;
mod report;
mod stream;

pub use checkpoint::{BASE_FILE, BASE_INDEX_FILE, BaseCheckpoint, BaseTensor};
pub use index::{IndexFault, MAX_INDEX_BYTES, MAX_INDEX_TENSORS, MAX_SHARDS};
pub use options::{BaseOptions, MAX_BUFFER_BYTES, OnProgress};
pub use progress::LoadProgress;
pub use report::{BaseMismatch, BaseReport, DTypeMismatch};
/// Element type of a tensor as a safetensors file names it; of any kind, `U8` for packed weights among them.
pub use safetensors::Dtype;
