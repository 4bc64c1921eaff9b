//! Which parameters of a model the tensors of an adapter are for.

use std::collections::{HashMap, HashSet};

use burn::module::Module;

use super::adapter::{AdapterFile, LoraTensors, ParameterTensor};
use super::config::{AdapterConfig, without_base_layers};
use super::elements;
use super::keys::{Around, Factor, base_key, parameter_key, rows_key, tensor_key};
use super::load::{BaseValues, LoadOptions};
use super::names::NameMap;
use super::ranks::Ranks;
use super::report::{LoadReport, Mismatch};
use super::shapes::ModuleShape;
use super::sites::check_shape;
use super::tied::{Tied, TiedHead};
use super::version::Version;
use crate::layer::{ExpertLayout, LayerKind, WeightLayout};
use crate::model::{
    BiasMode, Parameter, PeftModel, TargetModules, TrainableTokens, is_named, is_statistic,
};
use crate::{PeftError, Result};

/// The first version of PEFT whose factors of `[E, d_out, d_in]` are those of the matrices themselves.
const EXPERTS_AS_LINEAR: Version = Version(0, 19, 1);
/// The version whose factors of any tensor of experts are those of the transposes.
const EXPERTS_TURNED: Version = Version(0, 19, 0);
/// The first version of PEFT that takes the first of two indices in a path for the layer's.
const FIRST_LAYER_INDEX: Version = Version(0, 20, 0);

/// Values that fit a parameter of the model.
pub(super) struct Fit<'a> {
    /// The parameter.
    pub parameter: Parameter,
    pub values: Values<'a>,
}

/// The values for one parameter.
pub(super) enum Values<'a> {
    /// A low-rank change.
    Lora {
        tensors: &'a LoraTensors,
        rank: usize,
        alpha: f64,
        /// Whether `A` sees the outputs of each expert, as in files of a PEFT before 0.19.1.
        turned: bool,
    },
    /// Values of its own for the whole parameter.
    Copy {
        tensor: &'a ParameterTensor,
        /// Whether the file holds the weight of a linear layer as `[d_in, d_out]`.
        as_is: bool,
        /// Whether they are a frozen base.
        frozen: bool,
    },
    /// Some of its rows.
    Rows {
        tensor: &'a ParameterTensor,
        indices: Vec<usize>,
    },
}

/// What of an adapter fits a model.
pub(super) struct Fitted<'a> {
    pub fits: Vec<Fit<'a>>,
    pub report: LoadReport,
    /// Whether what changes an embedding changes the head that shares its weight.
    pub ensure_weight_tying: bool,
    /// The parameters of the model whose base values the file has.
    pub base_values: Vec<String>,
}

/// The parameters of a model by what a file calls them.
struct Parameters {
    /// The weights that an adapter can change, by their module's path.
    targets: HashMap<String, Parameter>,
    /// Those of them that have a row for each token: embeddings and linear heads.
    matrices: HashMap<String, Parameter>,
    /// All, by their own paths.
    all: HashMap<String, Parameter>,
    /// All that the model itself has, by their own paths.
    bases: HashMap<String, Parameter>,
    /// Tensors of experts with their own paths, in the model's order.
    experts: Vec<(String, Parameter)>,
    /// The path of an output head that shares an embedding's weight.
    tied_head: Option<String>,
    /// The weight of that embedding.
    shared: Option<Parameter>,
}

