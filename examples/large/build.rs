//! The model: filled or read, packed weight by weight, then adapted.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use burn_peft::adapter::LoraConfig;
use burn_peft::format::BaseOptions;
use burn_peft::model::{DEFAULT_ADAPTER, PeftConfig, PeftModel, Storage, TargetConfig};
use burn_peft::nf4::Nf4Config;
use sha2::{Digest, Sha256};

use crate::args::{Args, Factors};
use crate::factors;
use crate::meter::Meter;
use crate::synthetic;
use llama::config::LlamaConfig;
use llama::model::LlamaForCausalLm;
use llama::progress;

type Llama = PeftModel<LlamaForCausalLm>;

/// The base with its linear layers packed.
pub fn build(
    args: &Args,
    config: &LlamaConfig,
    device: &Device,
    meter: &mut Meter,
) -> Result<Llama, Box<dyn Error>> {
    let nf4 = Nf4Config::new().with_double_quant(true);
    let linear = TargetConfig::all_linear();
    let model = match &args.model {
        None => meter.phase("synthetic weights, packed one by one", || {
            let mut model = PeftModel::new(synthetic::fill(config.init(device), args.seed));
            model.quantize_nf4(&linear, &nf4)?;
            initialize(&model);
            Ok::<_, Box<dyn Error>>(model)
        })?,
        Some(dir) => meter.phase("reading and packing", || {
            let options = BaseOptions::new()
                .with_dtype(FloatDType::BF16)
                .with_nf4(linear, nf4)
                .with_progress(progress::bar());
            let (_, model) = LlamaForCausalLm::from_pretrained_with(dir, device, options)?;
            Ok::<_, Box<dyn Error>>(PeftModel::new(model))
        })?,
    };
    let (checksum, distinct) = meter.phase("checksum of the packed weights", || checksum(&model));
    println!("SHA-256 of codes and scales: {checksum}");
    if !distinct {
        return Err("two packed weights have the same codes".into());
    }
    Ok(model)
}

/// The model with fresh adapters on all linear layers but the head, and their factors.
pub fn adapt(
    args: &Args,
    mut model: Llama,
    meter: &mut Meter,
) -> Result<(Llama, BTreeMap<String, TensorData>), Box<dyn Error>> {
    let before = Storage::of(&model);
    let rank = args.rank as usize;
    let lora = LoraConfig::new(rank)
        .with_alpha(2.0 * rank as f64)
        .with_dtype(match args.adapters {
            Factors::F32 => FloatDType::F32,
            Factors::Bf16 => FloatDType::BF16,
        });
    let config = PeftConfig::new(lora, TargetConfig::all_linear());
    let report = meter.phase("adapters", || {
        let report = model.add_adapter(DEFAULT_ADAPTER, &config)?;
        initialize(&model);
        Ok::<_, Box<dyn Error>>(report)
    })?;
    println!(
        "{} parameters train, of {}; {} layers are adapted",
        report.model.trainable_params,
        report.model.total_params,
        report.targets.matched.len()
    );
    println!("\n{}\n", before.beside(&Storage::of(&model)));
    let factors = factors::of(&model);
    Ok((model, factors))
}

/// Makes every parameter that is made when it is first used.
fn initialize<M: Module>(model: &M) {
    struct Initialize;

    impl ModuleVisitor for Initialize {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if !param.is_initialized() {
                param.base();
            }
        }
    }
    model.visit(&mut Initialize);
}

/// The digest of all packed weights, and whether no two have the same codes.
fn checksum<M: Module>(model: &M) -> (String, bool) {
    struct Packed {
        all: Sha256,
        codes: BTreeSet<Vec<u8>>,
        tensors: usize,
        name: String,
    }

    impl ModuleVisitor for Packed {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.name = name.into();
        }

        fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
            let data = param.val().into_data();
            self.all.update(data.as_bytes());
            if self.name == "codes" {
                self.tensors += 1;
                self.codes.insert(Sha256::digest(data.as_bytes()).to_vec());
            }
        }
    }
    let mut packed = Packed {
        all: Sha256::new(),
        codes: BTreeSet::new(),
        tensors: 0,
        name: String::new(),
    };
    model.visit(&mut packed);
    let digest = packed.all.finalize();
    let hex = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    (hex, packed.codes.len() == packed.tensors)
}
