//! Writes an adapter of every option that this crate has, with the logits that it gives, for Python's PEFT to check.
//!
//! ```text
//! cargo run --release --example interchange -- --model BASE --out DIR
//! ```
//!
//! `BASE` is a Llama in Hugging Face's layout. `DIR` gets `tokens.safetensors` (`input_ids`), a directory for each case with the
//! adapter and `logits.safetensors`, and `cases.json`: `[{name, what, adapter}]`. `scripts/check_interchange.py` runs this,
//! checks each case with PEFT and writes the table of `docs/interchange.md`.

#[path = "llama/mod.rs"]
mod llama;

use std::error::Error;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Distribution, FloatDType, Int, Tensor, TensorData};
use burn_peft::adapter::{Combination, Lora, LoraConfig, LoraInit};
use burn_peft::format::{LoadOptions, SaveOptions};
use burn_peft::model::{DEFAULT_ADAPTER, PeftConfig, PeftModel, TargetConfig};
use clap::Parser;
use llama::model::LlamaForCausalLm;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// Writes an adapter of every option, with the logits that it gives.
#[derive(Parser)]
struct Args {
    /// Directory of a Llama in Hugging Face's layout.
    #[arg(long)]
    model: PathBuf,
    /// Directory to write to.
    #[arg(long)]
    out: PathBuf,
}

type Model = PeftModel<LlamaForCausalLm>;
type Outcome<T> = Result<T, Box<dyn Error>>;

/// A case: its name, what it shows, the adapter's name, and how it comes to be in a model.
type Case = (
    &'static str,
    &'static str,
    &'static str,
    fn(&mut Model) -> Outcome<()>,
);

const CASES: [Case; 15] = [
    (
        "lora",
        "LoRA on q and v, `α ≠ r`",
        DEFAULT_ADAPTER,
        |model| {
            let lora = LoraConfig::new(4).with_alpha(10.0);
            trained(
                model,
                DEFAULT_ADAPTER,
                lora,
                TargetConfig::list(["q_proj", "v_proj"]),
            )
        },
    ),
    (
        "fraction",
        "a fractional `α`, and dropout",
        DEFAULT_ADAPTER,
        |model| {
            let lora = LoraConfig::new(3).with_alpha(4.5).with_dropout(0.25);
            trained(
                model,
                DEFAULT_ADAPTER,
                lora,
                TargetConfig::list(["o_proj", "down_proj"]),
            )
        },
    ),
    (
        "rslora",
        "rsLoRA on all linear layers",
        DEFAULT_ADAPTER,
        |model| {
            let lora = LoraConfig::new(4).with_alpha(3.0).with_rslora(true);
            trained(model, DEFAULT_ADAPTER, lora, TargetConfig::all_linear())
        },
    ),
    (
        "dora",
        "DoRA on all linear layers",
        DEFAULT_ADAPTER,
        |model| {
            let lora = LoraConfig::new(4).with_dora(true);
            trained(model, DEFAULT_ADAPTER, lora, TargetConfig::all_linear())
        },
    ),
    (
        "dora-rslora",
        "DoRA with rsLoRA's scale",
        DEFAULT_ADAPTER,
        |model| {
            let lora = LoraConfig::new(2).with_dora(true).with_rslora(true);
            trained(
                model,
                DEFAULT_ADAPTER,
                lora,
                TargetConfig::list(["up_proj", "k_proj"]),
            )
        },
    ),
    ("bf16", "factors in bf16", DEFAULT_ADAPTER, |model| {
        let lora = LoraConfig::new(4).with_dtype(FloatDType::BF16);
        trained(
            model,
            DEFAULT_ADAPTER,
            lora,
            TargetConfig::list(["q_proj", "gate_proj"]),
        )
    }),
    (
        "patterns",
        "`rank_pattern` and `alpha_pattern`",
        DEFAULT_ADAPTER,
        |model| {
            let targets = TargetConfig::list(["q_proj", "k_proj", "down_proj"])
                .with_rank_pattern("down_proj", 2)
                .with_rank_pattern(r"layers\.1\.self_attn\.q_proj", 6)
                .with_alpha_pattern("k_proj", 1.5);
            trained(model, DEFAULT_ADAPTER, LoraConfig::new(4), targets)
        },
    ),
    (
        "expression",
        "`target_modules` as an expression, with look-ahead",
        DEFAULT_ADAPTER,
        |model| {
            let targets = TargetConfig::regex(r".*\.(?!o_proj)\w_proj");
            trained(model, DEFAULT_ADAPTER, LoraConfig::new(4), targets)
        },
    ),
    ("exclude", "`exclude_modules`", DEFAULT_ADAPTER, |model| {
        let targets = TargetConfig::list(["q_proj", "v_proj"])
            .with_exclude_modules(["layers.0.self_attn.v_proj"]);
        trained(model, DEFAULT_ADAPTER, LoraConfig::new(4), targets)
    }),
    (
        "layers",
        "`layers_to_transform`",
        DEFAULT_ADAPTER,
        |model| {
            let targets = TargetConfig::list(["q_proj", "v_proj"]).with_layers_to_transform([1]);
            trained(model, DEFAULT_ADAPTER, LoraConfig::new(4), targets)
        },
    ),
    ("head", "the output head", DEFAULT_ADAPTER, |model| {
        let targets = TargetConfig::list(["lm_head", "q_proj"]);
        trained(model, DEFAULT_ADAPTER, LoraConfig::new(4), targets)
    }),
    (
        "random",
        "`init_lora_weights: false`, untrained",
        DEFAULT_ADAPTER,
        |model| {
            let lora = LoraConfig::new(4).with_init(LoraInit::Random);
            let config = PeftConfig::new(lora, TargetConfig::list(["q_proj"]));
            model.add_adapter(DEFAULT_ADAPTER, &config)?;
            Ok(())
        },
    ),
    (
        "named",
        "an adapter of another name, in its folder",
        "second",
        |model| {
            let lora = LoraConfig::new(4);
            trained(model, "second", lora, TargetConfig::list(["q_proj"]))
        },
    ),
    (
        "cat",
        "two adapters concatenated, of ranks and modules that differ",
        "both",
        |model| {
            two(model)?;
            Ok(model.add_weighted_adapter(
                "both",
                &[("one", 0.5), ("two", -1.5)],
                Combination::Cat,
            )?)
        },
    ),
    (
        "linear",
        "two adapters combined factor by factor",
        "both",
        |model| {
            two(model)?;
            let adapters = [("one", 0.5), ("third", 1.5)];
            Ok(model.add_weighted_adapter("both", &adapters, Combination::Linear)?)
        },
    ),
];

