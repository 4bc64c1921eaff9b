//! From PEFT's directory to a model.

use std::collections::HashMap;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, FloatDType, Tensor, TensorData};

use super::adapter::AdapterFile;
use super::config::{AdapterConfig, InitLoraWeights};
use super::elements;
use super::explicit::{self, Adapted};
use super::keys::{Factor, NameMap, tensor_key};
use super::read::ReadOptions;
use super::report::{LoadReport, Mismatch};
use crate::adapter::{Lora, LoraConfig, LoraInit};
use crate::model::{PeftConfig, PeftModel, TargetModules};
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
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            read: ReadOptions::default(),
            names: NameMap::default(),
            dtype: Some(FloatDType::F32),
            strict: true,
        }
    }
}

impl<M: Module> PeftModel<M> {
    /// Reads the adapter in `dir`, adds it to the model under `name` and makes it the active one.
    ///
    /// `dir` is the directory that holds the two files, as for PEFT: see [`adapter_dir`](super::adapter_dir).
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
        AdapterFile::read(dir, &options.read)?.attach(self, name, options)
    }
}

/// A module's factors that fit it, and where they go.
struct Fit<'a> {
    /// The module's path in the model.
    path: String,
    device: Device,
    adapted: Adapted,
    a: &'a TensorData,
    b: &'a TensorData,
}

impl AdapterFile {
    /// Adds this adapter to `model` under `name` and makes it the active one.
    ///
    /// The tensors decide which modules get factors. The configuration gives ranks, alphas and dropout; a linear module
    /// of the model that its `target_modules` chooses and that has no tensor is reported as missing.
    ///
    /// # Errors
    ///
    /// [`PeftError::Incomplete`] with the report unless all fits or `options` are not strict, and always if nothing
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
            .with_init(init(&self.config));
        let mut factors = Vec::with_capacity(fits.len());
        for fit in &fits {
            factors.push((fit.path.clone(), fit.factors(&lora, options.dtype)?));
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
                explicit::targets(&adapted, lora.rank, lora.alpha)
            }
        };
        model.insert_adapter(name, &PeftConfig::new(lora, targets), factors)?;
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
            let keys = [Factor::A, Factor::B].map(|factor| tensor_key(path, factor));
            let Some(module) = linear.remove(path) else {
                report.unexpected.extend(keys);
                continue;
            };
            let rank = matcher.rank_for(path, self.config.r)?;
            let alpha = matcher.alpha_for(path, self.config.lora_alpha)?;
            let [d_in, d_out] = module.dims;
            let mut fitting = 0;
            for ((tensor, data), expected) in keys
                .into_iter()
                .zip([&tensors.a, &tensors.b])
                .zip([[rank, d_in], [d_out, rank]])
            {
                elements::to_file(&tensor, data.dtype())?;
                if **data.shape() == expected {
                    fitting += 1;
                    report.loaded.push(tensor);
                } else {
                    let (expected, found) = (expected.to_vec(), data.shape().to_vec());
                    report.mismatched.push(Mismatch {
                        tensor,
                        expected,
                        found,
                    });
                }
            }
            if fitting == 2 {
                fits.push(Fit {
                    path: module.path,
                    device: module.device,
                    adapted: Adapted {
                        path: path.clone(),
                        rank,
                        alpha,
                    },
                    a: &tensors.a,
                    b: &tensors.b,
                });
            } else if fitting == 1 {
                // One factor without the other is not put anywhere.
                report.loaded.pop();
            }
        }
        // "all-linear" may mean fewer modules in Python; PEFT never writes it.
        if self.config.targets.target_modules != TargetModules::AllLinear {
            for path in linear.into_keys() {
                if matcher.matches(&path)? {
                    report
                        .missing
                        .extend([Factor::A, Factor::B].map(|factor| tensor_key(&path, factor)));
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
        let dtype = dtype.unwrap_or_else(|| self.a.dtype().into());
        if !self.device.supports_dtype(dtype) {
            return Err(PeftError::DType {
                tensor: tensor_key(&self.adapted.path, Factor::A),
                expected: "a type the device has".into(),
                found: format!("{dtype:?}"),
            });
        }
        // They live as long as the model: keep them out of the pools of transient tensors.
        let [a, b] = self.device.memory_persistent_allocations((), |()| {
            [self.a, self.b].map(|data| {
                let data = data.clone().convert_dtype(dtype.into());
                Tensor::<2>::from_data(data, (&self.device, dtype.into())).transpose()
            })
        });
        let mut config = config.clone().with_alpha(self.adapted.alpha);
        config.rank = self.adapted.rank;
        config.with_factors(a, b)
    }
}

fn init(config: &AdapterConfig) -> LoraInit {
    match &config.init_lora_weights {
        InitLoraWeights::Named(name) if name.eq_ignore_ascii_case("gaussian") => LoraInit::Gaussian,
        _ => LoraInit::Kaiming,
    }
}
