//! From a model to PEFT's directory.
//!
//! The file has PyTorch's layout: `A [r, d_in]` and `B [d_out, r]`, the transposes of Burn's `[d_in, r]` and
//! `[r, d_out]`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::TensorData;

use super::adapter::{AdapterFile, LoraTensors, ParameterTensor, adapter_dir};
use super::config::{AdapterConfig, InitLoraWeights, is_task_type};
use super::elements::{reshaped, transposed};
use super::explicit::describe;
use super::fields;
use super::names::NameMap;
use super::stored::host;
use super::write::WriteOptions;
use crate::adapter::{Change, Lora, LoraConfig, LoraInit};
use crate::layer::LayerKind;
use crate::model::{Origin, Parameter, PeftConfig, PeftModel, TrainableTokens, by_path, is_named};
use crate::{PeftError, Result};

/// How an adapter of a model is saved. The default replaces an older adapter, keeps the model's own paths, and writes what the adapter's
/// file said when it was loaded.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    /// Whether the two files may replace whatever has their names. See [`WriteOptions::overwrite`] for what is replaced otherwise.
    pub overwrite: bool,
    /// Whether nothing is replaced, not even an older adapter: see [`WriteOptions::keep_existing`].
    pub keep_existing: bool,
    /// Whether the files carry a digest: see [`WriteOptions::digest`].
    pub digest: bool,
    /// How the file calls the model's modules.
    pub names: NameMap,
    /// What the model is for, one of PEFT's task types such as `"CAUSAL_LM"`. Without it, what the adapter was loaded with.
    pub task_type: Option<String>,
    /// Name or path of the base model, which Python's tools look for. Without it, what the adapter was loaded with.
    pub base_model_name_or_path: Option<String>,
    /// Revision of the base model. Without it, what the adapter was loaded with.
    pub revision: Option<String>,
    /// Whether what the file said that an adapter was loaded from is written again: the three above, keys without meaning here, and
    /// unknown ones that were let pass. Default: true.
    pub keep_origin: bool,
    /// Modules whose base values are stored beside the adapter, as PEFT's `save_embedding_layers` does with embeddings: paths or their last
    /// segments, in the model's naming. Those that the adapter's file had are stored in any case. For an embedding whose vocabulary was
    /// resized. Default: none.
    pub base_values: Vec<String>,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self {
            overwrite: false,
            keep_existing: false,
            digest: false,
            names: NameMap::default(),
            task_type: None,
            base_model_name_or_path: None,
            revision: None,
            keep_origin: true,
            base_values: Vec::new(),
        }
    }
}

impl SaveOptions {
    /// The default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces whatever has the names of the two files.
    pub fn with_overwrite(mut self, overwrite: bool) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Replaces nothing, not even an older adapter.
    pub fn with_keep_existing(mut self, keep: bool) -> Self {
        self.keep_existing = keep;
        self
    }

    /// Writes a digest of the two files.
    pub fn with_digest(mut self, digest: bool) -> Self {
        self.digest = digest;
        self
    }

    /// Sets how the file calls the model's modules.
    pub fn with_names(mut self, names: NameMap) -> Self {
        self.names = names;
        self
    }

    /// Sets what the model is for.
    pub fn with_task_type(mut self, task_type: impl Into<String>) -> Self {
        self.task_type = Some(task_type.into());
        self
    }

    /// Sets the name or path of the base model.
    pub fn with_base_model(mut self, name_or_path: impl Into<String>) -> Self {
        self.base_model_name_or_path = Some(name_or_path.into());
        self
    }

    /// Sets the revision of the base model.
    pub fn with_revision(mut self, revision: impl Into<String>) -> Self {
        self.revision = Some(revision.into());
        self
    }

    /// Writes again what the adapter's file said, or drops it.
    pub fn with_keep_origin(mut self, keep: bool) -> Self {
        self.keep_origin = keep;
        self
    }

