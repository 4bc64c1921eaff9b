//! The model of a run: the base, packed or dense, and its adapter.

use std::error::Error;
use std::path::Path;

use burn::module::Module;
use burn::tensor::Device;
use burn_peft::adapter::LoraConfig;
use burn_peft::format::{BaseOptions, LoadOptions, SaveOptions};
use burn_peft::model::{AttachReport, DEFAULT_ADAPTER, PeftConfig, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;

use crate::args::Args;
use llama::config::LlamaConfig;
use llama::model::LlamaForCausalLm;
use llama::progress;

/// How a model is fine-tuned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// An adapter on a base packed in NF4, scales quantised too.
    QLora,
    /// An adapter on a dense base.
    Lora,
    /// No adapter: every weight of a dense base is trained.
    Full,
}

impl Method {
    /// What the command line asks for.
    pub fn of(args: &Args) -> Self {
        if args.no_quantize {
            Self::Lora
        } else {
            Self::QLora
        }
    }

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::QLora => "QLoRA",
            Self::Lora => "LoRA",
            Self::Full => "full",
        }
    }
}

/// The base model, packed if `method` says so. It has no adapter and nothing of it trains.
pub fn base(
    args: &Args,
    method: Method,
    device: &Device,
) -> Result<PeftModel<LlamaForCausalLm>, Box<dyn Error>> {
    let mut options = BaseOptions::new()
        .with_dtype(device.settings().float_dtype)
        .with_progress(progress::bar());
    if method == Method::QLora {
        // Every linear layer but the head, as PEFT and bitsandbytes do; dense they are at no time.
        let nf4 = Nf4Config::new().with_double_quant(true);
        options = options.with_nf4(TargetConfig::all_linear(), nf4);
    }
    let (_, llama) = LlamaForCausalLm::from_pretrained_with(&args.model, device, options)?;
    Ok(llama.into_peft())
}

/// Checks that the adapter fits the model, without reading any weight of it.
///
/// Error: that of adding the adapter, for instance for targets that the model has not.
pub fn check_adapter(args: &Args, device: &Device) -> Result<(), Box<dyn Error>> {
    // Parameters are made at their first use, so that this takes no memory but for the factors.
    let llama = LlamaConfig::from_dir(&args.model)?.init(device);
    add_adapter(&mut PeftModel::new(llama), args)
        .map(drop)
        .map_err(|error| format!("--targets {}: {error}", args.targets).into())
}

fn add_adapter(
    model: &mut PeftModel<LlamaForCausalLm>,
    args: &Args,
) -> burn_peft::Result<AttachReport> {
    let lora = LoraConfig::new(args.rank)
        .with_alpha(args.alpha)
        .with_dropout(args.dropout);
    model.add_adapter(
        DEFAULT_ADAPTER,
        &PeftConfig::new(lora, args.target_config()),
    )
}

/// The base model ready to train: with a fresh adapter, or unfrozen.
pub fn trainable(
    args: &Args,
    method: Method,
    seed: u64,
    device: &Device,
) -> Result<PeftModel<LlamaForCausalLm>, Box<dyn Error>> {
    let mut model = base(args, method, device)?;
    if method == Method::Full {
        return Ok(model.unfreeze());
    }
    device.seed(seed);
    add_adapter(&mut model, args)?;
    Ok(model)
}

/// Saves the adapter as PEFT's directory; an older one there is replaced.
pub fn save(model: &PeftModel<LlamaForCausalLm>, args: &Args) -> Result<(), Box<dyn Error>> {
    let options = SaveOptions {
        overwrite: true,
        task_type: Some("CAUSAL_LM".into()),
        base_model_name_or_path: args
            .model
            .file_name()
            .map(|name| name.to_string_lossy().into()),
        ..Default::default()
    };
    model.save_adapter(DEFAULT_ADAPTER, &args.out, &options)?;
    Ok(())
}

/// A fresh base with the adapter of a directory.
pub fn reload(
    args: &Args,
    method: Method,
    dir: &Path,
    device: &Device,
) -> Result<PeftModel<LlamaForCausalLm>, Box<dyn Error>> {
    let mut model = base(args, method, device)?;
    model.load_adapter(DEFAULT_ADAPTER, dir, &LoadOptions::default())?;
    Ok(model)
}
