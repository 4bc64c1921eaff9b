//! Supervised fine-tuning: cross entropy on the tokens of the response only.
//!
//! ```text
//! L = − (1/N) Σ_t m_t · log softmax(z_t)[y_t]        N = Σ_t m_t
//! ```
//!
//! `z_t` are the logits at position `t`, `y_t` the token that follows, `m_t` is 1 where that token is supervised. As
//! PyTorch's `cross_entropy(..., ignore_index=-100)`, and as the instruction tuning of
//! [Alpaca](https://github.com/tatsu-lab/stanford_alpaca) and [QLoRA](https://arxiv.org/abs/2305.14314) trains.
//!
//! Sum and count come apart on purpose. The mean of the micro-batches' means is not the mean over the step when
//! their counts differ; dividing every sum by the count of the whole step is:
//!
//! ```text
//! for micro-batch i of a step:  backward(sum_i / Σ_j count_j)
//! ```
//!
//! Burn's own `CrossEntropyLoss` gives only the mean, and masks by a token's value, not by its place: an
//! end-of-sequence token that is also the padding would never be learned.

use burn::tensor::{Bool, Int, Tensor};

use super::loss::Loss;
use crate::fused::cross_entropy;
use crate::{PeftError, Result};

/// The sum of −ln p over the supervised tokens of a batch, in nats, f32 (f64 for f64 logits); its count is that of these tokens.
pub type SftLoss = Loss;

/// Cross entropy on the supervised tokens of a batch.
///
/// Only the logits of supervised positions are read, and computed with in f32 where they are narrower; the largest logit
/// is subtracted first, so the loss is finite for any finite logits. What the other positions hold has no influence.
/// [`sft_head_loss`](super::sft_head_loss) is the same without logits.
///
/// On Burn's CPU backend, backward keeps the logits and two numbers for each supervised position; elsewhere the
/// supervised positions' log-probabilities, `[count, vocab]`.
///
/// Reads `targets` and `mask` back from the device, which waits for what the device is doing.
///
/// # Shapes
///
/// - `logits`: `[batch, seq, vocab]`
/// - `targets`: `[batch, seq]`, the token that follows each position; only supervised ones need be in the vocabulary
/// - `mask`: `[batch, seq]`, true where that token is supervised
///
/// # Errors
///
/// [`PeftError::Shape`] when the shapes do not fit; [`PeftError::NoSupervisedTokens`] when the mask is false
/// everywhere; [`PeftError::TokenRange`] for a supervised target outside the vocabulary; [`PeftError::DeviceRead`]
/// when the device fails.
pub fn sft_loss(
    logits: Tensor<3>,
    targets: Tensor<2, Int>,
    mask: Tensor<2, Bool>,
) -> Result<SftLoss> {
    let [batch, seq, vocab] = logits.dims();
    let labels = labelled(targets, mask, [batch, seq], vocab)?;
    let count = labels.len();
    let sum = cross_entropy(logits.reshape([batch * seq, vocab]), labels);
    Ok(SftLoss { sum, count })
}

/// The supervised positions of `batch` times `seq` and their tokens, in ascending order; at least one.
pub(super) fn labelled(
    targets: Tensor<2, Int>,
    mask: Tensor<2, Bool>,
    [batch, seq]: [usize; 2],
    vocabulary: usize,
) -> Result<Vec<(usize, usize)>> {
    let labels = read_labels(targets, mask, [batch, seq], vocabulary)?;
    match labels.is_empty() {
        true => Err(PeftError::NoSupervisedTokens {
            tokens: batch * seq,
        }),
        false => Ok(labels),
    }
}

/// The same; there may be none.
pub(super) fn read_labels(
    targets: Tensor<2, Int>,
    mask: Tensor<2, Bool>,
    [batch, seq]: [usize; 2],
    vocabulary: usize,
) -> Result<Vec<(usize, usize)>> {
    check_shape("targets", [batch, seq], targets.dims())?;
    check_shape("mask", [batch, seq], mask.dims())?;
    let targets = targets
        .try_into_vec_as::<i64>()
        .map_err(|e| unread("targets", e))?;
    let mask = mask
        .try_into_vec_as::<bool>()
        .map_err(|e| unread("mask", e))?;
    let supervised = targets
        .iter()
        .zip(&mask)
        .enumerate()
        .filter(|(_, (_, m))| **m);
    supervised
        .map(|(position, (&token, _))| match usize::try_from(token) {
            Ok(own) if own < vocabulary => Ok((position, own)),
            _ => Err(PeftError::TokenRange {
                token,
                row: position / seq,
                column: position % seq,
                vocabulary,
            }),
        })
        .collect()
}

