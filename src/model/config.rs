//! What an adapter is and where it goes.

use super::target::TargetConfig;
use crate::adapter::LoraConfig;

/// Configuration of one adapter of a [`PeftModel`](super::PeftModel): the delta, and the modules that get one.
///
/// ```
/// use burn_peft::adapter::LoraConfig;
/// use burn_peft::model::{PeftConfig, TargetConfig};
///
/// let config = PeftConfig::new(
///     LoraConfig::new(16).with_alpha(32.0).with_dropout(0.05),
///     TargetConfig::all_linear(),
/// );
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct PeftConfig {
    /// The delta; rank and alpha are the defaults of the patterns in `targets`.
    pub lora: LoraConfig,
    /// The modules that get one, and the ranks and alphas that differ.
    pub targets: TargetConfig,
}

impl PeftConfig {
    /// The delta `lora` for the modules that `targets` chooses.
    pub fn new(lora: LoraConfig, targets: TargetConfig) -> Self {
        Self { lora, targets }
    }
}
