//! The options of the command-line examples that open a model: a base, how it is held, and an adapter.

use std::error::Error;
use std::path::PathBuf;

use burn::tensor::Device;
use burn_peft::format::{AdapterFile, BaseOptions, LoadOptions, ReadOptions};
use burn_peft::model::{DEFAULT_ADAPTER, TargetConfig};
use burn_peft::nf4::Nf4Config;
use clap::{Args, ValueEnum};

use crate::arguments;
use crate::config::LlamaConfig;
use crate::model::LlamaForCausalLm;
use crate::progress;

/// Which model to open.
#[derive(Args, Debug)]
pub struct ModelArgs {
    /// Hugging Face directory of the base model.
    #[arg(long, value_parser = arguments::directory())]
    pub model: PathBuf,
    /// PEFT directory of an adapter to put on it.
    #[arg(long, value_parser = arguments::directory())]
    pub adapter: Option<PathBuf>,
    /// How the base's linear layers are held.
    #[arg(long, value_enum, default_value_t = Quantize::None)]
    quantize: Quantize,
    /// Merge the adapter into dense weights first.
    #[arg(long, requires = "adapter")]
    merge: bool,
}

/// How the base's linear layers, except the head, are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Quantize {
    /// Dense, in the device's float type.
    None,
    /// NF4 in blocks of 64, f32 scales.
    Nf4,
    /// NF4 in blocks of 64, scales quantised again.
    Nf4Double,
}

impl ModelArgs {
    /// Loads the base, packed on the way, puts the adapter on it and merges, as asked.
    ///
    /// Error: that of reading the base or the adapter. An adapter that cannot be read is found before the base is.
    pub fn open(&self, device: &Device) -> Result<(LlamaConfig, LlamaForCausalLm), Box<dyn Error>> {
        if let Some(adapter) = &self.adapter {
            AdapterFile::read(adapter, &ReadOptions::default())?;
        }
        let mut options = BaseOptions::new()
            .with_dtype(device.settings().float_dtype)
            .with_progress(progress::bar());
        if self.quantize != Quantize::None {
            let nf4 = Nf4Config::new().with_double_quant(self.quantize == Quantize::Nf4Double);
            options = options.with_nf4(TargetConfig::all_linear(), nf4);
        }
        let (config, base) = LlamaForCausalLm::from_pretrained_with(&self.model, device, options)?;
        let mut model = base.into_peft();
        if let Some(adapter) = &self.adapter {
            model.load_adapter(DEFAULT_ADAPTER, adapter, &LoadOptions::default())?;
        }
        let model = match self.merge {
            true => model.merge_and_unload()?.0,
            false => model.into_module(),
        };
        Ok((config, model))
    }
}
