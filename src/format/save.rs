//! From a model to PEFT's directory.
//!
//! The file has PyTorch's layout: `A [r, d_in]` and `B [d_out, r]`, the transposes of Burn's `[d_in, r]` and
//! `[r, d_out]`.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};

use super::adapter::{AdapterFile, LoraTensors, adapter_dir};
use super::config::{AdapterConfig, InitLoraWeights};
use super::explicit;
use super::names::NameMap;
use super::write::WriteOptions;
use crate::adapter::{LoraInit, converted_alpha};
use crate::model::{Adapted, PeftConfig, PeftModel};
use crate::{PeftError, Result};

/// How an adapter of a model is saved. The default overwrites nothing and keeps the model's own paths.
#[derive(Clone, Debug, Default)]
pub struct SaveOptions {
    /// Whether the two files may replace older ones.
    pub overwrite: bool,
    /// Whether the files carry a digest: see [`WriteOptions::digest`].
    pub digest: bool,
    /// How the file calls the model's modules.
    pub names: NameMap,
    /// What the model is for, one of PEFT's task types such as `"CAUSAL_LM"`.
    pub task_type: Option<String>,
    /// Name or path of the base model, which Python's tools look for.
    pub base_model_name_or_path: Option<String>,
}

impl<M: Module> PeftModel<M> {
    /// Saves the adapter `name` under `dir` as PEFT does, in the directory itself if it is the default adapter and in
    /// its folder otherwise, and returns where. Holds the factors twice on the host meanwhile.
    ///
    /// ```no_run
    /// # fn save<M: burn::module::Module>(model: &burn_peft::model::PeftModel<M>) -> burn_peft::Result<()> {
    /// use burn_peft::format::SaveOptions;
    ///
    /// let options = SaveOptions { task_type: Some("CAUSAL_LM".into()), ..Default::default() };
    /// model.save_adapter("default", "out/adapter".as_ref(), &options)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`AdapterFile::from_model`], [`adapter_dir`] and [`AdapterFile::write`]. Nothing is left on disk then.
    pub fn save_adapter(&self, name: &str, dir: &Path, options: &SaveOptions) -> Result<PathBuf> {
        let dir = adapter_dir(dir, name)?;
        let file = AdapterFile::from_model(self, name, options)?;
        file.write(
            &dir,
            &WriteOptions {
                overwrite: options.overwrite,
                digest: options.digest,
            },
        )?;
        Ok(dir)
    }
}

impl AdapterFile {
    /// The adapter `name` of `model` as a file would hold it, in the element types of its factors.
    ///
    /// Its targets are the adapter's own where they are a list of names that says in the file's naming what is true of
    /// the model. What an expression or `"all-linear"` chose, or a [`NameMap`] renames, is listed module by module: in
    /// Python an expression would also meet modules that are not linear, and PEFT would stop there.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`]; [`PeftError::Config`] for a module that the map cannot name, for modules whose
    /// dropout or rsLoRA are not the adapter's, and for targets that cannot be told apart; [`PeftError::DeviceRead`].
    pub fn from_model<M: Module>(
        model: &PeftModel<M>,
        name: &str,
        options: &SaveOptions,
    ) -> Result<Self> {
        let PeftConfig {
            lora: defaults,
            targets,
        } = model.config(name)?;
        let mut adapted = Vec::new();
        let mut tensors = Vec::new();
        for (path, lora) in model.factors(name)? {
            // As PEFT converts what begins with a part of the weight: the file is to be right on the untouched base.
            let lora = lora.converted();
            let config = lora.config();
            if config.rslora != defaults.rslora || config.dropout != defaults.dropout {
                return Err(PeftError::Config {
                    name: format!("rslora, dropout of `{path}`"),
                    value: format!("{}, {}", config.rslora, config.dropout),
                    expected: format!(
                        "the adapter's own: {}, {}",
                        defaults.rslora, defaults.dropout
                    ),
                });
            }
            let path = options.names.to_file(&path)?;
            adapted.push(Adapted {
                path: path.clone(),
                rank: config.rank,
                alpha: config.alpha,
            });
            let magnitude = lora.magnitude.as_ref().map(|m| m.val().without_autodiff());
            tensors.push(LoraTensors {
                a: host(lora.a.val().without_autodiff().transpose(), &path)?,
                b: host(lora.b.val().without_autodiff().transpose(), &path)?,
                magnitude: magnitude.map(|m| host(m, &path)).transpose()?,
                path,
            });
        }
        // Modules that the map cannot name are not in the file's naming, so no pattern of the file can mean them.
        let linear = model.linear_modules();
        let linear: Vec<_> = linear
            .iter()
            .filter_map(|module| options.names.to_file(&module.path).ok())
            .collect();
        let (mut rank, mut alpha, mut targets) = (defaults.rank, defaults.alpha, targets.clone());
        if defaults.init.folds() {
            let doubled = |alpha| converted_alpha(alpha, defaults.rslora);
            (rank, alpha) = (2 * rank, doubled(alpha));
            let ranks = targets.rank_pattern.iter();
            targets.rank_pattern = ranks
                .map(|(key, &rank)| (key.to_owned(), 2 * rank))
                .collect();
            let alphas = targets.alpha_pattern.iter();
            targets.alpha_pattern = alphas
                .map(|(key, &alpha)| (key.to_owned(), doubled(alpha)))
                .collect();
        }
        let preferred = options.names.is_empty().then_some(&targets);
        let targets = explicit::describe(preferred, &adapted, &linear, rank, alpha)?;
        let mut config = AdapterConfig::new(rank, alpha, targets)
            .with_lora_dropout(defaults.dropout)
            .with_use_rslora(defaults.rslora)
            .with_use_dora(defaults.dora);
        config.init_lora_weights = match defaults.init {
            LoraInit::Orthogonal => InitLoraWeights::Named("orthogonal".into()),
            LoraInit::Gaussian => InitLoraWeights::Named("gaussian".into()),
            LoraInit::Random => InitLoraWeights::Flag(false),
            // The converted form of those that begin with a part of the weight is a plain one.
            _ => InitLoraWeights::Flag(true),
        };
        config.task_type = options.task_type.clone();
        config.base_model_name_or_path = options.base_model_name_or_path.clone();
        Ok(Self { config, tensors })
    }
}

/// A factor, on the host.
fn host<const D: usize>(factor: Tensor<D>, path: &str) -> Result<TensorData> {
    factor
        .try_into_data()
        .map_err(|error| PeftError::DeviceRead {
            tensor: path.to_owned(),
            reason: error.to_string(),
        })
}
