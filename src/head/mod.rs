//! The loss of a language model's head without its logits, `L = Σ_i −log softmax(z_i)[y_i]` with `z = x·W + u·B + b`.
//!
//! `x [rows, features]` the hidden states of the rows that have a label, `y` their labels, `W [features, vocabulary]` the weight,
//! dense or packed, `u [rows, r]` and `B [r, vocabulary]` a low-rank change (`u = s·x·A` of a LoRA, whose gradient goes on from that
//! of `u`), `b [vocabulary]` a bias. Of the logits there is a chunk of rows by a chunk of the vocabulary at a time, in either pass.
//!
//! Sources: online softmax, M. Milakov, N. Gimelshein, <https://arxiv.org/abs/1805.02867>; no logits in memory: E. Wijmans et al.,
//! "Cut your losses in large-vocabulary language models", <https://arxiv.org/abs/2411.09009>; gradients from the forward pass, as
//! [`composed`] has them: P.-L. Hsu et al., "Liger kernel", <https://arxiv.org/abs/2410.10989>.

mod chunks;
mod composed;
#[cfg(all(feature = "flex", target_endian = "little"))]
mod flex;
#[cfg(all(feature = "flex", target_endian = "little"))]
mod ops;
#[cfg(test)]
mod tests;

use burn::tensor::{DType, FloatDType, Tensor};

pub use chunks::{HeadChunks, HeadSize};

use crate::nf4::Nf4Weight;
use crate::tensor::cast;

/// The weight of a head.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // There is one of it at a time.
pub(crate) enum HeadWeight<'a> {
    /// `[features, vocabulary]`, row-major or the transpose of such a one; it gets a gradient if it requires one.
    Dense(Tensor<2>),
    /// `[vocabulary, features]`, frozen.
    Nf4(&'a Nf4Weight),
}

/// A head: `x·W + u·B + b`.
#[derive(Clone, Debug)]
pub(crate) struct Head<'a> {
    pub(crate) weight: HeadWeight<'a>,
    /// `u [rows, r]` and `B [r, vocabulary]`.
    pub(crate) low_rank: Option<[Tensor<2>; 2]>,
    pub(crate) bias: Option<Tensor<1>>,
}

impl Head<'_> {
    /// `[features, vocabulary]`.
    fn dims(&self) -> [usize; 2] {
        match &self.weight {
            HeadWeight::Dense(weight) => weight.dims(),
            HeadWeight::Nf4(weight) => {
                let [vocabulary, features] = weight.shape();
                [features, vocabulary]
            }
        }
    }
}

/// The sum over the rows of `x [rows, features]`, whose labels these are: `[1]`, in f32 (f64 for an f64 `x`).
///
/// # Panics
///
/// If the shapes do not fit, there is no row, or a label is outside of the vocabulary.
pub(crate) fn cross_entropy(
    x: Tensor<2>,
    head: Head,
    labels: Vec<usize>,
    chunks: &HeadChunks,
) -> Tensor<1> {
    let [features, vocabulary] = head.dims();
    assert_eq!(x.dims(), [labels.len(), features], "rows of a head");
    assert!(labels.iter().all(|&label| label < vocabulary), "labels");
    assert!(!labels.is_empty(), "a row");
    let wide = wide(&x);
    let head = Head {
        low_rank: head.low_rank.map(|pair| pair.map(|t| cast(t, wide))),
        bias: head.bias.map(|bias| cast(bias, wide)),
        ..head
    };
    #[cfg(all(feature = "flex", target_endian = "little"))]
    if ops::serves(&x, &head) {
        return ops::cross_entropy(x, head, labels, chunks);
    }
    composed::cross_entropy(x, head, &labels, chunks)
}

/// What sums are computed in: f64 for an f64 `x`, else f32.
fn wide<const D: usize>(x: &Tensor<D>) -> FloatDType {
    match x.dtype() {
        DType::F64 => FloatDType::F64,
        _ => FloatDType::F32,
    }
}
