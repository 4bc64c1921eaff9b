//! From a model to PEFT's directory.
//!
//! The file has PyTorch's layout: `A [r, d_in]` and `B [d_out, r]`, the transposes of Burn's `[d_in, r]` and
//! `[r, d_out]`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::TensorData;

use super::adapter::{AdapterFile, LoraTensors, ParameterTensor, adapter_dir};
use super::config::{AdapterConfig, InitLoraWeights, is_embedding};
use super::elements::{reshaped, transposed};
use super::explicit;
use super::names::NameMap;
use super::stored::host;
use super::write::WriteOptions;
use crate::adapter::{Change, Lora, LoraConfig, LoraInit, converted_alpha};
use crate::model::{Adapted, BiasMode, Parameter, PeftModel, TrainableTokens};
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
        let (defaults, mut targets) = (&config.lora, config.targets.clone());
        let parameters = model.parameters();
        let mut adapted = Vec::new();
        let mut file = Self::new(AdapterConfig::new(1, 1.0, targets.clone()), Vec::new());
        let (mut saved, mut tokens) = (SavedModules::default(), BTreeMap::new());
        let mut experts: Vec<(String, &Parameter, Lora)> = Vec::new();
        for (path, change) in model.changes(name)? {
            let parameter = parameters.iter().find(|parameter| parameter.path == path);
            let parameter = parameter.expect("a parameter of the model");
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
                    let tensors = LoraTensors::of(&lora, module.clone(), parameter)?;
                    check_like(&module, &lora, defaults)?;
                    adapted.push(Adapted {
                        path: module,
                        rank: tensors.lora_rank,
                        alpha: tensors.lora_alpha,
                    });
                    file.tensors.push(tensors.tensors);
                }
                Change::Copy(copy) => {
                    let (path, values) = (saved.path(parameter, module), copy.values.val());
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
        if let Some(path) = tokens.keys().find(|path| {
            let mut adapted = adapted.iter();
            adapted.any(|adapted| adapted.path == **path)
        }) {
            return Err(PeftError::config(
                "trainable_token_indices",
                format!("tokens of `{path}`, which has factors too"),
                "one of the two, as PEFT has them",
            ));
        }
        // Modules that the map cannot name are not in the file's naming, so no pattern of the file can mean them.
        let target = parameters.iter().filter(|parameter| parameter.is_target());
        let target: Vec<_> = target
            .filter_map(|parameter| options.names.to_file(parameter.module()).ok())
            .collect();
        let (mut rank, mut alpha) = (defaults.rank, defaults.alpha);
        let times = defaults.growth();
        if times > 1 {
            let grown = |alpha| converted_alpha(alpha, defaults.rslora, times);
            (rank, alpha) = (times * rank, grown(alpha));
            let ranks = targets.rank_pattern.iter();
            targets.rank_pattern = ranks
                .map(|(key, &rank)| (key.to_owned(), times * rank))
                .collect();
            let alphas = targets.alpha_pattern.iter();
            targets.alpha_pattern = alphas
                .map(|(key, &alpha)| (key.to_owned(), grown(alpha)))
                .collect();
        }
        let modules_to_save = saved.names(config.bias, &adapted, &parameters, &options.names)?;
        let target: Vec<_> = target
            .into_iter()
            .filter(|path| !modules_to_save.contains(path))
            .collect();
        let preferred = options.names.is_empty().then_some(&targets);
        let targets = explicit::describe(preferred, &adapted, &target, rank, alpha)?;
        file.config = AdapterConfig::new(rank, alpha, targets)
            .with_lora_dropout(defaults.dropout)
            .with_use_rslora(defaults.rslora)
            .with_use_dora(defaults.dora);
        if config.ensure_weight_tying {
            file.tie_head(&options.names.to_file(model.head())?)?;
        }
        for (place, (module, parameter, lora)) in experts.iter().enumerate() {
            let path = format!("{module}.{}", parameter.torch_name);
            // The first of a module's tensors is innermost of PEFT's wrappers.
            let later = experts[place + 1..]
                .iter()
                .filter(|(other, ..)| other == module);
            let wrapped = format!("{module}{}", ".base_layer".repeat(later.count()));
            let tensors = LoraTensors::of(lora, wrapped, parameter)?;
            file.tensors.push(tensors.tensors);
            let matcher = file.config.targets.compile(None)?;
            let patterns = &mut file.config.targets;
            if matcher.rank_for(&path, rank)? != tensors.lora_rank {
                let key = regex::escape(&path);
                patterns.rank_pattern.insert(key, tensors.lora_rank);
            }
            if matcher.alpha_for(&path, alpha)? != tensors.lora_alpha {
                let key = regex::escape(&path);
                patterns.alpha_pattern.insert(key, tensors.lora_alpha);
            }
            let matcher = patterns.compile(None)?;
            if matcher.rank_for(&path, rank)? != tensors.lora_rank
                || matcher.alpha_for(&path, alpha)? != tensors.lora_alpha
            {
                return Err(PeftError::config(
                    "rank_pattern, alpha_pattern",
                    format!("those of `{path}`"),
                    "no earlier key that matches it and says otherwise",
                ));
            }
            file.config.target_parameters.push(path);
        }
        file.config.lora_bias = defaults.bias;
        file.config.bias = config.bias;
        file.config.modules_to_save = modules_to_save;
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

/// The parameters of which an adapter has copies, by the paths of their modules in the file's naming.
#[derive(Default)]
struct SavedModules {
    modules: BTreeMap<String, Vec<String>>,
}

impl SavedModules {
    /// The path of the parameter in the file.
    fn path(&mut self, parameter: &Parameter, module: String) -> String {
        let name = parameter.torch_name.clone();
        let path = match module.as_str() {
            "" => name.clone(),
            module => format!("{module}.{name}"),
        };
        self.modules.entry(module).or_default().push(name);
        path
    }

    /// The `modules_to_save` that PEFT needs to be told of: all but biases that `bias` tells of, and weights of adapted
    /// embeddings.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for a module of which the adapter has only some parameters, and where even its whole path is the
    /// end of another module's: PEFT would look for the parameters of all such modules.
    fn names(
        self,
        bias: BiasMode,
        adapted: &[Adapted],
        parameters: &[Parameter],
        names: &NameMap,
    ) -> Result<Vec<String>> {
        let is_adapted = |module: &str| adapted.iter().any(|adapted| adapted.path == module);
        let told = |module: &str, found: &[String]| match found {
            [only] if only == "bias" => match bias {
                BiasMode::None => false,
                BiasMode::All => true,
                BiasMode::LoraOnly => is_adapted(module),
            },
            // PEFT has the base's own weight beside the factors of an embedding.
            [only] if only == "weight" => is_adapted(module) && is_embedding(module),
            _ => false,
        };
        let mut of_model: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for parameter in parameters {
            if let Ok(module) = names.to_file(parameter.module()) {
                let known = of_model.entry(module).or_default();
                known.push(&parameter.torch_name);
            }
        }
        let modules = self.modules.into_iter();
        let saved: BTreeMap<_, _> = modules
            .filter(|(module, found)| !told(module, found))
            .collect();
        for (module, found) in &saved {
            let error = |value: String, expected: &str| {
                Err(PeftError::config("modules_to_save", value, expected))
            };
            let all = of_model.get(module).map_or(&[][..], Vec::as_slice);
            if all.len() != found.len() || module.is_empty() {
                let value = format!("{found:?} of `{module}`");
                return error(value, &format!("a module's every parameter: {all:?}"));
            }
            let mut others = of_model.keys().filter(|other| !saved.contains_key(*other));
            if let Some(other) = others.find(|other| other.ends_with(module.as_str())) {
                return error(
                    format!("`{module}`"),
                    &format!("a path that `{other}` does not end with"),
                );
            }
        }
        Ok(saved.into_keys().collect())
    }
}
