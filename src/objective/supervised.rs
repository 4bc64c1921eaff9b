//! Supervised fine-tuning on log-probabilities: the plain loss, with label smoothing, or weighted as DFT does.

use super::log_probs::LogProbs;
use super::loss::Loss;
use crate::tensor::constant;
use crate::{PeftError, Result};

/// What [`supervised_loss`] is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum SupervisedKind {
    /// `−Σ_t ℓ_t`, which [`sft_head_loss`](super::sft_head_loss) computes too.
    #[default]
    Nll,
    /// `−Σ_t [ (1 − ε)·ℓ_t + ε·(1/V)·Σ_j ln p_tj ]`, the label smoothing of transformers.
    LabelSmoothing(f64),
    /// `−Σ_t sg(e^ℓ_t)·ℓ_t`, dynamic fine-tuning: a token counts as much as it is likely (Y. Wu et al., <https://arxiv.org/abs/2508.05629>).
    Dft,
}

/// A loss of supervised fine-tuning; its count is that of tokens. Divide by the tokens of the whole step:
/// [`Loss::over`](Loss::over).
///
/// # Errors
///
/// [`PeftError::Config`] for a label smoothing outside of `[0, 1)`, and where its log-probabilities come without
/// [statistics](super::LogProbsConfig::statistics).
pub fn supervised_loss(policy: &LogProbs, kind: SupervisedKind) -> Result<Loss> {
    let values = policy.values.clone();
    let sum = match kind {
        SupervisedKind::Nll => values,
        SupervisedKind::LabelSmoothing(epsilon) => {
            if !(0.0..1.0).contains(&epsilon) {
                return Err(PeftError::config(
                    "label_smoothing",
                    epsilon,
                    "a number in [0, 1)",
                ));
            }
            let Some(mean) = policy.mean.clone() else {
                return Err(PeftError::config(
                    "log-probabilities",
                    "no mean over the vocabulary",
                    "those of `head_log_probs` with `LogProbsConfig::with_statistics(true)`",
                ));
            };
            values * (1.0 - epsilon) + mean * epsilon
        }
        SupervisedKind::Dft => constant(values.clone()).exp() * values,
    };
    Ok(Loss {
        sum: sum.sum().neg(),
        count: policy.tokens(),
    })
}