impl Parameters {
    /// A parameter whose module the map cannot name has no name in the file.
    fn of<M: Module>(model: &PeftModel<M>, names: &NameMap) -> Result<Self> {
        let mut found = Self {
            targets: HashMap::new(),
            matrices: HashMap::new(),
            all: HashMap::new(),
            bases: HashMap::new(),
            experts: Vec::new(),
            tied_head: None,
            shared: None,
        };
        let shared = model.tied_embedding();
        // No adapter has running statistics of its own.
        let parameters = model.parameters_with_head()?.into_iter();
        for parameter in parameters.filter(|parameter| !is_statistic(&parameter.path)) {
            let path = match parameter.module() {
                "" => parameter.torch_name.clone(),
                module => match names.to_file(module) {
                    Err(_) => continue,
                    Ok(module) => {
                        if parameter.is_target() {
                            found.targets.insert(module.clone(), parameter.clone());
                        }
                        if let Some(LayerKind::Embedding | LayerKind::Linear) = parameter.layer {
                            found.matrices.insert(module.clone(), parameter.clone());
                        }
                        if parameter.tied_head {
                            found.tied_head = Some(module.clone());
                        }
                        format!("{module}.{}", parameter.torch_name)
                    }
                },
            };
            if shared.as_ref() == Some(&parameter.path) {
                found.shared = Some(parameter.clone());
            }
            if parameter.is_experts() {
                found.experts.push((path.clone(), parameter.clone()));
            }
            if !parameter.tied_head {
                found.bases.insert(path.clone(), parameter.clone());
            }
            found.all.insert(path, parameter);
        }
        Ok(found)
    }

    /// The tensor of experts that factors under this module path are for: PEFT wraps a module once for each of its tensors, the
    /// first of them innermost.
    fn take_experts(&mut self, path: &str, targets: &[String]) -> Option<Parameter> {
        let (module, depth) = without_base_layers(path);
        let of_module = |path: &str| {
            let named = targets.iter().any(|target| is_named(path, target));
            named && path.rsplit_once('.').is_some_and(|(of, _)| of == module)
        };
        let own = self.experts.iter().filter(|(path, _)| of_module(path));
        let own: Vec<_> = own.collect();
        let place = own.len().checked_sub(depth + 1)?;
        let (path, _) = own[place];
        let (_, parameter) = self.all.remove_entry(&path.clone())?;
        Some(parameter)
    }
}

impl AdapterFile {
    /// Which parameters of the model get what, and what becomes of every tensor.
    pub(super) fn fit<M: Module>(
        &self,
        model: &PeftModel<M>,
        options: &LoadOptions,
    ) -> Result<Fitted<'_>> {
        let parameters = Parameters::of(model, &options.names)?;
        let head = options.names.to_file(model.head());
        let head = head.unwrap_or_else(|_| model.head().to_owned());
        let is_declared = parameters.tied_head.is_some();
        let mut fitting = Fitting {
            file: self,
            ranks: Ranks::new(&self.config)?,
            tied: TiedHead::of(self),
            tying: Tied::of(self, &head, model.has_own_head()),
            around: self.modules(),
            head,
            parameters,
            fits: Vec::with_capacity(self.tensors.len()),
            report: self.skipped.clone(),
            base_values: Vec::new(),
        };
        for tensors in &self.tensors {
            fitting.factors(tensors)?;
        }
        for copy in &self.copies {
            fitting.copy(copy)?;
        }
        for rows in &self.rows {
            fitting.rows(rows)?;
        }
        fitting.bases(model, options)?;
        fitting.missing()?;
        fitting
            .tying
            .note(&mut fitting.report, &fitting.head, is_declared);
        fitting.report.missing.sort();
        Ok(Fitted {
            ensure_weight_tying: fitting.tying.is_together(),
            fits: fitting.fits,
            report: fitting.report,
            base_values: fitting.base_values,
        })
    }

    /// What the adapter has of each module, by their paths.
    pub(super) fn modules(&self) -> HashMap<&str, Around> {
        let mut modules = HashMap::new();
        for copy in &self.copies {
            if let Some((module, _)) = copy.path.rsplit_once('.') {
                modules.insert(module, Around::Copy);
            }
        }
        let rows = self
            .rows
            .iter()
            .map(|rows| (rows.path.as_str(), Around::Rows));
        modules.extend(rows);
        let factors = self.tensors.iter();
        modules.extend(factors.map(|module| (module.path.as_str(), Around::Factors)));
        modules
    }
}

