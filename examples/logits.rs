//! Writes the logits of a Llama, with or without an adapter, so that anyone can compare them with Python's.
//!
//! ```text
//! cargo run --release --example logits -- --model DIR [--adapter DIR] [--quantize none|nf4|nf4-double] [--merge]
//!     --tokens IN.safetensors --out OUT.safetensors
//! ```
//!
//! `IN` holds `input_ids` (I64, `[batch, seq]`), `OUT` gets `logits` (F32, `[batch, seq, vocab]`).

#[path = "llama/mod.rs"]
mod llama;

use std::error::Error;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_peft::format::LoadOptions;
use burn_peft::model::{DEFAULT_ADAPTER, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use clap::{Parser, ValueEnum};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use llama::model::LlamaForCausalLm;

/// Writes the logits of a Llama for given tokens.
#[derive(Parser)]
struct Args {
    /// Hugging Face directory of the base model.
    #[arg(long)]
    model: PathBuf,
    /// PEFT directory of an adapter to put on it.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// How the base's linear layers are held.
    #[arg(long, value_enum, default_value_t = Quantize::None)]
    quantize: Quantize,
    /// Merge the adapter into dense weights first.
    #[arg(long, requires = "adapter")]
    merge: bool,
    /// File with `input_ids`.
    #[arg(long)]
    tokens: PathBuf,
    /// File to write `logits` to.
    #[arg(long)]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Quantize {
    /// Dense, in the device's float type.
    None,
    /// NF4 in blocks of 64, f32 scales.
    Nf4,
    /// NF4 in blocks of 64, scales quantised again.
    Nf4Double,
}

impl Quantize {
    /// Whether the scales are quantised again; none if nothing is.
    fn double_quant(self) -> Option<bool> {
        match self {
            Self::None => None,
            Self::Nf4 => Some(false),
            Self::Nf4Double => Some(true),
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let device = Device::default();
    let (config, model) = LlamaForCausalLm::from_pretrained(&args.model, &device)?;
    let mut model = PeftModel::new(model);
    if let Some(double_quant) = args.quantize.double_quant() {
        let nf4 = Nf4Config::new().with_double_quant(double_quant);
        model.quantize_nf4(&TargetConfig::all_linear(), &nf4)?;
    }
    if let Some(adapter) = &args.adapter {
        model.load_adapter(DEFAULT_ADAPTER, adapter, &LoadOptions::default())?;
    }
    let model = match args.merge {
        true => model.merge_and_unload()?.0,
        false => model.into_module(),
    };
    let tokens = read_tokens(&args.tokens, config.vocab_size)?;
    let logits = model.forward(Tensor::<2, Int>::from_data(tokens, &device));
    write_logits(&args.out, logits)
}

/// Reads `input_ids`, checking type, rank and range.
fn read_tokens(path: &Path, vocab: usize) -> Result<TensorData, Box<dyn Error>> {
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let broken = |reason: String| format!("{}: `input_ids`: {reason}", path.display());
    let file = SafeTensors::deserialize(&bytes).map_err(|error| broken(error.to_string()))?;
    let view = file
        .tensor("input_ids")
        .map_err(|error| broken(error.to_string()))?;
    if view.dtype() != Dtype::I64 || view.shape().len() != 2 || view.shape().contains(&0) {
        let found = format!("{} {:?}", view.dtype(), view.shape());
        return Err(broken(format!("expected I64 [batch, seq], found {found}")).into());
    }
    let tokens =
        TensorData::from_bytes_vec(view.data().to_vec(), view.shape().to_vec(), DType::I64);
    if let Some(token) = tokens
        .iter::<i64>()
        .find(|&token| token < 0 || token >= vocab as i64)
    {
        return Err(broken(format!("token {token} is not in a vocabulary of {vocab}")).into());
    }
    Ok(tokens)
}

/// Writes `logits` in f32.
fn write_logits(path: &Path, logits: Tensor<3>) -> Result<(), Box<dyn Error>> {
    let data = logits.into_data().convert_dtype(DType::F32);
    let view = TensorView::new(Dtype::F32, data.shape().to_vec(), data.as_bytes())?;
    let bytes = safetensors::serialize([("logits", view)], None)?;
    std::fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()).into())
}