fn check_shape(tensor: &str, expected: [usize; 2], found: [usize; 2]) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(PeftError::Shape {
        tensor: tensor.into(),
        expected: expected.into(),
        found: found.into(),
    })
}

fn unread(tensor: &str, error: impl std::fmt::Display) -> PeftError {
    PeftError::DeviceRead {
        tensor: tensor.into(),
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    /// Two positions over a vocabulary of four.
    fn loss(logits: [[f32; 4]; 2], targets: [i64; 2], mask: [bool; 2]) -> Result<SftLoss> {
        let device = Device::default();
        sft_loss(
            Tensor::from_data([logits], &device),
            Tensor::from_data([targets], &device),
            Tensor::from_data([mask], &device),
        )
    }

    fn value(tensor: Tensor<1>) -> f32 {
        tensor.try_into_vec_as::<f32>().unwrap()[0]
    }

    #[test]
    fn hand_derived_losses() {
        // Equal logits: every token has probability 1/4, so each costs ln 4.
        let even = loss([[0.0; 4]; 2], [1, 3], [true, true]).unwrap();
        assert_eq!(even.count, 2);
        // One rounding of f32 each, as everywhere in this test.
        assert!((value(even.sum.clone()) - 2.0 * 4f32.ln()).abs() < 1e-6);
        assert!((value(even.mean()) - 4f32.ln()).abs() < 1e-6);
        assert!((value(even.over(8).unwrap()) - 4f32.ln() / 4.0).abs() < 1e-6);

        // Odds 3 : 1 : 1 : 1, so p = 1/2 and 1/6; the second position is not supervised.
        let odds = [3f32.ln(), 0.0, 0.0, 0.0];
        let first = loss([odds; 2], [0, 0], [true, false]).unwrap();
        assert_eq!(first.count, 1);
        assert!((value(first.sum) - 2f32.ln()).abs() < 1e-6);
        let second = loss([odds; 2], [0, 2], [false, true]).unwrap();
        assert!((value(second.sum) - 6f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn extreme_logits_stay_finite() {
        // e^(−2e38) is 0: the wrong token costs the whole distance, the right one nothing.
        let far = [1e38, -1e38, -1e38, -1e38];
        assert_eq!(
            value(loss([far; 2], [1, 0], [true, false]).unwrap().sum),
            2e38
        );
        assert_eq!(
            value(loss([far; 2], [0, 0], [true, true]).unwrap().sum),
            0.0
        );
    }

    #[test]
    fn nothing_supervised_is_an_error() {
        let error = loss([[0.0; 4]; 2], [0, 0], [false, false]).unwrap_err();
        assert!(
            matches!(error, PeftError::NoSupervisedTokens { tokens: 2 }),
            "{error}"
        );
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_an_error_where_supervised() {
        for token in [4, -100, i32::MAX.into()] {
            let error = loss([[0.0; 4]; 2], [0, token], [true, true]).unwrap_err();
            assert!(
                matches!(error, PeftError::TokenRange { token: t, row: 0, column: 1, vocabulary: 4 } if t == token),
                "{error}"
            );
            assert!(loss([[0.0; 4]; 2], [0, token], [true, false]).is_ok());
        }
    }

    #[test]
    fn shapes_and_totals_are_checked() {
        let device = Device::default();
        let logits = Tensor::<3>::zeros([1, 2, 4], &device);
        let targets = Tensor::<2, Int>::zeros([1, 2], &device);
        let mask = Tensor::<2, Bool>::from_data([[true, true]], &device);
        let wrong = Tensor::<2, Int>::zeros([2, 1], &device);
        let error = sft_loss(logits.clone(), wrong, mask.clone()).unwrap_err();
        assert!(
            matches!(&error, PeftError::Shape { tensor, .. } if tensor == "targets"),
            "{error}"
        );
        let wrong = Tensor::<2, Bool>::from_data([[true]], &device);
        let error = sft_loss(logits.clone(), targets.clone(), wrong).unwrap_err();
        assert!(
            matches!(&error, PeftError::Shape { tensor, .. } if tensor == "mask"),
            "{error}"
        );
        let loss = sft_loss(logits, targets, mask).unwrap();
        assert!(matches!(loss.over(1), Err(PeftError::Config { .. })));
        assert!(loss.over(2).is_ok());
    }
}
