//! Log-probabilities of a language model's head without its logits, `ℓ_i = log softmax(z_i / T)[y_i]` with `z = x·W + u·B + b`.
//!
//! `x [rows, features]` the hidden states of the rows that have a label, `y` their labels, `W [features, vocabulary]` the weight,
//! dense or packed, `u [rows, r]` and `B [r, vocabulary]` a low-rank change (`u = s·x·A` of a LoRA, whose gradient goes on from that
//! of `u`), `b [vocabulary]` a bias, `T` the temperature. Of the logits there is a chunk of rows by a chunk of the vocabulary at a
//! time, in either pass. Backward takes one gradient for each row and value.
//!
//! * [`rows`]: what is computed of a row;
//! * [`ops`]: the operation and its backward; [`flex`]: by kernels on the CPU backend; [`portable`]: of a backend's own operations;
//! * [`plain`]: with all logits, for backends that this crate was not built for.
//!
//! Sources: online softmax, M. Milakov, N. Gimelshein, <https://arxiv.org/abs/1805.02867>; no logits in memory: E. Wijmans et al.,
//! "Cut your losses in large-vocabulary language models", <https://arxiv.org/abs/2411.09009>.

mod chunks;
#[cfg(all(feature = "flex", target_endian = "little"))]
mod flex;
mod ops;
mod plain;
mod portable;
pub(crate) mod rows;
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

/// How the log-probabilities are computed, and what else is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    pub(crate) chunks: HeadChunks,
    /// Divides the logits; positive.
    pub(crate) temperature: f64,
    /// Whether the statistics of [`rows`] are computed too.
    pub(crate) statistics: bool,
}

impl Options {
    pub(crate) fn new(chunks: &HeadChunks) -> Self {
        Self {
            chunks: *chunks,
            temperature: 1.0,
            statistics: false,
        }
    }
}

/// The [`rows`] of `x [rows, features]`, whose labels these are: `[k, rows]`, in f32 (f64 for an f64 `x`).
///
/// # Panics
///
/// If the shapes do not fit, there is no row, or a label is outside of the vocabulary.
pub(crate) fn log_probs(
    x: Tensor<2>,
    head: Head,
    labels: Vec<usize>,
    options: &Options,
) -> Tensor<2> {
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
    match ops::has_implementation(&x) {
        true => {
            let kernels = ops::kernels_serve(&x, &head);
            run(x, head, labels, options, kernels)
        }
        false => plain::of_logits(plain::logits(x, head), labels, options),
    }
}

/// The operation, by the kernels of the CPU backend or not.
fn run(
    x: Tensor<2>,
    head: Head,
    labels: Vec<usize>,
    options: &Options,
    kernels: bool,
) -> Tensor<2> {
    let asked = ops::Asked {
        labels,
        chunks: options.chunks,
        temperature: options.temperature,
        statistics: options.statistics,
        kernels,
    };
    ops::log_probs(x, head, asked)
}

/// The same of logits that are in memory, `[rows, vocabulary]`.
pub(crate) use plain::of_logits;

/// What sums are computed in: f64 for an f64 `x`, else f32.
fn wide<const D: usize>(x: &Tensor<D>) -> FloatDType {
    match x.dtype() {
        DType::F64 => FloatDType::F64,
        _ => FloatDType::F32,
    }
}
