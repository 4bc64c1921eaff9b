//! From PEFT's directory to a model.

#[cfg(feature = "faer")]
use std::collections::HashSet;
use std::path::Path;

use burn::module::Module;
#[cfg(feature = "faer")]
use burn::tensor::DType;
use burn::tensor::FloatDType;

use super::adapter::AdapterFile;
use super::config::{AdapterConfig, CONFIG_FILE, InitLoraWeights};
use super::explicit::describe;
use super::fit::{Fit, Fitted, Values};
use super::names::NameMap;
use super::places::folder_of;
use super::read::{ReadOptions, WEIGHTS_FILE};
use super::report::LoadReport;
#[cfg(feature = "faer")]
use crate::adapter::Change;
use crate::adapter::{LoraConfig, LoraInit};
use crate::model::{
    Adapted, BiasMode, Joining, Origin, PeftConfig, PeftModel, TargetConfig, TrainableTokens,
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
    /// Whether tensors that are missing, unexpected or mismatched are an error, or only reported, with what fits loaded. It covers the
    /// reading of the files too: what [`ReadOptions::strict`] says there. An adapter of which nothing fits is always an error.
    pub strict: bool,
    /// Which base values of the file are taken.
    pub base_values: BaseValues,
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
            base_values: BaseValues::default(),
            replace: false,
            trainable: false,
            activate: None,
        }
    }
}

/// Which base values are taken that a file has beside an adapter. PEFT loads them into the frozen base of the model, of which other
/// adapters then have them too. Here they become a frozen base that belongs to the adapter, and only where they differ from the model's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BaseValues {
    /// Those that PEFT stores: of embeddings, of the output head, and of modules that the adapter changes. Others are unexpected.
    #[default]
    Stored,
    /// Any that the model has a parameter for, as PEFT takes them.
    All,
    /// None: they are passed over.
    Ignored,
}

impl LoadOptions {
    /// Strict, with f32 factors, and the file's paths for the model's.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets what the files may hold.
    pub fn with_read(mut self, read: ReadOptions) -> Self {
        self.read = read;
        self
    }

    /// Sets how the file calls the model's modules.
    pub fn with_names(mut self, names: NameMap) -> Self {
        self.names = names;
        self
    }

    /// Sets the element type of the factors; `None` keeps the file's.
    pub fn with_dtype(mut self, dtype: Option<FloatDType>) -> Self {
        self.dtype = dtype;
        self
    }

    /// Loads what fits and reports the rest, or refuses an adapter that does not fit whole.
    pub fn with_strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Sets which base values of the file are taken.
    pub fn with_base_values(mut self, base_values: BaseValues) -> Self {
        self.base_values = base_values;
        self
    }

    /// Swaps an adapter of the same name, or refuses the name.
    pub fn with_replace(mut self, replace: bool) -> Self {
        self.replace = replace;
        self
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
    /// `dir` is the directory that was given to [`save_adapter`](Self::save_adapter), or the one that holds the two files, as for PEFT: if
    /// `dir` has a folder `name` with an adapter in it, that is read, otherwise `dir` itself.
    /// [`adapter_dir`](super::adapter_dir) tells where an adapter is saved. An adapter of PEFT on a convolution of several groups fits once
    /// [`with_conv_groups`](Self::with_conv_groups) has said how many.
    ///
    /// # Errors
    ///
    /// Those of [`AdapterFile::read`] and [`AdapterFile::attach`]. The model has not changed then.
    pub fn load_adapter(
        &mut self,
        name: &str,
        dir: impl AsRef<Path>,
        options: &LoadOptions,
    ) -> Result<LoadReport> {
        let dir = dir.as_ref();
        let folder = folder_of(dir, name);
        let mut read = options.read.clone();
        read.strict &= options.strict;
        let file = AdapterFile::read(&folder, &read)?;
        let report = file
            .attach(self, name, options)
            .map_err(|error| match error {
                PeftError::Incomplete { .. } => error.in_file(&folder.join(WEIGHTS_FILE)),
                error => error,
            });
        let mut report = report?;
        if folder != dir && dir.join(CONFIG_FILE).is_file() {
            report.notes.push(format!(
                "read from the folder `{name}`; the directory itself has another adapter"
            ));
        }
        Ok(report)
    }
}

impl AdapterFile {
    /// Adds this adapter to `model` under `name`, or swaps it with the one of that name, if `options` say so. Whether it trains
    /// and is active is for `options` to say too; a swapped one stays as the old one was, but is active or trainable where `options`
    /// ask for it.
    ///
    /// A module gets factors if it has tensors and the configuration chooses it, as in PEFT, which passes over the tensors of other modules;
    /// here they are unexpected. The configuration gives ranks, alphas and dropout; what it chooses in the
    /// model, a module or a whole parameter, and that has no tensor is reported as missing. On a model whose output head shares the
    /// weight of an embedding, the adapter changes what it changes in PEFT: see [`PeftModel::with_tied_head`].
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
        let Fitted {
            fits,
            mut report,
            ensure_weight_tying,
            base_values,
        } = self.fit(model, options)?;
        if options.strict || report.loaded.is_empty() {
            // What reading passed over is no fault here.
            let mut unfit = report.clone();
            unfit.forget(&self.skipped);
            unfit.strict()?;
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
        config.ensure_weight_tying = ensure_weight_tying;
        config.origin = self.config.origin(base_values);
        let as_is = fits
            .iter()
            .filter(|fit| matches!(fit.values, Values::Copy { as_is: true, .. }));
        config.origin.as_is = as_is.map(|fit| fit.parameter.path.clone()).collect();
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
            describe(
                &model.parameters_with_head()?,
                &config,
                &changes,
                &options.names,
            )?;
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
        report.notes.extend(model.tied_notes(name));
        Ok(report)
    }
}

impl AdapterConfig {
    /// What is kept of the file to be written back, with the parameters whose base values it has.
    fn origin(&self, base_values: Vec<String>) -> Origin {
        let mut keys = self.inert.clone();
        keys.extend(self.unknown.clone());
        Origin {
            task_type: self.task_type.clone(),
            base_model_name_or_path: self.base_model_name_or_path.clone(),
            revision: self.revision.clone(),
            keys,
            base_values,
            fan_in_fan_out: self.fan_in_fan_out,
            as_is: Vec::new(),
        }
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
        .filter(|fit| matches!(fit.values, Values::Copy { frozen: false, .. }));
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
