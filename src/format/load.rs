//! From PEFT's directory to a model.

use std::collections::HashMap;
use std::path::Path;

use burn::module::Module;
#[cfg(feature = "faer")]
use burn::tensor::DType;
use burn::tensor::{Device, FloatDType, Tensor, TensorData};

use super::adapter::{AdapterFile, LoraTensors};
use super::config::{AdapterConfig, InitLoraWeights};
use super::elements;
use super::keys::{Factor, tensor_key};
use super::names::NameMap;
use super::read::{ReadOptions, WEIGHTS_FILE, check_shape};
use super::report::LoadReport;
use crate::adapter::{Lora, LoraConfig, LoraInit};
use crate::model::{Adapted, PeftConfig, PeftModel, TargetConfig, TargetModules};
use crate::{PeftError, Result};

/// How an adapter is put on a model. The default is strict, has f32 factors, and takes the file's paths for the model's.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// What the files may hold.
    pub read: ReadOptions,
    /// How the file calls the model's modules.
    pub names: NameMap,
    /// Element type of the factors; `None` keeps the file's. PEFT, too, makes them f32 by default.
    pub dtype: Option<FloatDType>,
    /// Whether tensors that are missing, unexpected or mismatched are an error, or only reported. An adapter of which
    /// nothing fits is always an error.
    pub strict: bool,
    /// Whether an adapter of the same name gives way, its place among the active ones and the ids of its parameters kept:
    /// a hot swap. Otherwise that is an error.
    pub replace: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            read: ReadOptions::default(),
            names: NameMap::default(),
            dtype: Some(FloatDType::F32),
            strict: true,
            replace: false,
        }
    }
}

impl<M: Module> PeftModel<M> {
    /// Reads the adapter in `dir`, adds it to the model under `name` and makes it the active one.
    ///
    /// `dir` is the directory that holds the two files, as for PEFT, whatever `name` is: what
    /// [`save_adapter`](Self::save_adapter) returned. [`adapter_dir`](super::adapter_dir) tells where it lies.
    ///
    /// # Errors
    ///
    /// Those of [`AdapterFile::read`] and [`AdapterFile::attach`]. The model has not changed then.
    pub fn load_adapter(
        &mut self,
        name: &str,
        dir: &Path,
        options: &LoadOptions,
    ) -> Result<LoadReport> {
        let file = AdapterFile::read(dir, &options.read)?;
        file.attach(self, name, options)
            .map_err(|error| match error {
                PeftError::Incomplete { .. } => error.in_file(&dir.join(WEIGHTS_FILE)),
                error => error,
            })
    }
}

/// A module's factors that fit it, and where they go.
struct Fit<'a> {
    /// The module's path in the model.
    path: String,
    device: Device,
    adapted: Adapted,
    tensors: &'a LoraTensors,
}

impl AdapterFile {
    /// Adds this adapter to `model` under `name` and makes it the active one, or swaps it with the one of that name if
    /// `options` say so.
    ///
    /// The tensors decide which modules get factors. The configuration gives ranks, alphas and dropout; a linear module
    /// of the model that its `target_modules` chooses and that has no tensor is reported as missing.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for an unconverted PiSSA or OLoRA on a quantised weight, and those of
    /// [`LoraConfig::init_on`] for them; [`PeftError::Incomplete`] with the report unless all fits or `options` are not strict, and always if nothing
    /// does; [`PeftError::DType`] for a type the device does not have, or that is none of F32, BF16 and F16; [`PeftError::Config`] for a configuration out of
    /// range; those of [`PeftModel::insert_adapter`]. The model has not changed then.
    pub fn attach<M: Module>(
        &self,
        model: &mut PeftModel<M>,
        name: &str,
        options: &LoadOptions,
    ) -> Result<LoadReport> {
        let (fits, report) = self.fit(model, &options.names)?;
        if options.strict || report.loaded.is_empty() {
            report.clone().strict()?;
        }
        let mut lora = LoraConfig::new(self.config.r)
            .with_alpha(self.config.lora_alpha)
            .with_dropout(self.config.lora_dropout)
            .with_rslora(self.config.use_rslora)
            .with_dora(self.config.use_dora)
            .with_init(init(&self.config));
        let mut factors = Vec::with_capacity(fits.len());
        for fit in &fits {
            factors.push((fit.path.clone(), fit.factors(&lora, options.dtype)?));
        }
        #[cfg(feature = "faer")]
        if lora.init.folds() {
            factors = leave_out(model, factors, lora.init)?;
        }
        if let Some((_, first)) = factors.first() {
            lora.dtype = first.config().dtype;
        }
        let targets = match options.names.is_empty() {
            true => self.config.targets.clone(),
            false => {
                let adapted: Vec<_> = fits
                    .into_iter()
                    .map(|fit| Adapted {
                        path: fit.path,
                        ..fit.adapted
                    })
                    .collect();
                TargetConfig::listed(&adapted, lora.rank, lora.alpha)
            }
        };
        let config = PeftConfig::new(lora, targets);
        match options.replace && model.config(name).is_ok() {
            true => model.swap_adapter(name, &config, factors)?,
            false => model.insert_adapter(name, &config, factors)?,
        }
        Ok(report)
    }

