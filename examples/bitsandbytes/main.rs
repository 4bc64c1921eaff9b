//! Checkpoints in bitsandbytes' format, written from one in bf16 or f32 or read, with the logits that they give.
//!
//! ```text
//! cargo run --release --example bitsandbytes -- write --model BASE --out DIR
//! cargo run --release --example bitsandbytes -- read --model DIR --tokens FILE --out FILE
//! ```
//!
//! `write` packs every linear layer but the head in NF4 and writes `DIR/plain` and `DIR/double`, the latter in small files, each
//! with `ours.safetensors`: `input_ids` I64 and `logits` F32. `read` writes the logits of the tokens in a file.
//! `scripts/check_bitsandbytes.py` runs both and compares with transformers.

mod args;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use burn_peft::format::{BaseCheckpoint, BaseOptions, SaveBaseOptions};
use burn_peft::model::{PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use llama::arguments;
use llama::model::LlamaForCausalLm;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use args::Args;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    arguments::exit(run(arguments::parse()))
}

fn run(args: Args) -> Outcome<()> {
    args.check()?;
    match args {
        Args::Write {
            model,
            out,
            max_shard_bytes,
        } => {
            for (name, double_quant, max_shard_bytes) in [
                ("plain", false, u64::MAX),
                ("double", true, max_shard_bytes),
            ] {
                write(&model, &out.join(name), double_quant, max_shard_bytes)?;
            }
            Ok(())
        }
        Args::Read { model, tokens, out } => {
            let checkpoint = BaseCheckpoint::open(&tokens)?;
            let shape = checkpoint.tensor("input_ids").ok_or("no input_ids")?.shape;
            let bytes = checkpoint.read("input_ids")?;
            let (ids, _) = bytes.as_chunks();
            let ids: Vec<i64> = ids.iter().map(|id| i64::from_le_bytes(*id)).collect();
            logits(&model, TensorData::new(ids, shape.to_vec()), &out)
        }
    }
}

fn write(base: &Path, dir: &Path, double_quant: bool, max_shard_bytes: u64) -> Outcome<()> {
    let device = Device::default();
    let nf4 = Nf4Config::new().with_double_quant(double_quant);
    // Dense parameters and the type of the states stay the files' own.
    let options = BaseOptions::new().with_nf4(TargetConfig::all_linear(), nf4);
    let (config, model) = LlamaForCausalLm::from_pretrained_with(base, &device, options)?;
    let saving = SaveBaseOptions {
        config: Some(std::fs::read_to_string(base.join("config.json"))?),
        max_shard_bytes,
        ..SaveBaseOptions::default()
    };
    let report = PeftModel::new(model).save_base(dir, &saving)?;
    println!(
        "{}: {} tensors in {} files, {} packed",
        dir.display(),
        report.tensors,
        report.files.len(),
        report.packed
    );
    let ids = (0..2 * 16).map(|place| (place * 37 + 5) % config.vocab_size as i64);
    let ids = TensorData::new(ids.collect::<Vec<_>>(), [2, 16]);
    logits(dir, ids, &dir.join("ours.safetensors"))
}

/// The logits of the model in a directory, computed in f32.
fn logits(model: &Path, ids: TensorData, out: &Path) -> Outcome<()> {
    let device = Device::default();
    let options = BaseOptions::new().with_dtype(FloatDType::F32);
    let (_, model) = LlamaForCausalLm::from_pretrained_with(model, &device, options)?;
    let tokens = Tensor::<2, Int>::from_data(ids.clone(), &device);
    let logits = model.forward(tokens).into_data();
    let views = [
        ("input_ids", Dtype::I64, &ids),
        ("logits", Dtype::F32, &logits),
    ]
    .map(|(name, dtype, data)| {
        let view = TensorView::new(dtype, data.shape().to_vec(), data.as_bytes());
        view.map(|view| (name, view))
    });
    let views = views.into_iter().collect::<Result<Vec<_>, _>>()?;
    std::fs::write(out, safetensors::serialize(views, None)?)?;
    Ok(())
}
