//! Losses of preferences: DPO and its kin with a reference, CPO, SimPO and ORPO without one, KTO for unpaired labels.
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use burn_peft::objective::LogProbs;
//! use burn_peft::objective::preference::{DpoConfig, DpoLoss, Pairs, dpo_loss};
//!
//! # fn main() -> burn_peft::Result<()> {
//! // Two pairs; the first completions have three tokens and one, those rejected two and two.
//! let device = Device::default().autodiff();
//! let log_probs = |values: &[f32]| Tensor::<1>::from_floats(values, &device);
//! let policy = Pairs::new(
//!     LogProbs::new(log_probs(&[-0.5, -1.0, -0.2, -2.0]).require_grad(), [3, 1])?,
//!     LogProbs::new(log_probs(&[-1.5, -0.7, -0.3, -0.9]).require_grad(), [2, 2])?,
//! )?;
//! let reference = policy.clone().detach();
//! let config = DpoConfig::new().with_losses([(DpoLoss::SIGMOID, 1.0), (DpoLoss::Sft, 0.2)]);
//! let loss = dpo_loss(&policy, &reference, &config)?;
//! let gradients = loss.mean().backward();
//! // Nothing is learned yet: each pair costs ln 2.
//! assert_eq!(loss.metrics()?.margin, 0.0);
//! # let _ = gradients;
//! # Ok(())
//! # }
//! ```

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