    /// Which modules of the model get which factors, and what becomes of every tensor.
    fn fit<M: Module>(
        &self,
        model: &PeftModel<M>,
        names: &NameMap,
    ) -> Result<(Vec<Fit<'_>>, LoadReport)> {
        let matcher = self.config.validate()?;
        let mut report = LoadReport::default();
        // A module that the map cannot name has no name in the file.
        let linear = model.linear_modules().into_iter();
        let mut linear: HashMap<_, _> = linear
            .filter_map(|module| Some((names.to_file(&module.path).ok()?, module)))
            .collect();
        let mut fits = Vec::with_capacity(self.tensors.len());
        for tensors in &self.tensors {
            let path = &tensors.path;
            let Some(module) = linear.remove(path) else {
                let keys = tensors.iter().map(|(factor, _)| tensor_key(path, factor));
                report.unexpected.extend(keys);
                continue;
            };
            let rank = matcher.rank_for(path, self.config.r)?;
            let alpha = matcher.alpha_for(path, self.config.lora_alpha)?;
            let mut loaded = Vec::new();
            for (factor, data) in tensors.iter() {
                let tensor = tensor_key(path, factor);
                elements::to_file(&tensor, data.dtype())?;
                match check_shape(tensor, factor, data.shape(), rank, module.dims) {
                    Ok(tensor) => loaded.push(tensor),
                    Err(mismatch) => report.mismatched.push(mismatch),
                }
            }
            // Some factors without the others are not put anywhere.
            if loaded.len() == tensors.iter().count() {
                report.loaded.extend(loaded);
                fits.push(Fit {
                    path: module.path,
                    device: module.device,
                    adapted: Adapted {
                        path: path.clone(),
                        rank,
                        alpha,
                    },
                    tensors,
                });
            }
        }
        // "all-linear" may mean fewer modules in Python; PEFT never writes it.
        if self.config.targets.target_modules != TargetModules::AllLinear {
            for path in linear.into_keys() {
                if matcher.matches(&path)? {
                    let factors = Factor::of(self.config.use_dora).iter();
                    let keys = factors.map(|&factor| tensor_key(&path, factor));
                    report.missing.extend(keys);
                }
            }
        }
        report.missing.sort();
        Ok((fits, report))
    }
}

impl Fit<'_> {
    /// The factors on the module's device, in Burn's layout.
    fn factors(&self, config: &LoraConfig, dtype: Option<FloatDType>) -> Result<Lora> {
        let LoraTensors {
            a, b, magnitude, ..
        } = self.tensors;
        let dtype = dtype.unwrap_or_else(|| a.dtype().into());
        if !self.device.supports_dtype(dtype) {
            return Err(PeftError::DType {
                tensor: tensor_key(&self.adapted.path, Factor::A),
                expected: "a type the device has".into(),
                found: format!("{dtype:?}"),
            });
        }
        // They live as long as the model: keep them out of the pools of transient tensors.
        let options = (&self.device, dtype.into());
        let (a, b, magnitude) = self.device.memory_persistent_allocations((), |()| {
            let matrix = |data| {
                let data = elements::transposed(data).convert_dtype(dtype.into());
                Tensor::<2>::from_data(data, options)
            };
            let vector = |data: &TensorData| {
                let data = data.clone().convert_dtype(dtype.into());
                Tensor::<1>::from_data(data, options)
            };
            (matrix(a), matrix(b), magnitude.as_ref().map(vector))
        });
        let mut config = config.clone().with_alpha(self.adapted.alpha);
        config.rank = self.adapted.rank;
        let lora = config.with_factors(a, b)?;
        match magnitude {
            None => Ok(lora),
            Some(magnitude) => lora.with_magnitude(magnitude),
        }
    }
}

/// Leaves out of every adapter the part of its weight that PEFT took out of the base.
#[cfg(feature = "faer")]
fn leave_out<M: Module>(
    model: &PeftModel<M>,
    factors: Vec<(String, Lora)>,
    init: LoraInit,
) -> Result<Vec<(String, Lora)>> {
    let weights = model.dense_weights(|path| factors.iter().any(|(module, _)| module == path));
    let factors = factors.into_iter().map(|(path, lora)| {
        let weight = weights.get(&path).filter(|weight| {
            // A packed weight is an empty matrix here. It has lost what PEFT's part was taken of.
            weight.dims() == lora.dims() && !matches!(weight.dtype(), DType::QFloat(_))
        });
        let Some(weight) = weight else {
            return Err(PeftError::Config {
                name: format!("init_lora_weights of `{path}`"),
                value: format!("{init:?}"),
                expected: "a dense weight; a quantised one is not the one it was taken of".into(),
            });
        };
        Ok((path, lora.without_part(init, weight)?))
    });
    factors.collect()
}

fn init(config: &AdapterConfig) -> LoraInit {
    match &config.init_lora_weights {
        InitLoraWeights::Flag(false) => LoraInit::Random,
        InitLoraWeights::Named(name) if name.eq_ignore_ascii_case("gaussian") => LoraInit::Gaussian,
        other => other.part_of_weight().unwrap_or(LoraInit::Kaiming),
    }
}