/// The paths of the modules that have factors, as a question.
pub(super) fn is_adapted(around: &HashMap<&str, Around>, path: &str) -> bool {
    let module = path.rsplit_once('.');
    module.is_some_and(|(module, _)| around.get(module) == Some(&Around::Factors))
}

/// What the adapter has of the module around the parameter at `path`.
pub(super) fn around_of(around: &HashMap<&str, Around>, path: &str) -> Around {
    let module = path.rsplit_once('.').map_or("", |(module, _)| module);
    around.get(module).copied().unwrap_or(Around::Nothing)
}

/// Whether `layers_to_transform` may have meant another layer of this module to the PEFT that wrote the file: before 0.20, of two indices
/// in a path the last counted.
fn is_doubtful(config: &AdapterConfig, path: &str) -> bool {
    let numbers = path
        .split('.')
        .filter(|segment| segment.parse::<u64>().is_ok());
    config.targets.layers_to_transform.is_some()
        && config
            .version()
            .is_none_or(|version| version < FIRST_LAYER_INDEX)
        && numbers.count() > 1
}

/// An adapter that is being put on a model.
struct Fitting<'a> {
    file: &'a AdapterFile,
    ranks: Ranks<'a>,
    tied: TiedHead<'a>,
    tying: Tied,
    /// How the file calls the output head.
    head: String,
    around: HashMap<&'a str, Around>,
    parameters: Parameters,
    fits: Vec<Fit<'a>>,
    report: LoadReport,
    base_values: Vec<String>,
}

impl<'a> Fitting<'a> {
    fn factors(&mut self, tensors: &'a LoraTensors) -> Result<()> {
        let config = &self.file.config;
        let path = &tensors.path;
        let keys = || tensors.iter().map(|(factor, _)| tensor_key(path, factor));
        if self.tying.is_together() && self.tied.has_factors(tensors) {
            self.report.loaded.extend(keys());
            return Ok(());
        }
        if !self.is_chosen(tensors)? {
            self.report.unexpected.extend(keys());
            self.report.notes.push(format!(
                "the configuration does not choose `{}`, so PEFT passes over its factors; \"target_modules\" and \"exclude_modules\" \
                 among `ReadOptions::ignored_keys` make the tensors decide",
                path.escape_debug()
            ));
            return Ok(());
        }
        let found = match tensors.experts {
            true => self
                .parameters
                .take_experts(path, &config.target_parameters),
            false => None,
        };
        let found = found.or_else(|| {
            let target = self.parameters.targets.remove(path)?;
            let is_embedding = target.layer == Some(LayerKind::Embedding);
            (is_embedding == tensors.embedding || config.of_mlx).then_some(target)
        });
        let Some(parameter) = found else {
            self.report.unexpected.extend(keys());
            return Ok(());
        };
        // The patterns see a tensor of experts by its own path.
        let of_experts = format!("{}.{}", without_base_layers(path).0, parameter.torch_name);
        let seen = if parameter.is_experts() {
            &of_experts
        } else {
            path
        };
        let rank = self.ranks.matcher().rank_for(seen, config.r)?;
        let alpha = self.ranks.matcher().alpha_for(seen, config.lora_alpha)?;
        let shape = parameter.module_shape(&tensors.module_shape());
        let turned = self.is_turned(tensors, &parameter, &shape)?;
        let shape = match turned {
            true => ModuleShape {
                d_in: shape.d_out,
                d_out: shape.d_in,
                ..shape
            },
            false => shape,
        };
        let (mut loaded, mut mismatched) = (Vec::new(), Vec::new());
        for (factor, data) in tensors.iter() {
            let tensor = tensor_key(path, factor);
            elements::to_file(&tensor, data.dtype())?;
            match check_shape(tensor, data.shape(), shape.shape(factor, rank)) {
                Ok(tensor) => loaded.push(tensor),
                Err(mismatch) => mismatched.push(mismatch),
            }
        }
        // Some factors without the others are not put anywhere.
        if !mismatched.is_empty() {
            self.report.mismatched.append(&mut mismatched);
            self.report.left_out.append(&mut loaded);
            return Ok(());
        }
        self.report.loaded.append(&mut loaded);
        let values = Values::Lora {
            tensors,
            rank,
            alpha,
            turned,
        };
        self.fits.push(Fit { parameter, values });
        Ok(())
    }

