//! From PEFT's directory to a model.

#[cfg(feature = "faer")]
use std::collections::HashSet;
use std::path::Path;

use burn::module::Module;
#[cfg(feature = "faer")]
use burn::tensor::DType;
use burn::tensor::FloatDType;

use super::adapter::AdapterFile;
use super::config::{AdapterConfig, InitLoraWeights};
use super::explicit::describe;
use super::fit::{Fit, Values};
use super::names::NameMap;
use super::read::{ReadOptions, WEIGHTS_FILE};
use super::report::LoadReport;
#[cfg(feature = "faer")]
use crate::adapter::Change;
use crate::adapter::{LoraConfig, LoraInit};
use crate::model::{
    Adapted, BiasMode, Joining, PeftConfig, PeftModel, TargetConfig, TrainableTokens,
};
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
    /// Whether the adapter trains while it is active. The default is false, PEFT's `is_trainable=False`: it is loaded to be used, and
    /// [`set_trainable`](PeftModel::set_trainable) or [`set_adapter`](PeftModel::set_adapter) let it train later.
    pub trainable: bool,
    /// Whether it becomes the active adapter. The default, `None`, is PEFT's rule: if and only if the model has no other.
    pub activate: Option<bool>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            read: ReadOptions::default(),
            names: NameMap::default(),
            dtype: Some(FloatDType::F32),
            strict: true,
            replace: false,
            trainable: false,
            activate: None,
        }
    }
}

impl LoadOptions {
    /// The default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Loads the adapter to be trained on, or frozen.
    pub fn with_trainable(mut self, trainable: bool) -> Self {
        self.trainable = trainable;
        self
    }

    /// Makes the adapter the active one or not; `None` if and only if the model has no other.
    pub fn with_activate(mut self, activate: Option<bool>) -> Self {
        self.activate = activate;
        self
    }
}

impl<M: Module> PeftModel<M> {
    /// Reads the adapter in `dir` and adds it to the model under `name`, frozen. It becomes the active one if the model had none; a
    /// later one stays inactive until [`set_adapter`](Self::set_adapter) chooses it. [`LoadOptions`] has both to choose.
    ///
    /// `dir` is the directory that holds the two files, as for PEFT, whatever `name` is: what
    /// [`save_adapter`](Self::save_adapter) returned. An adapter of PEFT on a convolution of several groups fits once
    /// [`with_conv_groups`](Self::with_conv_groups) has said how many. [`adapter_dir`](super::adapter_dir) tells where it lies.
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

impl AdapterFile {
    /// Adds this adapter to `model` under `name`, or swaps it with the one of that name, if `options` say so. Whether it trains
    /// and is active is for `options` to say too; a swapped one stays as the old one was, but is active or trainable where `options`
    /// ask for it.
    ///
    /// The tensors decide which modules get factors. The configuration gives ranks, alphas and dropout; what it chooses in the
    /// model, a module or a whole parameter, and that has no tensor is reported as missing.
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
        let (fits, mut report) = self.fit(model, &options.names)?;
        if options.strict || report.loaded.is_empty() {
            report.clone().strict()?;
        }
        let mut lora = LoraConfig::new(self.config.r)
            .with_alpha(self.config.lora_alpha)
            .with_dropout(self.config.lora_dropout)
            .with_rslora(self.config.use_rslora)
            .with_dora(self.config.use_dora)
            .with_bias(self.config.lora_bias)
            .with_init(init(&self.config));
        let mut changes = Vec::with_capacity(fits.len());
        for fit in &fits {
            changes.push((
                fit.parameter.path.clone(),
                fit.change(&lora, options.dtype)?,
            ));
        }
        #[cfg(feature = "faer")]
        if lora.init.folds() {
            changes = leave_out(model, changes, lora.init)?;
        }
        if let Some(first) = changes.iter().find_map(|(_, change)| change.lora()) {
            lora.dtype = first.config().dtype;
        }
        let targets = match options.names.is_empty() {
            true => self.config.targets.clone(),
            false => {
                let adapted = fits.iter().filter_map(|fit| match &fit.values {
                    Values::Lora { rank, alpha, .. } if fit.parameter.is_target() => {
                        Some(Adapted {
                            path: fit.parameter.module().to_owned(),
                            rank: *rank,
                            alpha: *alpha,
                        })
                    }
                    _ => None,
                });
                let adapted: Vec<_> = adapted.collect();
                TargetConfig::listed(&adapted, lora.rank, lora.alpha)
            }
        };
        let mut config = PeftConfig::new(lora, targets).with_bias(self.config.bias);
        config.modules_to_save = saved_modules(&fits, self.config.bias);
        config.ensure_weight_tying = self.config.ensure_weight_tying;
        let experts = fits
            .iter()
            .filter(|fit| fit.parameter.is_experts() && matches!(fit.values, Values::Lora { .. }));
        config.target_parameters = experts.map(|fit| fit.parameter.path.clone()).collect();
        config.trainable_tokens = self.config.trainable_token_indices.clone();
        if let (Some(TrainableTokens::Named(_)), false) =
            (&config.trainable_tokens, options.names.is_empty())
        {
            let named = fits.iter().filter_map(|fit| match &fit.values {
                Values::Rows { indices, .. } => {
                    Some((fit.parameter.module().to_owned(), indices.clone()))
                }
                _ => None,
            });
            config.trainable_tokens = Some(TrainableTokens::Named(named.collect()));
        }
        let renamed = !options.names.is_empty();
        // Without strictness what fits is loaded, even where no file can describe it: then saving refuses it.
        if renamed && options.strict {
            describe(&model.parameters(), &config, &changes, &options.names)?;
        }
        if options.replace && model.config(name).is_ok() {
            model.swap(name, &config, changes, renamed || !options.strict)?;
            if options.trainable {
                model.set_trainable(name, true)?;
            }
            if options.activate == Some(true) {
                model.activate(&[(name, 1.0)])?;
            }
        } else {
            let joining = Joining {
                trainable: options.trainable,
                activate: options.activate,
                described: renamed || !options.strict,
                ..Joining::default()
            };
            model.join(name, &config, changes, joining)?;
        }
        report.active = Some(model.active().uses(name));
        report.trainable = Some(model.is_trainable(name)?);
        Ok(report)
    }
}

