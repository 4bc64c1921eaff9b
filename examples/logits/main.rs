//! Writes the logits of a Llama, with or without an adapter, so that anyone can compare them with Python's.
//!
//! ```text
//! cargo run --release --example logits -- --model DIR [--adapter DIR] [--quantize none|nf4|nf4-double] [--merge]
//!     --tokens IN.safetensors --out OUT.safetensors
//! ```
//!
//! `IN` holds `input_ids` (I64, `[batch, seq]`), `OUT` gets `logits` (F32, `[batch, seq, vocab]`).

mod args;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use args::Args;
use llama::arguments;
use llama::config::LlamaConfig;

fn main() -> ExitCode {
    arguments::exit(run(&arguments::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    args.check()?;
    let device = Device::default();
    // Before the model, which takes longer.
    let vocab_size = LlamaConfig::from_dir(&args.model.model)?.vocab_size;
    let tokens = read_tokens(&args.tokens, vocab_size)?;
    let (_, model) = args.model.open(&device)?;
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
