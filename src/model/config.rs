//! What an adapter is and where it goes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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
#[non_exhaustive]
pub struct PeftConfig {
    /// The delta; rank and alpha are the defaults of the patterns in `targets`.
    pub lora: LoraConfig,
    /// The modules that get one, and the ranks and alphas that differ.
    pub targets: TargetConfig,
    /// Tensors of three axes that hold the weights of experts, `[experts, d_in, d_out]` or as
    /// [`PeftModel::with_expert_layout`](super::PeftModel::with_expert_layout) says, and that get factors for each expert: their
    /// paths, or the ends of those, as in `mlp.experts.gate_up_proj`. They are composed, `W_e + s·A_e·B_e`, in any forward pass.
    /// Without dropout, DoRA and bias, as in PEFT. Default: none.
    pub target_parameters: Vec<String>,
    /// Modules whose every parameter is trained whole, as a copy that belongs to the adapter: paths or their last segments.
    /// They get no delta. Default: none.
    pub modules_to_save: Vec<String>,
    /// The biases of the base that are trained as copies, likewise. Default: none.
    pub bias: BiasMode,
    /// The tokens whose embeddings are trained, likewise. Default: none.
    pub trainable_tokens: Option<TrainableTokens>,
    /// Say in a saved file that the head of the model is its embedding, and has the embedding's changes: PEFT's
    /// `ensure_weight_tying`. In Burn the two are one parameter then, and this changes files only: without it, PEFT would leave
    /// the head as it is. The head is called as [`PeftModel::with_head`](super::PeftModel::with_head) says. Default: false.
    pub ensure_weight_tying: bool,
}

/// Which biases of the base an adapter trains, as copies of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BiasMode {
    /// None.
    #[default]
    None,
    /// All that the model has.
    All,
    /// Those of the layers that have a delta.
    LoraOnly,
}

/// Tokens whose rows of an embedding an adapter trains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TrainableTokens {
    /// Of the input embedding: the only embedding of the model, or the one of a usual name (`embed_tokens`, `wte`,
    /// `word_embeddings`, ...), or the one with the most rows.
    Input(Vec<usize>),
    /// Of the embeddings of these names: paths or their last segments.
    Named(BTreeMap<String, Vec<usize>>),
}

impl PeftConfig {
    /// The delta `lora` for the modules that `targets` chooses.
    pub fn new(lora: LoraConfig, targets: TargetConfig) -> Self {
        Self {
            lora,
            targets,
            target_parameters: Vec::new(),
            modules_to_save: Vec::new(),
            bias: BiasMode::None,
            trainable_tokens: None,
            ensure_weight_tying: false,
        }
    }

    /// Whether it says of anything to train beside low-rank changes.
    pub(super) fn has_more_than_targets(&self) -> bool {
        !self.modules_to_save.is_empty()
            || self.bias != BiasMode::None
            || self.trainable_tokens.is_some()
    }

    /// Gives the experts in these tensors factors too.
    pub fn with_target_parameters<S: Into<String>>(
        mut self,
        names: impl IntoIterator<Item = S>,
    ) -> Self {
        self.target_parameters = names.into_iter().map(Into::into).collect();
        self
    }

    /// Trains these modules whole, as copies that belong to the adapter: an output head, or the norms.
    pub fn with_modules_to_save<S: Into<String>>(
        mut self,
        names: impl IntoIterator<Item = S>,
    ) -> Self {
        self.modules_to_save = names.into_iter().map(Into::into).collect();
        self
    }

    /// Trains biases of the base, as copies that belong to the adapter.
    pub fn with_bias(mut self, bias: BiasMode) -> Self {
        self.bias = bias;
        self
    }

    /// Says in a saved file that the head is the embedding.
    pub fn with_ensure_weight_tying(mut self, tied: bool) -> Self {
        self.ensure_weight_tying = tied;
        self
    }

    /// Trains the embeddings of these tokens, as rows that belong to the adapter.
    pub fn with_trainable_tokens(mut self, tokens: TrainableTokens) -> Self {
        self.trainable_tokens = Some(tokens);
        self
    }
}