    /// Whether the configuration chooses the module, so that PEFT would give it factors to load.
    fn is_chosen(&self, tensors: &LoraTensors) -> Result<bool> {
        let config = &self.file.config;
        let targets = &config.targets;
        let says_nothing = match &targets.target_modules {
            TargetModules::List(names) => names.is_empty() && targets.exclude_modules.is_none(),
            _ => false,
        };
        // PEFT takes a head that it ties out of the targets.
        let is_tied = config.ensure_weight_tying && is_named(&tensors.path, &self.head);
        Ok(says_nothing
            || tensors.experts
            || is_tied
            || is_doubtful(config, &tensors.path)
            || self.ranks.matcher().matches(&tensors.path)?)
    }

    /// Whether the factor `A` of experts sees the outputs of each, as an older PEFT has it.
    fn is_turned(
        &self,
        tensors: &LoraTensors,
        parameter: &Parameter,
        shape: &ModuleShape,
    ) -> Result<bool> {
        let Some(LayerKind::Experts(layout)) = parameter.layer else {
            return Ok(false);
        };
        if shape.d_in != shape.d_out {
            let sides = [tensors.a.shape().get(1), tensors.b.shape().first()];
            return Ok(sides == [Some(&shape.d_out), Some(&shape.d_in)]);
        }
        match self.file.config.version() {
            Some(version) if version >= EXPERTS_AS_LINEAR => Ok(false),
            Some(version) if version >= EXPERTS_TURNED => Ok(true),
            Some(_) => Ok(layout == ExpertLayout::OutIn),
            None => Err(PeftError::UnsupportedKey {
                key: "target_parameters".into(),
                value: format!("`{}`", parameter.path),
                reason: "its experts are square matrices, of which PEFT before 0.19.1 stored the factors the other way round, and the \
                         file does not say which PEFT wrote it: `ReadOptions::assumed_peft_version` does"
                    .into(),
            }),
        }
    }

    fn copy(&mut self, copy: &'a ParameterTensor) -> Result<()> {
        let key = parameter_key(&copy.path, is_adapted(&self.around, &copy.path));
        elements::to_file(&key, copy.data.dtype())?;
        let place = self.parameters.all.get(&copy.path);
        let is_head = place.is_none_or(|place| place.tied_head);
        if self.tying.is_together() && is_head && self.tied.has_copy(copy) {
            self.report.loaded.push(key);
            return Ok(());
        }
        let Some(parameter) = self.parameters.all.remove(&copy.path) else {
            self.report.unexpected.push(key);
            return Ok(());
        };
        self.whole(key, copy, parameter, false)
    }

    /// Values of a whole parameter.
    fn whole(
        &mut self,
        key: String,
        tensor: &'a ParameterTensor,
        parameter: Parameter,
        frozen: bool,
    ) -> Result<()> {
        let (expected, as_is) = self.in_file(&parameter, tensor)?;
        if self
            .report
            .judge(check_shape(key, tensor.data.shape(), expected))
        {
            let values = Values::Copy {
                tensor,
                as_is,
                frozen,
            };
            self.fits.push(Fit { parameter, values });
        }
        Ok(())
    }

