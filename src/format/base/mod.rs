//! Base models: the tensors of a Hugging Face checkpoint, one safetensors file or several with an index.

mod checkpoint;
mod index;

pub use checkpoint::{BASE_FILE, BASE_INDEX_FILE, BaseCheckpoint, BaseTensor};
pub use index::{IndexFault, MAX_INDEX_BYTES, MAX_INDEX_TENSORS, MAX_SHARDS};
/// Element type of a tensor as a safetensors file names it; of any kind, `U8` for packed weights among them.
pub use safetensors::Dtype;