/// Leaves out of every adapter the part of its weight that PEFT took out of the base.
#[cfg(feature = "faer")]
fn leave_out<M: Module>(
    model: &PeftModel<M>,
    changes: Vec<(String, Change)>,
    init: LoraInit,
) -> Result<Vec<(String, Change)>> {
    let module = |path: &str| path.strip_suffix(".weight").unwrap_or(path).to_owned();
    let modules: HashSet<String> = changes.iter().map(|(path, _)| module(path)).collect();
    let weights = model.dense_weights(|of| modules.contains(of));
    let changes = changes.into_iter().map(|(path, change)| {
        let Change::Lora(lora) = change else {
            return Ok((path, change));
        };
        let weight = weights.get(&module(&path)).filter(|weight| {
            // A weight packed in NF4 is not among them. It has lost what PEFT's part was taken of.
            weight.dims() == lora.dims() && !matches!(weight.dtype(), DType::QFloat(_))
        });
        let Some(weight) = weight else {
            return Err(PeftError::config(
                format!("init_lora_weights of `{}`", module(&path)),
                format!("{init:?}"),
                "a dense weight; a quantised one is not the one it was taken of",
            ));
        };
        Ok((path, lora.without_part(init, weight)?.into()))
    });
    changes.collect()
}

/// The modules of whose parameters there are copies that `bias` does not explain.
fn saved_modules(fits: &[Fit], bias: BiasMode) -> Vec<String> {
    let copies = fits
        .iter()
        .filter(|fit| matches!(fit.values, Values::Copy(_)));
    let copies = copies.map(|fit| &fit.parameter);
    let by_name =
        copies.filter(|parameter| bias == BiasMode::None || parameter.torch_name != "bias");
    let mut modules: Vec<_> = by_name
        .map(|parameter| parameter.module().to_owned())
        .collect();
    modules.dedup();
    modules
}

fn init(config: &AdapterConfig) -> LoraInit {
    match &config.init_lora_weights {
        InitLoraWeights::Flag(false) => LoraInit::Random,
        InitLoraWeights::Named(name) if name.eq_ignore_ascii_case("gaussian") => LoraInit::Gaussian,
        other => other.part_of_weight().unwrap_or(LoraInit::Kaiming),
    }
}
