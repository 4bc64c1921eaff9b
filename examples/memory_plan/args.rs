//! The command line.

use std::path::PathBuf;

use burn_peft::memory::{
    Float, Head, Loss, Method, ModelShape, Optimizer, Recompute, Setup, Targets,
};
use burn_peft::nf4::Nf4Config;
use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Parser, ValueEnum};
use llama::arguments::Outputs;

/// Plans the memory of fine-tuning a model.
#[derive(Parser, Clone, Debug)]
pub struct Args {
    /// A known model.
    #[arg(
        long,
        value_enum,
        default_value = "llama3-8b",
        conflicts_with = "config"
    )]
    shape: Shape,
    /// A Hugging Face config.json, or its directory.
    #[arg(long, value_parser = present())]
    config: Option<PathBuf>,
    /// Only so many blocks of it.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10000))]
    layers: Option<u64>,
    /// Rank of adapters.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=65536))]
    rank: u64,
    /// Which layers have one.
    #[arg(long, value_enum, default_value = "all-linear")]
    targets: Layers,
    /// Dtype of dense weights and activations.
    #[arg(long, value_enum, default_value = "bf16")]
    base: Dtype,
    /// Dtype of adapters.
    #[arg(long, value_enum, default_value = "f32")]
    adapter: Dtype,
    /// Dtype of embedding and head. Default: the base's.
    #[arg(long, value_enum)]
    embeddings: Option<Dtype>,
    /// The head in NF4 too, with QLoRA.
    #[arg(long)]
    nf4_head: bool,
    /// Scales of NF4 in f32.
    #[arg(long)]
    no_double_quant: bool,
    /// What keeps state.
    #[arg(long, value_enum, default_value = "adamw")]
    optimizer: Kind,
    /// Sequences in a step.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=65536))]
    pub batch: u64,
    /// Tokens in a sequence.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=16777216))]
    pub seq: u64,
    /// Checkpointing by segments of so many blocks; 0 keeps everything.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=10000))]
    segments: u64,
    /// Head and loss in chunks of 256 tokens by 4096 logits.
    #[arg(long)]
    chunked: bool,
    /// A PNG file to draw the peaks into.
    #[arg(long)]
    pub out: Option<PathBuf>,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Shape {
    #[value(name = "llama3-8b")]
    Llama3B8,
    #[value(name = "llama3-70b")]
    Llama3B70,
    #[value(name = "smollm2-135m")]
    SmolLm2,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Layers {
    Qv,
    Attention,
    Mlp,
    AllLinear,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Dtype {
    F32,
    Bf16,
    F16,
}

impl From<Dtype> for Float {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
            Dtype::F16 => Self::F16,
        }
    }
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Kind {
    Sgd,
    Adamw,
    #[value(name = "adamw-8bit")]
    Adamw8bit,
}

/// A file or directory that is there.
fn present() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| match path.exists() {
        true => Ok(path),
        false => Err("there is no such file or directory"),
    })
}

impl Args {
    /// Checks, before the work, that the picture can be written, and not over the configuration.
    ///
    /// Error: the argument at fault, and why.
    pub fn check(&self) -> Result<(), String> {
        let Some(out) = &self.out else {
            return Ok(());
        };
        if out
            .extension()
            .is_none_or(|extension| !extension.eq_ignore_ascii_case("png"))
        {
            return Err(format!(
                "--out: expected the path of a file that ends in .png, found {}",
                out.display()
            ));
        }
        let config = self.config.iter();
        config
            .fold(Outputs::new(), |outputs, path| {
                outputs.with_input("--config", path)
            })
            .file("--out", out)
    }

    /// The model.
    pub fn shape(&self) -> burn_peft::Result<ModelShape> {
        let shape = match (&self.config, self.shape) {
            (Some(path), _) => ModelShape::from_config(path)?,
            (None, Shape::Llama3B8) => ModelShape::llama3_8b(),
            (None, Shape::Llama3B70) => ModelShape::llama3_70b(),
            (None, Shape::SmolLm2) => ModelShape::smollm2_135m(),
        };
        Ok(match self.layers {
            Some(layers) => shape.with_layers(layers),
            None => shape,
        })
    }

    /// What the model is called.
    pub fn name(&self) -> String {
        match (&self.config, self.shape) {
            (Some(path), _) => path.display().to_string(),
            (None, Shape::Llama3B8) => "Llama 3 8B".into(),
            (None, Shape::Llama3B70) => "Llama 3 70B".into(),
            (None, Shape::SmolLm2) => "SmolLM2 135M".into(),
        }
    }

    /// The setup, of QLoRA.
    pub fn setup(&self) -> Setup {
        let setup = Setup::new(Method::QLora, self.base.into())
            .with_rank(self.rank)
            .with_targets(match self.targets {
                Layers::Qv => Targets::QUERY_VALUE,
                Layers::Attention => Targets::ATTENTION,
                Layers::Mlp => Targets::MLP,
                Layers::AllLinear => Targets::ALL_LINEAR,
            })
            .with_adapter(self.adapter.into())
            .with_embeddings(self.embeddings.unwrap_or(self.base).into())
            .with_nf4(Nf4Config::new().with_double_quant(!self.no_double_quant))
            .with_optimizer(match self.optimizer {
                Kind::Sgd => Optimizer::Sgd,
                Kind::Adamw => Optimizer::AdamW { state: Float::F32 },
                Kind::Adamw8bit => Optimizer::AdamW8bit,
            })
            .with_batch(self.batch, self.seq)
            .with_recompute(match self.segments {
                0 => Recompute::Never,
                blocks => Recompute::Segments(blocks),
            });
        let setup = match self.nf4_head {
            true => setup.with_head(Head::Nf4),
            false => setup,
        };
        match self.chunked {
            true => setup.with_loss(Loss::Chunked {
                tokens: 256,
                vocab: 4096,
            }),
            false => setup,
        }
    }
}
