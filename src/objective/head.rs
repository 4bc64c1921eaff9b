//! What objectives compute with, of a head's hidden states and without logits: log-probabilities, and the loss of supervised fine-tuning.

use burn::tensor::{Bool, Int, Tensor};

use super::labels::Labels;
use super::log_probs::LogProbs;
use super::sft::{SftLoss, labelled};
use crate::head::{HeadChunks, Options, rows};
use crate::model::HeadLoss;
use crate::{PeftError, Result};

/// Cross entropy on the supervised tokens of a batch, of the hidden states that the head would turn into logits.
///
/// `sft_head_loss(hidden, &head, targets, mask, &HeadChunks::default())` in place of `sft_loss(head.forward_peft(hidden), targets,
/// mask)`; with an `Embedding` for a tied head. Both give the same value and gradients, to rounding; this one has the logits of a
/// chunk in memory at a time, in the forward pass as in the backward, which computes them again.
///
/// On Burn's CPU backend, f32 and bf16 hidden states over a dense weight (f32, bf16) or a packed one are multiplied as they are:
/// bf16 by bf16 where the processor does so (and features and vocabulary are even), else in f32, the hidden states widened by chunks
/// of rows and the weight by strips of some KiB; logits and sums are f32. Elsewhere the same is composed of Burn's operations, a
/// chunk of the weight at a time. It is the negative sum of [`head_log_probs`].
///
/// # Memory
///
/// [`HeadChunks::largest_temporary`] at most at any time; kept for the backward pass are the supervised hidden states (with a LoRA
/// also in the dtype of its `A`, and `[count, r]` values), and three numbers a row. A dense weight that is trained has one gradient of its size, and
/// no second one: in bf16 it is rounded once for each chunk of rows. [`HeadLoss`] says what an adapter changes of this.
///
/// # Shapes
///
/// - `hidden`: `[batch, seq, features]`
/// - `targets`, `mask`: as for [`sft_loss`](super::sft_loss)
///
/// # Errors
///
/// As [`sft_loss`](super::sft_loss), and [`PeftError::Shape`] where the hidden states are not of the head's features.
pub fn sft_head_loss(
    hidden: Tensor<3>,
    head: &impl HeadLoss,
    targets: Tensor<2, Int>,
    mask: Tensor<2, Bool>,
    chunks: &HeadChunks,
) -> Result<SftLoss> {
    let [batch, seq, vocabulary] = checked_dims(&hidden, head)?;
    let labels = labelled(targets, mask, [batch, seq], vocabulary)?;
    let count = labels.len();
    let sum = head.head_rows(hidden, labels).cross_entropy(chunks);
    Ok(SftLoss { sum, count })
}

/// How [`head_log_probs`] computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogProbsConfig {
    /// How much of the logits is in memory at a time.
    pub chunks: HeadChunks,
    /// `T`, which divides the logits, as a sampler's temperature does; 1 unless the tokens were sampled at another one.
    pub temperature: f64,
    /// Whether [`LogProbs`] gets its entropy and the other statistics of each row too.
    pub statistics: bool,
}

impl Default for LogProbsConfig {
    fn default() -> Self {
        Self {
            chunks: HeadChunks::default(),
            temperature: 1.0,
            statistics: false,
        }
    }
}

impl LogProbsConfig {
    /// Chunks by default, a temperature of 1, no statistics.
    pub fn new() -> Self {
        Self::default()
    }

    /// With these chunks.
    pub fn with_chunks(self, chunks: HeadChunks) -> Self {
        Self { chunks, ..self }
    }

    /// With this temperature.
    pub fn with_temperature(self, temperature: f64) -> Self {
        Self {
            temperature,
            ..self
        }
    }

    /// With the entropy and the other statistics, or without.
    pub fn with_statistics(self, statistics: bool) -> Self {
        Self { statistics, ..self }
    }
}

/// Log-probabilities of the labelled tokens, `ℓ = log softmax(z / T)[y]`, of the hidden states that the head would turn into logits `z`.
///
/// Of the logits there is a chunk in memory at a time, in the forward pass as in the backward, which computes them again. The gradient
/// takes one number for each token, so that any objective can be computed of `ℓ`:
///
/// ```text
/// dz_j = [ g·(1[j = y] − p_j) − h·p_j·(ln p_j + H) + q·(1/V − p_j) ] / T        p = softmax(z / T)
/// ```
///
/// with `g`, `h` and `q` the gradients of `ℓ`, of the entropy `H = −Σ p·ln p` and of the mean `(1/V)·Σ ln p`. Kernels, dtypes and memory are
/// those of [`sft_head_loss`]; where this crate was not built with the features of the backend, all logits of the labelled positions are in
/// memory. [`HeadLoss`] says what an adapter changes.
///
/// With [`statistics`](LogProbsConfig::statistics) the result has the entropy and the mean of each row's log-probabilities (both with
/// gradients), `ln Σ p²`, and whether the label is a token of the largest logit.
///
/// # Shapes
///
/// - `hidden`: `[batch, seq, features]`
/// - values of the result: `[tokens]`, f32 (f64 for f64 hidden states), sequence by sequence
///
/// # Errors
///
/// [`PeftError::Shape`] where the hidden states are not of the head's features; [`PeftError::TokenRange`] for a label outside of the
/// vocabulary; [`PeftError::Config`] for a position outside of the batch, and a temperature that is not positive and finite.
pub fn head_log_probs(
    hidden: Tensor<3>,
    head: &impl HeadLoss,
    labels: &Labels,
    config: &LogProbsConfig,
) -> Result<LogProbs> {
    let [batch, seq, vocabulary] = checked_dims(&hidden, head)?;
    let temperature = config.temperature;
    if !(temperature.is_finite() && temperature > 0.0) {
        return Err(PeftError::config(
            "temperature",
            temperature,
            "a positive number; a sampler that takes the most likely token is no distribution to train on",
        ));
    }
    let pairs = labels.checked([batch, seq], vocabulary)?;
    let options = Options {
        chunks: config.chunks,
        temperature,
        statistics: config.statistics,
    };
    let values = head.head_rows(hidden, pairs).log_probs(&options);
    let row = |place: usize| {
        let count = labels.tokens();
        values.clone().narrow(0, place, 1).reshape([count])
    };
    let log_probs = LogProbs::new(row(rows::LOG_PROB), labels.shared_lens())?;
    if !config.statistics {
        return Ok(log_probs);
    }
    log_probs
        .with_entropy(row(rows::ENTROPY))?
        .with_mean(row(rows::MEAN))?
        .with_log_sum_sq(row(rows::LOG_SUM_SQ))?
        .with_top1(row(rows::IS_TOP))
}

/// `[batch, seq, vocabulary]` of hidden states that fit the head.
fn checked_dims(hidden: &Tensor<3>, head: &impl HeadLoss) -> Result<[usize; 3]> {
    let [batch, seq, width] = hidden.dims();
    let [features, vocabulary] = head.head_dims();
    if width != features {
        return Err(PeftError::Shape {
            tensor: "hidden".into(),
            expected: vec![batch, seq, features],
            found: vec![batch, seq, width],
        });
    }
    Ok([batch, seq, vocabulary])
}
