//! Adapters of a [`PeftModel`] from and to PEFT's directory.
//!
//! On loading, the tensors of the file decide which modules get a delta; `target_modules` is not matched against the
//! model. Burn holds `A [d_in, r]` and `B [r, d_out]`, the file their transposes.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{FloatDType, Tensor, TensorData};

use super::adapter::{AdapterFile, LoraTensors, adapter_dir};
use super::config::AdapterConfig;
use super::elements::transposed;
use super::keys::{Factor, NameMap, tensor_key};
use super::read::ReadOptions;
use super::report::{LoadReport, Mismatch};
use super::write::WriteOptions;
use crate::adapter::{Lora, LoraConfig};
use crate::model::{ModuleNames, PeftConfig, PeftModel, TargetModules};
use crate::Result;

/// How an adapter of a model is saved.
#[derive(Clone, Debug, Default)]
pub struct SaveOptions {
    /// How the files are written.
    pub write: WriteOptions,
    /// Maps the model's module paths to those of the file.
    pub names: NameMap,
    /// What the model is for, for PEFT: one of its task types such as `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// Name of the base model, by which Python's PEFT finds it.
    pub base_model: Option<String>,
}

/// How an adapter is loaded into a model. The default is the strictest.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// How the files are read.
    pub read: ReadOptions,
    /// Maps the module paths of the file to the model's.
    pub names: NameMap,
    /// Whether tensors that have no place in the model, or one of another shape, are reported only. Nothing of a module
    /// is loaded unless both of its factors fit.
    pub allow_incomplete: bool,
    /// Dtype of the factors in the model. Default: that of the file.
    pub dtype: Option<FloatDType>,
}

impl<M: Module> PeftModel<M> {
    /// Saves an adapter as PEFT does: in `dir` itself if it is named `default`, else in its folder.
    ///
    /// The directory is what `PeftModel.from_pretrained` of Python's PEFT 0.21 loads. `target_modules` is written as it
    /// was given, or as the list of module names that `"all-linear"` stood for.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`]; those of [`AdapterFile::write`], for instance [`PeftError::Exists`]; and
    /// [`PeftError::Config`] for a path that the names cannot map.
    pub fn save_adapter(&self, name: &str, dir: &Path, options: &SaveOptions) -> Result<()> {
        let config = self.config(name)?;
        let factors = self.factors(name)?;
        let mut tensors = Vec::with_capacity(factors.len());
        for (path, lora) in &factors {
            tensors.push(LoraTensors {
                path: options.names.to_file(path)?,
                a: lora.a.val().without_autodiff().transpose().into_data(),
                b: lora.b.val().without_autodiff().transpose().into_data(),
            });
        }
        let mut targets = config.targets.clone();
        if targets.target_modules == TargetModules::AllLinear {
            // PEFT expands it before saving too: what it means depends on the model. The full paths are exact.
            targets.target_modules =
                TargetModules::List(tensors.iter().map(|tensors| tensors.path.clone()).collect());
            targets.exclude_modules = None::<ModuleNames>;
        }
        let lora = &config.lora;
        let mut file = AdapterConfig::new(lora.rank, lora.alpha, targets)
            .with_lora_dropout(lora.dropout)
            .with_use_rslora(lora.rslora);
        file.task_type = options.task_type.clone();
        file.base_model_name_or_path = options.base_model.clone();
        AdapterFile { config: file, tensors }.write(&adapter_dir(dir, name)?, &options.write)
    }

    /// Loads an adapter from where [`save_adapter`](Self::save_adapter) or Python's PEFT put it, adds it under `name` and
    /// makes it the active one.
    ///
    /// Strict: every tensor must land, and a module must have both factors. Factors are never initialised at random
    /// first.
    ///
    /// # Errors
    ///
    /// Those of [`AdapterFile::read`]; [`PeftError::Incomplete`] with every tensor that is unexpected or of another shape;
    /// those of [`insert_adapter`](Self::insert_adapter). The model is then as it was.
    pub fn load_adapter(&mut self, name: &str, dir: &Path, options: &LoadOptions) -> Result<LoadReport> {
        let dir = adapter_dir(dir, name)?;
        let file = AdapterFile::read(&dir, &options.read)?;
        let matcher = file.config.validate()?;
        let lora = LoraConfig::new(file.config.r)
            .with_alpha(file.config.lora_alpha)
            .with_dropout(file.config.lora_dropout)
            .with_rslora(file.config.use_rslora);
        let config = PeftConfig::new(lora.clone(), file.config.targets.clone());

        let linears = self.linears();
        let mut report = LoadReport::default();
        let mut factors: Vec<(String, Lora)> = Vec::with_capacity(file.tensors.len());
        for tensors in file.tensors {
            let keys = [Factor::A, Factor::B].map(|factor| tensor_key(&tensors.path, factor));
            let path = options.names.to_model(&tensors.path)?;
            let Some(([d_in, d_out], device)) = linears.get(&path) else {
                report.unexpected.extend(keys);
                continue;
            };
            let rank = matcher.rank_for(&tensors.path, lora.rank)?;
            let fits = |key: &String, data: &TensorData, expected: [usize; 2]| {
                (data.shape().as_slice() != expected).then(|| Mismatch {
                    tensor: key.clone(),
                    expected: expected.into(),
                    found: data.shape().to_vec(),
                })
            };
            let [key_a, key_b] = &keys;
            let mismatched: Vec<Mismatch> = [fits(key_a, &tensors.a, [rank, *d_in]), fits(key_b, &tensors.b, [*d_out, rank])]
                .into_iter()
                .flatten()
                .collect();
            if !mismatched.is_empty() {
                report.mismatched.extend(mismatched);
                continue;
            }
            let mut config = lora.clone().with_dtype(FloatDType::F32);
            config.rank = rank;
            config.alpha = matcher.alpha_for(&tensors.path, lora.alpha)?;
            let factor = |data: TensorData| {
                let dtype = options.dtype.map_or(data.dtype(), Into::into);
                device.memory_persistent_allocations(data, |data| {
                    Tensor::<2>::from_data(transposed(&data), (device, dtype))
                })
            };
            factors.push((path, config.with_factors(factor(tensors.a), factor(tensors.b))?));
            report.loaded.extend(keys);
        }
        for names in [&mut report.loaded, &mut report.unexpected] {
            names.sort();
        }
        if !options.allow_incomplete {
            report = report.strict().map_err(|error| error.in_file(&dir))?;
        }
        self.insert_adapter(name, &config, factors)?;
        Ok(report)
    }
}