    /// The shape that a file has of the parameter, and whether it holds a linear layer's as `[d_in, d_out]`.
    fn in_file(
        &self,
        parameter: &Parameter,
        tensor: &ParameterTensor,
    ) -> Result<(Vec<usize>, bool)> {
        let shape = parameter.shape.clone();
        if !parameter.is_transposed() {
            return Ok((shape, false));
        }
        let turned: Vec<_> = shape.iter().rev().copied().collect();
        let told = self.file.config.fan_in_fan_out;
        Ok(match parameter.conv1d {
            Some(true) => (shape, true),
            Some(false) => (turned, false),
            None if told && shape == turned => {
                return Err(PeftError::config(
                    format!("the layout of `{}`", tensor.path),
                    "a square matrix, in a file with `fan_in_fan_out`",
                    "to be told by `PeftModel::with_conv1d` which modules are `Conv1D` in PyTorch: their weights are stored [d_in, d_out]",
                ));
            }
            None if told && tensor.data.shape().as_slice() == shape => (shape, true),
            None => (turned, false),
        })
    }

    fn rows(&mut self, rows: &'a ParameterTensor) -> Result<()> {
        let key = rows_key(&rows.path);
        elements::to_file(&key, rows.data.dtype())?;
        let indices = self.file.indices_of(&rows.path);
        // PEFT stores the rows of a tied head once more with `save_embedding_layers`.
        let others = self
            .file
            .rows
            .iter()
            .filter(|other| other.path != rows.path);
        let mut others = others.filter(|other| {
            self.parameters
                .bases
                .contains_key(&format!("{}.weight", other.path))
        });
        let is_own = self
            .parameters
            .bases
            .contains_key(&format!("{}.weight", rows.path));
        if !is_own
            && others.any(|other| {
                other.data == rows.data && self.file.indices_of(&other.path) == indices
            })
        {
            self.report.loaded.push(key);
            return Ok(());
        }
        let matrix = self.parameters.matrices.remove(&rows.path);
        let Some((parameter, indices)) = matrix.zip(indices) else {
            self.report.unexpected.push(key);
            return Ok(());
        };
        let features = parameter.shape[usize::from(!parameter.is_transposed())];
        let expected = vec![indices.len(), features];
        if self
            .report
            .judge(check_shape(key, rows.data.shape(), expected))
        {
            let (tensor, indices) = (rows, indices.to_vec());
            let values = Values::Rows { tensor, indices };
            self.fits.push(Fit { parameter, values });
        }
        Ok(())
    }

    /// Base values that PEFT stored: those that differ from the model's become a frozen base of the adapter.
    fn bases<M: Module>(&mut self, model: &PeftModel<M>, options: &LoadOptions) -> Result<()> {
        let file = self.file;
        let mut wanted = HashSet::new();
        for base in &file.base_values {
            if let Some(parameter) = self.base_of(base) {
                wanted.insert(parameter.path.clone());
            }
        }
        let own = model.dense_base(&wanted);
        for base in &file.base_values {
            let module = base.path.rsplit_once('.').map_or("", |(module, _)| module);
            let around = around_of(&self.around, &base.path);
            let key = base_key(&base.path, around);
            elements::to_file(&key, base.data.dtype())?;
            let is_own = self.parameters.bases.contains_key(&base.path);
            let tied_copy = self.tying.is_together() && self.tied.has_copy(base);
            if !is_own && (tied_copy || self.is_shared_base(base)) {
                self.report.loaded.push(key);
                continue;
            }
            let Some(parameter) = self.base_of(base) else {
                self.report.unexpected.push(key);
                continue;
            };
            let is_head = is_named(module, model.head());
            let is_usual = around != Around::Nothing
                || is_head
                || parameter.layer == Some(LayerKind::Embedding);
            match options.base_values {
                BaseValues::Stored if is_usual => {}
                BaseValues::All => {}
                BaseValues::Stored => {
                    self.report.unexpected.push(key);
                    continue;
                }
                BaseValues::Ignored => {
                    self.report.loaded.push(key.clone());
                    self.report.notes.push(format!(
                        "the base values `{}` of the file are not used",
                        key.escape_debug()
                    ));
                    continue;
                }
            }
            if is_own {
                self.base_values.push(parameter.path.clone());
            }
            let before = self.fits.len();
            self.whole(key.clone(), base, parameter, true)?;
            let Some(fit) = self.fits.get(before) else {
                self.note_vocabulary(&key);
                continue;
            };
            let same = own.get(&fit.parameter.path);
            if same.is_some_and(|own| fit.is_equal(own)) {
                self.fits.pop();
            } else {
                self.report.base_values.push(key);
            }
        }
        Ok(())
    }

