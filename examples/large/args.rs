//! The command line, and the plan's words for it.

use std::path::PathBuf;

use burn_peft::memory::{Float, Loss, Method, ModelShape, Optimizer, Recompute, Setup};
use burn_peft::objective::HeadChunks;
use clap::{ArgGroup, Parser, ValueEnum};

use llama::arguments;
use llama::config::LlamaConfig;
use llama::error::LlamaError;

/// QLoRA training steps of a large model on this machine, planned and measured.
#[derive(Parser, Debug)]
#[command(group(ArgGroup::new("source").required(true).args(["shape", "model"])))]
pub struct Args {
    /// A shape to fill with synthetic weights.
    #[arg(long, value_enum)]
    pub shape: Option<Shape>,
    /// Hugging Face directory of a Llama.
    #[arg(long, value_parser = arguments::directory())]
    pub model: Option<PathBuf>,
    /// Only so many blocks of the shape.
    #[arg(long, requires = "shape", value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub layers: Option<u64>,
    /// Rank of the adapters, on every linear layer but the head.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub rank: u64,
    /// Tokens in a sequence.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(2..=1_048_576))]
    pub seq: u64,
    /// Sequences in a step.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    pub batch: u64,
    /// Training steps; the first makes the optimiser's state.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(2..=1_000_000))]
    pub steps: u64,
    /// Dtype of the adapters; moments are f32 or eight bits in any case.
    #[arg(long, value_enum, default_value_t = Factors::F32)]
    pub adapters: Factors,
    /// What trains.
    #[arg(long, value_enum, default_value_t = Optim::Adamw)]
    pub optimizer: Optim,
    /// Seed of weights, tokens and factors.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// A shape with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// 8.0 billion parameters.
    #[value(name = "llama3-8b")]
    Llama3_8b,
    /// 70.6 billion parameters.
    #[value(name = "llama3-70b")]
    Llama3_70b,
}

/// A dtype of adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Factors {
    /// 4 bytes.
    F32,
    /// 2 bytes, rounded once a step.
    Bf16,
}

/// An optimiser.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Optim {
    /// AdamW with moments in f32.
    Adamw,
    /// AdamW with moments in eight bits.
    #[value(name = "adamw-8bit")]
    Adamw8bit,
}

impl Shape {
    /// As in `config.json`.
    pub fn config(self, layers: Option<u64>) -> LlamaConfig {
        let mut config = match self {
            Self::Llama3_8b => LlamaConfig::new(128_256, 4096, 14_336, 32, 32, 8),
            Self::Llama3_70b => LlamaConfig::new(128_256, 8192, 28_672, 80, 64, 8),
        };
        config.tie_word_embeddings = false;
        config.rope.theta = 500_000.0;
        if let Some(layers) = layers {
            config.num_hidden_layers = layers as usize;
        }
        config
    }
}

impl Args {
    /// What is built: of the shape, or as the directory of the model says.
    ///
    /// Error: the directory has no configuration of a Llama.
    pub fn config(&self) -> Result<LlamaConfig, LlamaError> {
        match (self.shape, &self.model) {
            (Some(shape), _) => Ok(shape.config(self.layers)),
            (None, Some(dir)) => LlamaConfig::from_dir(dir),
            (None, None) => unreachable!("the command line demands one"),
        }
    }

    /// The run in the plan's words.
    pub fn setup(&self) -> Setup {
        let chunks = HeadChunks::default();
        Setup::new(Method::QLora, Float::Bf16)
            .with_rank(self.rank)
            .with_adapter(match self.adapters {
                Factors::F32 => Float::F32,
                Factors::Bf16 => Float::Bf16,
            })
            .with_batch(self.batch, self.seq)
            .with_recompute(Recompute::Segments(1))
            .with_loss(Loss::Chunked {
                tokens: chunks.rows() as u64,
                vocab: chunks.vocabulary() as u64,
            })
            .with_optimizer(match self.optimizer {
                Optim::Adamw => Optimizer::AdamW { state: Float::F32 },
                Optim::Adamw8bit => Optimizer::AdamW8bit,
            })
    }
}

/// The model in the plan's words.
pub fn shape(config: &LlamaConfig) -> ModelShape {
    let mut shape = ModelShape::new(
        config.vocab_size as u64,
        config.hidden_size as u64,
        config.intermediate_size as u64,
        config.num_hidden_layers as u64,
        config.num_attention_heads as u64,
        config.num_key_value_heads as u64,
    )
    .with_tied(config.tie_word_embeddings);
    shape.head_dim = config.head_dim as u64;
    (shape.qkv_bias, shape.output_bias) = (config.attention_bias, config.attention_bias);
    shape.mlp_bias = config.mlp_bias;
    shape
}