fn main() {
    if let Err(error) = run() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run() -> Outcome<()> {
    let args = Args::parse();
    let device = Device::default();
    device.seed(0);
    std::fs::create_dir_all(&args.out)?;
    let (config, base) = LlamaForCausalLm::from_pretrained(&args.model, &device)?;
    let count = config.vocab_size as i64;
    let tokens: Vec<i64> = (0..2 * 12).map(|place| (place * 37 + 5) % count).collect();
    let tokens = TensorData::new(tokens, [2, 12]);
    write(&args.out.join("tokens.safetensors"), "input_ids", &tokens)?;
    let tokens = Tensor::<2, Int>::from_data(tokens, &device);
    let mut cases = Vec::new();
    for (name, what, adapter, make) in CASES {
        let mut model = PeftModel::new(base.clone());
        make(&mut model)?;
        let dir = args.out.join(name);
        let at = model.save_adapter(adapter, &dir, &SaveOptions::default())?;
        // Of the file, not of the model in memory: PEFT, too, makes factors f32 when it reads them.
        let mut read = PeftModel::new(base.clone());
        read.load_adapter(adapter, &at, &LoadOptions::default())?;
        let logits = read.forward(tokens.clone()).into_data();
        write(&dir.join("logits.safetensors"), "logits", &logits)?;
        let at = at.strip_prefix(&args.out)?.to_string_lossy().into_owned();
        cases.push(serde_json::json!({ "name": name, "what": what, "adapter": at }));
    }
    let text = serde_json::to_string_pretty(&cases)?;
    std::fs::write(args.out.join("cases.json"), text)?;
    println!("{} adapters in {}", cases.len(), args.out.display());
    Ok(())
}

/// Adds an adapter whose values are as if it had been trained.
fn trained(model: &mut Model, name: &str, lora: LoraConfig, targets: TargetConfig) -> Outcome<()> {
    let config = PeftConfig::new(lora, targets);
    model.add_adapter(name, &config)?;
    let factors = model.factors(name)?.into_iter();
    let factors = factors.map(|(path, lora)| Ok((path, moved(lora)?)));
    let factors = factors.collect::<burn_peft::Result<_>>()?;
    Ok(model.swap_adapter(name, &config, factors)?)
}

fn moved(lora: Lora) -> burn_peft::Result<Lora> {
    let random = |x: Tensor<2>| x.random_like(Distribution::Normal(0.0, 0.3));
    let config = lora.config();
    let moved = config.with_factors(random(lora.a.val()), random(lora.b.val()))?;
    match lora.magnitude {
        None => Ok(moved),
        Some(magnitude) => {
            let magnitude = magnitude.val();
            let gain = magnitude.random_like(Distribution::Uniform(0.5, 1.5));
            moved.with_magnitude(magnitude * gain)
        }
    }
}

/// Adapters to combine: `one` and `third` of one rank, `two` of another and on other modules.
fn two(model: &mut Model) -> Outcome<()> {
    let list = |names: [&str; 2]| TargetConfig::list(names);
    trained(
        model,
        "one",
        LoraConfig::new(4).with_alpha(2.0),
        list(["q_proj", "v_proj"]),
    )?;
    trained(
        model,
        "two",
        LoraConfig::new(2).with_rslora(true),
        list(["v_proj", "up_proj"]),
    )?;
    trained(
        model,
        "third",
        LoraConfig::new(4),
        list(["v_proj", "up_proj"]),
    )
}

fn write(path: &Path, name: &str, data: &TensorData) -> Outcome<()> {
    let dtype = match data.dtype() {
        DType::I64 => Dtype::I64,
        DType::F32 => Dtype::F32,
        other => return Err(format!("{}: {other:?}", path.display()).into()),
    };
    let view = TensorView::new(dtype, data.shape().to_vec(), data.as_bytes())?;
    let bytes = safetensors::serialize([(name, view)], None)?;
    std::fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()).into())
}