    /// The parameter that has this base value: of an output head that shares an embedding's weight, the embedding's.
    fn base_of(&self, base: &ParameterTensor) -> Option<Parameter> {
        let parameters = &self.parameters;
        let is_head = || {
            let module = base.path.strip_suffix(".weight");
            module.is_some() && module == parameters.tied_head.as_deref()
        };
        let own = parameters.bases.get(&base.path);
        own.or_else(|| parameters.shared.as_ref().filter(|_| is_head()))
            .cloned()
    }

    /// Whether this is the base value of a head that shares an embedding's weight, with the values that the file has of the embedding.
    fn is_shared_base(&self, base: &ParameterTensor) -> bool {
        let of_embedding = |other: &&ParameterTensor| {
            let known = self.parameters.bases.get(&other.path);
            known.is_some_and(|known| known.layer == Some(LayerKind::Embedding))
        };
        let mut embeddings = self.file.base_values.iter().filter(of_embedding);
        embeddings.any(|other| other.data == base.data)
    }

    fn note_vocabulary(&mut self, key: &str) {
        let mismatch = self.report.mismatched.last();
        if let Some(Mismatch {
            expected, found, ..
        }) = mismatch
            && let ([rows, _], [stored, _]) = (&expected[..], &found[..])
            && rows != stored
        {
            let note = format!(
                "`{}` has {stored} rows and the model {rows}: the adapter is of a resized vocabulary; resize the model's first",
                key.escape_debug()
            );
            self.report.notes.push(note);
        }
    }

    /// Reports what the configuration chooses and no tensor is for.
    fn missing(&mut self) -> Result<()> {
        let Self {
            file,
            ranks,
            around,
            parameters: left,
            report,
            tying,
            ..
        } = self;
        let config = &file.config;
        let matcher = ranks.matcher();
        let reported: HashSet<_> = report
            .left_out
            .iter()
            .chain(&report.missing)
            .cloned()
            .collect();
        let reported: HashSet<_> = report
            .mismatched
            .iter()
            .map(|mismatch| mismatch.tensor.clone())
            .chain(reported)
            .collect();
        let saved = |path: &str| {
            let mut modules = path.match_indices('.').map(|(dot, _)| &path[..dot]);
            modules.any(|module| {
                config
                    .modules_to_save
                    .iter()
                    .any(|name| is_named(module, name))
            })
        };
        let doubtful: HashSet<&String> = left
            .targets
            .keys()
            .filter(|path| is_doubtful(config, path))
            .collect();
        let tied_head = left.tied_head.as_deref();
        // "all-linear" may mean fewer modules in Python; PEFT never writes it.
        if config.targets.target_modules != TargetModules::AllLinear {
            for (path, parameter) in &left.targets {
                let file_path = format!("{path}.{}", parameter.torch_name);
                let is_target =
                    !saved(&file_path) && !doubtful.contains(path) && matcher.matches(path)?;
                if is_target && tied_head != Some(path) {
                    let embedding = parameter.layer == Some(LayerKind::Embedding);
                    let factors = Factor::of(embedding, config.lora_bias, config.use_dora);
                    let keys: Vec<_> = factors
                        .iter()
                        .map(|&factor| tensor_key(path, factor))
                        .collect();
                    if !keys.iter().any(|key| reported.contains(key)) {
                        report.missing.extend(keys);
                    }
                }
            }
        }
        let adapted = |path: &str| is_adapted(around, path);
        for (path, parameter) in &left.all {
            let bias = parameter.torch_name == "bias"
                && match config.bias {
                    BiasMode::None => false,
                    BiasMode::All => true,
                    BiasMode::LoraOnly => adapted(path),
                };
            let is_tied_head = parameter.tied_head && tying.is_together();
            if (bias || saved(path)) && !is_tied_head {
                report.missing.push(parameter_key(path, adapted(path)));
            }
        }
        for (path, parameter) in &left.experts {
            let mut named = config.target_parameters.iter();
            // What has found its tensors is no more among all parameters.
            if left.all.contains_key(path) && named.any(|name| is_named(path, name)) {
                let module = path.strip_suffix(&format!(".{}", parameter.torch_name));
                let keys = [Factor::A, Factor::B];
                let module = module.unwrap_or(path);
                report
                    .missing
                    .extend(keys.map(|factor| tensor_key(module, factor)));
            }
        }
        for name in config.token_names() {
            // PEFT stores the rows of an embedding and its head once, if these are one weight, and each otherwise.
            let mut left = left.matrices.iter();
            let own = left.find(|(path, parameter)| is_named(path, name) && !parameter.tied_head);
            if let Some((path, _)) = own.filter(|_| config.shares_tokens(name)) {
                report.missing.push(rows_key(path));
            }
        }
        if let (Some(TrainableTokens::Input(_)), true) =
            (&config.trainable_token_indices, file.rows.is_empty())
        {
            report.missing.push(rows_key("the input embedding"));
        }
        Ok(())
    }
}

