//! Base models: a Hugging Face checkpoint, one safetensors file or several with an index, how it comes into a model, and
//! how a model becomes one.
//!
//! A parameter `P` of a module gets the tensor of its name, in Burn's layout: `P = T` of shapes that are equal, or `P = Tᵀ`
//! of a linear layer, `P [d_in, d_out]` and `T [d_out, d_in]`. Its values are kept, cast (`round(T)`, once, to nearest even), or
//! packed in NF4 ([`nf4`](crate::nf4)), whose blocks run over `T` as the file has it.
//!
//! Weights that bitsandbytes has packed in NF4 are read and written as they are; its FP4 is read, and restored on the way.
//!
//! [`BaseCheckpoint`] alone shows the tensors of a checkpoint and reads them, or parts of them, by position.
//!
//! The file formats: <https://github.com/huggingface/safetensors>, and the index of transformers'
//! [`save_pretrained`](https://huggingface.co/docs/transformers/main_classes/model).

mod bitsandbytes;
mod checkpoint;
mod family;
mod four_bit;
mod fp4;
mod index;
mod load;
mod lookup;
mod model_config;
mod options;
mod plan;
mod progress;
mod proposal;
mod python_json;
mod quant_state;
mod report;
mod save;
mod shards;
mod stream;

pub use checkpoint::{BASE_FILE, BASE_INDEX_FILE, BaseCheckpoint, BaseTensor};
pub use family::Family;
pub use index::{IndexFault, IndexFaultKind};
pub use options::{BaseOptions, COMMON_BUFFERS, MAX_BUFFER_BYTES, OnProgress};
pub use progress::LoadProgress;
pub use proposal::Proposal;
pub use report::{BaseMismatch, BaseReport, DTypeMismatch, Resized};
/// Element type of a tensor as a safetensors file names it; of any kind, `U8` for packed weights among them.
pub use safetensors::Dtype;
pub use save::{MODEL_CONFIG_FILE, SaveBaseOptions, SaveBaseReport};
