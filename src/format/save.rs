//! From a model to PEFT's directory.
//!
//! The file has PyTorch's layout: `A [r, d_in]` and `B [d_out, r]`, the transposes of Burn's `[d_in, r]` and
//! `[r, d_out]`.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::TensorData;

use super::adapter::{AdapterFile, LoraTensors, ParameterTensor, adapter_dir};
use super::config::{AdapterConfig, InitLoraWeights};
use super::elements::{reshaped, transposed};
use super::explicit::describe;
use super::names::NameMap;
use super::stored::host;
use super::write::WriteOptions;
use crate::adapter::{Change, Lora, LoraConfig, LoraInit};
use crate::model::{Parameter, PeftModel, TrainableTokens, by_path};
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
    /// A change of a convolution of several groups becomes PEFT's form of it, of so many times the rank. How many there are
    /// [`with_conv_groups`](PeftModel::with_conv_groups) says, or a pass by
    /// [`forward_peft`](crate::model::PeftForward::forward_peft) has shown; of a file saved without either, PEFT refuses the shapes.
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
    /// dropout or rsLoRA are not the adapter's, for targets or saved modules that cannot be told apart, and for what PEFT does
    /// not have: factors and rows of its own for one embedding, DoRA on a tied head or on a convolution of several groups;
    /// [`PeftError::DeviceRead`].
    pub fn from_model<M: Module>(
        model: &PeftModel<M>,
        name: &str,
        options: &SaveOptions,
    ) -> Result<Self> {
        let config = model.config(name)?;
        let defaults = &config.lora;
        let parameters = model.parameters();
        let changes = model.changes(name)?;
        let description = describe(&parameters, config, &changes, &options.names)?;
        let known = by_path(&parameters);
        let targets = description.targets;
        let mut file = Self::new(
            AdapterConfig::new(description.rank, description.alpha, targets),
            Vec::new(),
        );
        let mut tokens = BTreeMap::new();
        let mut experts: Vec<(String, &Parameter, Lora)> = Vec::new();
        for (path, change) in changes {
            let parameter = known[path.as_str()];
            let module = match parameter.module() {
                "" => String::new(),
                module => options.names.to_file(module)?,
            };
            match change {
                Change::Lora(lora) if parameter.is_experts() => {
                    check_like(&path, &lora, defaults)?;
                    experts.push((module, parameter, lora));
                }
                Change::Lora(lora) => {
                    check_like(&module, &lora, defaults)?;
                    file.tensors
                        .push(LoraTensors::of(&lora, module, parameter)?);
                }
                Change::Copy(copy) => {
                    let path = match module.as_str() {
                        "" => parameter.torch_name.clone(),
                        module => format!("{module}.{}", parameter.torch_name),
                    };
                    let values = copy.values.val();
                    let data = host(values.without_autodiff(), &path)?;
                    let data = parameter.in_file(data);
                    file.copies.push(ParameterTensor { path, data });
                }
                Change::Rows(rows) => {
                    tokens.insert(module.clone(), rows.indices().to_vec());
                    let data = host(rows.rows.val().without_autodiff(), &module)?;
                    file.rows.push(ParameterTensor { path: module, data });
                }
            }
        }
        file.config = file
            .config
            .with_lora_dropout(defaults.dropout)
            .with_use_rslora(defaults.rslora)
            .with_use_dora(defaults.dora);
        if config.ensure_weight_tying {
            file.tie_head(&options.names.to_file(model.head())?)?;
        }
        // The first of a module's tensors is innermost of PEFT's wrappers.
        let mut later: HashMap<String, usize> = HashMap::new();
        let mut of_experts = Vec::with_capacity(experts.len());
        for (module, parameter, lora) in experts.into_iter().rev() {
            let depth = later.entry(module.clone()).or_default();
            let wrapped = format!("{module}{}", ".base_layer".repeat(*depth));
            *depth += 1;
            of_experts.push(LoraTensors::of(&lora, wrapped, parameter)?);
        }
        file.tensors.extend(of_experts.into_iter().rev());
        file.config.target_parameters = description.target_parameters;
        file.config.lora_bias = defaults.bias;
        file.config.bias = config.bias;
        file.config.modules_to_save = description.modules_to_save;
        let indices: Vec<_> = tokens.values().cloned().collect();
        file.config.trainable_token_indices = match (&config.trainable_tokens, &indices[..]) {
            (_, []) => None,
            // PEFT knows the input embedding by itself.
            (Some(TrainableTokens::Input(_)), [only]) => Some(TrainableTokens::Input(only.clone())),
            _ => Some(TrainableTokens::Named(tokens)),
        };
        file.config.init_lora_weights = match defaults.init {
            // Of a convolution PEFT knows no such initialisation, and would not load it.
            LoraInit::Orthogonal if file.tensors.iter().all(|tensors| tensors.a.rank() == 2) => {
                InitLoraWeights::Named("orthogonal".into())
            }
            LoraInit::Gaussian => InitLoraWeights::Named("gaussian".into()),
            LoraInit::Random => InitLoraWeights::Flag(false),
            // The converted form of those that begin with a part of the weight is a plain one.
            _ => InitLoraWeights::Flag(true),
        };
        file.config.task_type = options.task_type.clone();
        file.config.base_model_name_or_path = options.base_model_name_or_path.clone();
        Ok(file)
    }
}

/// Rank and alpha may be a module's own, all else is the adapter's.
fn check_like(path: &str, lora: &Lora, defaults: &LoraConfig) -> Result<()> {
    let config = lora.config();
    if config.rslora == defaults.rslora && config.dropout == defaults.dropout {
        return Ok(());
    }
    Err(PeftError::config(
        format!("rslora, dropout of `{path}`"),
        format!("{}, {}", config.rslora, config.dropout),
        format!(
            "the adapter's own: {}, {}",
            defaults.rslora, defaults.dropout
        ),
    ))
}

impl Parameter {
    /// Row-major values of the whole parameter as a file has them.
    fn in_file(&self, values: TensorData) -> TensorData {
        let values = reshaped(values, &self.shape);
        match self.is_transposed() {
            true => transposed(&values),
            false => values,
        }
    }
}