impl AdapterFile {
    /// The rows that the configuration has of the embedding at `path`.
    fn indices_of(&self, path: &str) -> Option<&[usize]> {
        match self.config.trainable_token_indices.as_ref()? {
            TrainableTokens::Input(indices) => Some(indices),
            TrainableTokens::Named(named) => {
                let mut named = named.iter();
                let (_, indices) = named.find(|(name, _)| is_named(path, name))?;
                Some(indices)
            }
        }
    }
}

impl LoadReport {
    /// Notes what became of a tensor, and whether it fits.
    fn judge(&mut self, checked: std::result::Result<String, Mismatch>) -> bool {
        match checked {
            Ok(key) => self.loaded.push(key),
            Err(mismatch) => {
                self.mismatched.push(mismatch);
                return false;
            }
        }
        true
    }
}

impl Parameter {
    /// Whether a file holds it transposed, unless it is transformers' `Conv1D`.
    pub(super) fn is_transposed(&self) -> bool {
        self.layer == Some(LayerKind::Linear)
    }

    /// What the shapes of factors for it follow from. A weight does not tell how many groups a convolution has: it has the
    /// channels of one.
    pub(super) fn module_shape(&self, factors: &ModuleShape) -> ModuleShape {
        let layout = self.layer.map_or(WeightLayout::Matrix, LayerKind::layout);
        let [d_in, d_out] = layout.dims(&self.shape);
        match layout {
            WeightLayout::Matrix => ModuleShape::matrix(d_in, d_out),
            WeightLayout::Experts(_) => {
                let experts = self.shape[0];
                ModuleShape::matrix(d_in, d_out / experts.max(1)).of_experts(experts)
            }
            WeightLayout::Kernel => {
                // Of one group, they are a change of the weight, whatever the convolution is.
                let groups = match &factors.kernel {
                    Some((2.., _)) => self.groups,
                    _ => 1,
                };
                let d_in = self.shape[1].saturating_mul(groups);
                let kernel = Some((groups, self.shape[2..].to_vec()));
                ModuleShape {
                    kernel,
                    ..ModuleShape::matrix(d_in, d_out)
                }
            }
        }
    }

    /// Whether it is the weight of a layer that targets name.
    pub(super) fn is_target(&self) -> bool {
        self.layer.is_some() && !self.is_experts()
    }

    /// Whether it may hold the weights of experts.
    pub(super) fn is_experts(&self) -> bool {
        matches!(self.layer, Some(LayerKind::Experts(_)))
    }
}