    /// Stores the base values of these modules beside the adapter.
    pub fn with_base_values<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.base_values.extend(names.into_iter().map(Into::into));
        self
    }
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
    /// let options = SaveOptions::new().with_task_type("CAUSAL_LM");
    /// model.save_adapter("default", "out/adapter", &options)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`AdapterFile::from_model`], [`adapter_dir`] and [`AdapterFile::write`]. Nothing is left on disk then.
    pub fn save_adapter(
        &self,
        name: &str,
        dir: impl AsRef<Path>,
        options: &SaveOptions,
    ) -> Result<PathBuf> {
        let dir = adapter_dir(dir.as_ref(), name)?;
        let file = AdapterFile::from_model(self, name, options)?;
        file.write(
            &dir,
            &WriteOptions {
                overwrite: options.overwrite,
                keep_existing: options.keep_existing,
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
        let parameters = model.parameters_with_head()?;
        let changes = model.changes(name)?;
        let description = describe(&parameters, config, &changes, &options.names)?;
        let known = by_path(&parameters);
        let targets = description.targets;
        let mut file = Self::new(
            AdapterConfig::new(description.rank, description.alpha, targets),
            Vec::new(),
        );
        let mut tokens = BTreeMap::new();
        // The parameters whose base values are those of a frozen copy, and the embeddings that have a trained one.
        let (mut based, mut embeddings) = (HashSet::new(), Vec::new());
        let is_conv1d = |(path, _): &(String, Change)| known[path.as_str()].conv1d == Some(true);
        let of_conv1d = changes.iter().any(is_conv1d);
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
                    let own = parameter.path_in(&module);
                    let data = host(copy.values.val().without_autodiff(), &own)?;
                    let data = parameter.in_file(data, &config.origin.as_is);
                    let values = ParameterTensor { path: own, data };
                    if copy.is_frozen() {
                        based.insert(parameter.path.clone());
                        file.base_values.push(values);
                        continue;
                    }
                    if parameter.layer == Some(LayerKind::Embedding) {
                        embeddings.push(values.path.clone());
                    }
                    file.copies.push(values);
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
            file.tie_head(&options.names.to_file(model.head())?, &embeddings)?;
        }
        let more = file.base_of(model, config, options, &parameters, &based)?;
        file.base_values.extend(more);
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
        file.config.fan_in_fan_out = config.origin.fan_in_fan_out || of_conv1d;
        file.describe_origin(&config.origin, options);
        Ok(file)
    }

    /// The base values that are stored beside the adapter, in the file's naming: of the parameters that its file had them of, and of the
    /// modules that `options` name, without those that are `given`.
    fn base_of<M: Module>(
        &self,
        model: &PeftModel<M>,
        config: &PeftConfig,
        options: &SaveOptions,
        parameters: &[Parameter],
        given: &HashSet<String>,
    ) -> Result<Vec<ParameterTensor>> {
        for name in &options.base_values {
            let mut known = parameters.iter().filter(|parameter| !parameter.tied_head);
            if !known.any(|parameter| is_named(parameter.module(), name)) {
                return Err(PeftError::config(
                    "base_values",
                    format!("`{name}`"),
                    "the paths of modules of the model, or their last segments",
                ));
            }
        }
        let is_stored = |parameter: &&Parameter| {
            let mut named = options.base_values.iter();
            let origin = options.keep_origin && config.origin.base_values.contains(&parameter.path);
            !parameter.tied_head
                && !given.contains(&parameter.path)
                && (origin || named.any(|name| is_named(parameter.module(), name)))
        };
        let stored: Vec<&Parameter> = parameters.iter().filter(is_stored).collect();
        let paths = stored
            .iter()
            .map(|parameter| parameter.path.clone())
            .collect();
        let values = model.dense_base(&paths);
        let mut found = Vec::with_capacity(stored.len());
        for parameter in stored {
            let path = parameter.path_in(&options.names.to_file(parameter.module())?);
            let Some(values) = values.get(&parameter.path) else {
                return Err(PeftError::config(
                    format!("base value of `{}`", parameter.path),
                    "packed, or not initialised",
                    "a dense one, to store it beside the adapter",
                ));
            };
            let data = host(values.clone(), &path)?;
            let data = parameter.in_file(data, &config.origin.as_is);
            found.push(ParameterTensor { path, data });
        }
        Ok(found)
    }

    /// Says what the adapter's own file said, and what `options` say instead.
    fn describe_origin(&mut self, origin: &Origin, options: &SaveOptions) {
        let config = &mut self.config;
        let kept = |own: &Option<String>| own.clone().filter(|_| options.keep_origin);
        let or = |said: &Option<String>, own: &Option<String>| said.clone().or_else(|| kept(own));
        let task = origin.task_type.clone().filter(|task| is_task_type(task));
        config.task_type = or(&options.task_type, &task);
        config.base_model_name_or_path = or(
            &options.base_model_name_or_path,
            &origin.base_model_name_or_path,
        );
        config.revision = or(&options.revision, &origin.revision);
        if options.keep_origin {
            for (key, value) in &origin.keys {
                let keys = match fields::rule(key) {
                    Some(_) => &mut config.inert,
                    None => &mut config.unknown,
                };
                keys.insert(key.clone(), value.clone());
            }
        }
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
    /// Its path in a file that calls its module `module`.
    fn path_in(&self, module: &str) -> String {
        match module {
            "" => self.torch_name.clone(),
            module => format!("{module}.{}", self.torch_name),
        }
    }

    /// Row-major values of the whole parameter as a file has them. `as_is` are the paths of those whose file had `[d_in, d_out]`.
    fn in_file(&self, values: TensorData, as_is: &[String]) -> TensorData {
        let values = reshaped(values, &self.shape);
        let as_is = self.conv1d.unwrap_or_else(|| as_is.contains(&self.path));
        match self.is_transposed() && !as_is {
            true => transposed(&values),
            false => values,
        }
    }
}
