//! Four-bit NormalFloat (NF4) weights, bit for bit those of bitsandbytes.
//!
//! `W ≈ CODEBOOK[q] · a`. Each weight of `W` is a 4-bit code `q` into sixteen fixed values, times the absmax `a` of its block. A block is
//! 64 consecutive weights (by default) of the row-major `[d_out, d_in]` matrix. The absmax values are f32, or are themselves quantised to
//! eight bits (double quantisation).
//!
//! [`Nf4Data`] is a quantised matrix on the host, and [`Nf4Weight`] is one on a device. [`Nf4Ops`] are the products with it. To pack a whole
//! model, use [`PeftModel::quantize_nf4`](crate::model::PeftModel::quantize_nf4).
//!
//! Sources: T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", <https://arxiv.org/abs/2305.14314>;
//! every byte follows bitsandbytes 0.50.2.

mod autodiff;
pub mod blocks;
mod builder;
pub mod codebook;
pub(crate) mod cpu;
mod data;
mod dense;
pub mod double;
mod float;
mod ops;
pub(crate) mod portable;
mod rows;
mod weight;
mod words;

pub use blocks::{BLOCK_SIZES, BlockSize};
pub(crate) use builder::{Nf4Builder, Nf4Piece, PIECE_UNIT};
pub use data::{Nf4Config, Nf4Data, Nf4Scales};
pub use double::DoubleAbsmax;
pub use float::Nf4Float;
pub use ops::{Nf4Ops, Nf4ScaleTensors, Nf4Tensors};
pub use weight::Nf4Weight;
