//! Writes an adapter of every option that this crate has, with the outputs that it gives, for Python's PEFT to check.
//!
//! ```text
//! cargo run --release --example interchange -- --model BASE --kinds KINDS --out DIR
//! ```
//!
//! `BASE` is a Llama in Hugging Face's layout, `KINDS` the folder of `tests/golden/kinds`. `DIR` gets `tokens.safetensors`
//! (`input_ids`), a directory for each case with the adapter and `logits.safetensors`, and `cases.json`: `[{name, what, adapter}]`;
//! and a folder `kinds`, likewise, of every kind of layer and parameter. `scripts/check_interchange.py` runs this, checks each case
//! with PEFT and writes the tables of `docs/interchange.md`.

mod args;
mod kinds_cases;
mod llama_cases;

#[path = "../../tests/golden/kinds/model.rs"]
mod kinds;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};
use burn_peft::adapter::Change;
use burn_peft::format::{LoadOptions, SaveOptions};
use burn_peft::model::{PeftConfig, PeftModel};
use llama::arguments;
use llama::model::LlamaForCausalLm;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use args::Args;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    arguments::exit(run(&arguments::parse()))
}

fn run(args: &Args) -> Outcome<()> {
    args.check()?;
    let device = Device::default();
    device.seed(0);
    std::fs::create_dir_all(&args.out)?;
    let (config, base) = LlamaForCausalLm::from_pretrained(&args.model, &device)?;
    let count = config.vocab_size as i64;
    let tokens: Vec<i64> = (0..2 * 12).map(|place| (place * 37 + 5) % count).collect();
    let tokens = TensorData::new(tokens, [2, 12]);
    write(
        &args.out.join("tokens.safetensors"),
        &[("input_ids", &tokens)],
    )?;
    let tokens = Tensor::<2, Int>::from_data(tokens, &device);
    let mut cases = Vec::new();
    for (name, what, adapter, make) in llama_cases::CASES {
        let mut model = base.clone().into_peft();
        make(&mut model).map_err(|error| format!("{name}: {error}"))?;
        let dir = args.out.join(name);
        let options = SaveOptions {
            digest: name == "digest",
            ..Default::default()
        };
        let at = model.save_adapter(adapter, &dir, &options)?;
        // Of the file, not of the model in memory: PEFT, too, makes factors f32 when it reads them.
        let mut read = base.clone().into_peft();
        read.load_adapter(adapter, &at, &LoadOptions::default())?;
        let logits = read.forward(tokens.clone()).into_data();
        write(&dir.join("logits.safetensors"), &[("logits", &logits)])?;
        let at = at.strip_prefix(&args.out)?.to_string_lossy().into_owned();
        cases.push(serde_json::json!({ "name": name, "what": what, "adapter": at }));
    }
    write_json(&args.out.join("cases.json"), &cases)?;
    let kinds = kinds_cases::write_all(&args.kinds, &args.out.join("kinds"), &device)?;
    println!("{} adapters in {}", cases.len() + kinds, args.out.display());
    Ok(())
}

/// Adds an adapter whose values are as if it had been trained: for long, so that nothing is left of how it began, or a little.
fn trained_as<M: Module>(
    model: &mut PeftModel<M>,
    name: &str,
    config: &PeftConfig,
    long: bool,
) -> Outcome<()> {
    model.add_adapter(name, config)?;
    let changes = model.changes(name)?.into_iter();
    let changes = changes.map(|(path, change)| (path, moved(change, long)));
    Ok(model.swap_changes(name, config, changes.collect())?)
}

fn moved(change: Change, long: bool) -> Change {
    fn step<const D: usize>(param: &mut Param<Tensor<D>>, keep: bool) {
        let value = param.val();
        let noise = value.random_like(Distribution::Normal(0.0, 0.3));
        *param = Param::from_tensor(if keep { value + noise } else { noise });
    }
    match change {
        Change::Lora(mut lora) => {
            step(&mut lora.a, !long);
            step(&mut lora.b, !long);
            if let Some(bias) = &mut lora.bias {
                step(bias, true);
            }
            if let Some(magnitude) = &mut lora.magnitude {
                let value = magnitude.val();
                let gain = value.random_like(Distribution::Uniform(0.5, 1.5));
                *magnitude = Param::from_tensor(value * gain);
            }
            lora.into()
        }
        Change::Copy(mut copy) => {
            step(&mut copy.values, true);
            copy.into()
        }
        Change::Rows(mut rows) => {
            step(&mut rows.rows, true);
            rows.into()
        }
    }
}

fn write(path: &Path, tensors: &[(&str, &TensorData)]) -> Outcome<()> {
    let views = tensors.iter().map(|(name, data)| {
        let dtype = match data.dtype() {
            DType::I64 => Dtype::I64,
            DType::F32 => Dtype::F32,
            other => return Err(format!("{}: {other:?}", path.display())),
        };
        let view = TensorView::new(dtype, data.shape().to_vec(), data.as_bytes());
        Ok((*name, view.map_err(|error| error.to_string())?))
    });
    let bytes = safetensors::serialize(views.collect::<Result<Vec<_>, _>>()?, None)?;
    std::fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()).into())
}

fn write_json(path: &Path, cases: &[serde_json::Value]) -> Outcome<()> {
    let text = serde_json::to_string_pretty(cases)?;
    Ok(std::fs::write(path, text)?)
}
