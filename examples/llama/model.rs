//! The whole Llama: embedding, blocks, final norm and head (Touvron et al., "LLaMA", 2023).

use burn::module::Module;
use burn::nn::{
    Embedding, EmbeddingConfig, Initializer, Linear, LinearConfig, RmsNorm, RmsNormConfig,
};
use burn::tensor::{Bool, Device, Int, Tensor};
use burn_peft::Result;
use burn_peft::checkpointing::{Checkpointing, Tape};
use burn_peft::model::{PeftForward, PeftModel, TiedHead};
use burn_peft::objective::{
    HeadChunks, Labels, LogProbs, LogProbsConfig, SftLoss, head_log_probs, sft_head_loss,
};

use super::attention::Layout;
use super::block::{Block, normed};
use super::cache::KvCache;
use super::config::LlamaConfig;
use super::rope::{Rotation, inverse_frequencies};

/// Hugging Face's initialisation of every matrix of a Llama (biases there begin at zero, here from the same normal).
pub const INITIALIZER: Initializer = Initializer::Normal {
    mean: 0.0,
    std: 0.02,
};

/// A Llama without its head. Field names are Hugging Face's.
#[derive(Module, Debug)]
pub struct LlamaModel {
    /// `[vocab_size, hidden_size]`.
    pub embed_tokens: Embedding,
    /// The blocks.
    pub layers: Vec<Block>,
    /// Norm after the last block.
    pub norm: RmsNorm,
    #[module(skip)]
    frequencies: Vec<f32>,
}

/// A Llama that predicts the next token. Field names are Hugging Face's, so PEFT's paths are the model's own.
#[derive(Module, Debug)]
pub struct LlamaForCausalLm {
    /// Everything but the head.
    pub model: LlamaModel,
    /// The head; none if it is the transposed embedding.
    pub lm_head: Option<Linear>,
}

impl LlamaConfig {
    /// A model with random weights on `device`, each made when first used: a weight that is loaded first never is.
    pub fn init(&self, device: &Device) -> LlamaForCausalLm {
        LlamaForCausalLm {
            model: LlamaModel {
                embed_tokens: EmbeddingConfig::new(self.vocab_size, self.hidden_size)
                    .with_initializer(INITIALIZER)
                    .init(device),
                layers: (0..self.num_hidden_layers)
                    .map(|_| Block::new(self, device))
                    .collect(),
                norm: RmsNormConfig::new(self.hidden_size)
                    .with_epsilon(self.rms_norm_eps)
                    .init(device),
                frequencies: inverse_frequencies(&self.rope, self.head_dim),
            },
            lm_head: (!self.tie_word_embeddings).then(|| {
                LinearConfig::new(self.hidden_size, self.vocab_size)
                    .with_bias(false)
                    .with_initializer(INITIALIZER)
                    .init(device)
            }),
        }
    }
}

impl LlamaModel {
    /// Tokens `[batch, seq]` to hidden states `[batch, seq, hidden_size]`, after the final norm.
    ///
    /// `layout` says where the tokens stand; `cache`, if any, holds the tokens before them and takes these in.
    pub fn forward(
        &self,
        tokens: Tensor<2, Int>,
        layout: &Layout,
        mut cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let mut x = self.embed_tokens.forward_peft(tokens);
        let rotation = Rotation::new(&self.frequencies, layout.positions.clone());
        for (index, layer) in self.layers.iter().enumerate() {
            let cache = cache.as_deref_mut().map(|cache| (cache, index));
            x = layer.forward(x, &rotation, &layout.visible, cache);
        }
        normed(&self.norm, x)
    }

    /// As [`forward`](Self::forward) in training, with the blocks checkpointed; the gradients come from the tape.
    ///
    /// Error: `checkpointing` is of segments of no block, or the tokens are on a device without autodiff.
    pub fn forward_checkpointed<'a>(
        &'a self,
        tokens: Tensor<2, Int>,
        layout: &Layout,
        checkpointing: Checkpointing,
    ) -> Result<(Tensor<3>, Tape<'a, Block, 3>)> {
        let x = self.embed_tokens.forward_peft(tokens);
        let rotation = Rotation::new(&self.frequencies, layout.positions.clone());
        let visible = layout.visible.clone();
        let run = move |block: &Block, x| block.forward(x, &rotation, &visible, None);
        let (x, tape) = checkpointing.forward(&self.layers, x, run)?;
        Ok((normed(&self.norm, x), tape))
    }
}

impl LlamaForCausalLm {
    /// The model with adapters, which knows whether its head shares the weight of the embedding.
    pub fn into_peft(self) -> PeftModel<Self> {
        match &self.lm_head {
            Some(_) => PeftModel::new(self),
            None => PeftModel::new(self).with_tied_head("model.embed_tokens"),
        }
    }

    /// Tokens `[batch, seq]` to logits `[batch, seq, vocab_size]`. Rows may be padded on the right.
    pub fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let layout = Layout::causal(tokens.dims()[1], 0, &tokens.device());
        self.forward_with(tokens, &layout, None)
    }

    /// As [`forward`](Self::forward), for tokens that stand elsewhere or follow those of a cache.
    pub fn forward_with(
        &self,
        tokens: Tensor<2, Int>,
        layout: &Layout,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        self.head(self.model.forward(tokens, layout, cache))
    }

    /// Hidden states `[batch, seq, hidden_size]` to logits `[batch, seq, vocab_size]`.
    ///
    /// The logits are the largest activation of training by far: give it only the positions whose logits matter.
    pub fn head(&self, hidden: Tensor<3>) -> Tensor<3> {
        match &self.lm_head {
            Some(head) => head.forward_peft(hidden),
            None => self.model.embed_tokens.attend_peft(hidden),
        }
    }

    /// Cross entropy of tokens `[batch, seq]` with the token that follows each, where `mask` is true: the loss of the logits, of
    /// which there is a chunk at a time. Rows may be padded on the right.
    pub fn loss(
        &self,
        tokens: Tensor<2, Int>,
        targets: Tensor<2, Int>,
        mask: Tensor<2, Bool>,
        chunks: &HeadChunks,
    ) -> Result<SftLoss> {
        let layout = Layout::causal(tokens.dims()[1], 0, &tokens.device());
        let hidden = self.model.forward(tokens, &layout, None);
        self.head_loss(hidden, targets, mask, chunks)
    }

    /// Log-probabilities of the labels, of hidden states `[batch, seq, hidden_size]`, without the logits in memory.
    pub fn log_probs(
        &self,
        hidden: Tensor<3>,
        labels: &Labels,
        config: &LogProbsConfig,
    ) -> Result<LogProbs> {
        match &self.lm_head {
            Some(head) => head_log_probs(hidden, head, labels, config),
            None => head_log_probs(hidden, &self.model.embed_tokens, labels, config),
        }
    }

    /// The loss of hidden states `[batch, seq, hidden_size]`, as [`loss`](Self::loss) gives it.
    pub fn head_loss(
        &self,
        hidden: Tensor<3>,
        targets: Tensor<2, Int>,
        mask: Tensor<2, Bool>,
        chunks: &HeadChunks,
    ) -> Result<SftLoss> {
        match &self.lm_head {
            Some(head) => sft_head_loss(hidden, head, targets, mask, chunks),
            None => sft_head_loss(hidden, &self.model.embed_tokens, targets, mask, chunks),
        }
    }
}
