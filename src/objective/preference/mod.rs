//! Losses of preferences: DPO and its kin with a reference, CPO, SimPO and ORPO without one, KTO for unpaired labels.

mod cpo;
mod divergence;
mod dpo;
mod dpo_terms;
mod kto;
mod metrics;
mod orpo;
mod pairs;

pub use cpo::{CpoConfig, CpoLoss, cpo_loss, simpo_loss};
pub use divergence::FDivergence;
pub use dpo::{DpoConfig, DpoLoss, dpo_loss};
pub use kto::{FeedbackLoss, FeedbackMetrics, KlBatch, KtoConfig, KtoLoss, kl_partners, kto_loss};
pub use metrics::PreferenceMetrics;
pub use orpo::{OrpoConfig, orpo_loss};
pub use pairs::{Pairs, PreferenceLoss};

use burn::tensor::Tensor;
use burn::tensor::activation::log_sigmoid;

use crate::objective::log_probs::beside;
use crate::{PeftError, Result};

/// `−(1−ε)·ln σ(x) − ε·ln σ(−x)`: the cross entropy of a label that is wrong with probability ε.
fn logistic(x: Tensor<1>, smoothing: f64) -> Tensor<1> {
    let loss = -log_sigmoid(x.clone());
    match smoothing == 0.0 {
        true => loss,
        false => loss * (1.0 - smoothing) - log_sigmoid(-x) * smoothing,
    }
}

/// `max(0, x)`, with a gradient of zero at zero.
fn relu(x: Tensor<1>) -> Tensor<1> {
    burn::tensor::activation::relu(x)
}

fn check_positive(name: &str, value: f64) -> Result<()> {
    match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => Err(PeftError::config(name, value, "a finite number above 0")),
    }
}

fn check_not_negative(name: &str, value: f64) -> Result<()> {
    match value.is_finite() && value >= 0.0 {
        true => Ok(()),
        false => Err(PeftError::config(
            name,
            value,
            "a finite number, at least 0",
        )),
    }
}

/// A share of wrong labels: from one half on the loss would teach the opposite.
fn check_smoothing(name: &str, value: f64) -> Result<()> {
    match (0.0..0.5).contains(&value) {
        true => Ok(()),
        false => Err(PeftError::config(name, value, "at least 0 and below 0.5")),
    }
}
