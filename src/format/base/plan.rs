//! Which tensor of a checkpoint goes into which parameter of a model, and in what form: all that can be checked before a
//! value is read.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use burn::module::Module;
use burn::tensor::{DType, FloatDType};
use safetensors::Dtype;

use super::bitsandbytes;
use super::checkpoint::{BaseCheckpoint, BaseTensor};
use super::four_bit::FourBit;
use super::lookup::{Lookup, means};
use super::model_config;
use super::options::BaseOptions;
use super::proposal;
use super::quant_state::{QuantState, QuantType};
use super::report::{BaseMismatch, BaseReport, DTypeMismatch, Resized};
use crate::format::{Mismatch, elements};
use crate::model::{
    BaseParameter, NewRows, base_parameters, choose_linear, input_embedding, output_head,
};
use crate::nf4::Nf4Config;
use crate::{PeftError, Result};

/// What is to be read, in the order of the files.
pub(super) struct Plan {
    pub jobs: Vec<Job>,
    /// Tensors without a parameter that must be equal to another: `(copy, source)`.
    pub copies: Vec<(String, String)>,
    /// What is known of the report so far.
    pub report: BaseReport,
}

/// One tensor for one parameter.
pub(super) struct Job {
    pub parameter: BaseParameter,
    /// The tensor whose values are read.
    pub tensor: String,
    /// The shape in which its values are wanted, in the order of the file.
    pub shape: Vec<usize>,
    /// Its element type in the file.
    pub stored: DType,
    /// The element type asked for.
    pub dtype: FloatDType,
    pub form: Form,
    /// How many rows the file has, if these are not as many as are wanted, and what new ones are.
    pub resize: Option<(usize, NewRows)>,
    /// What the file says of a weight that it has in four bits.
    pub state: Option<QuantState>,
}

/// The form that values take in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Dense, in the order of the file.
    AsStored,
    /// Dense, the transpose of the file's matrix.
    Transposed,
    /// In NF4, which has the order of the file.
    Packed(Nf4Config),
    /// In NF4, in the order of the transpose of the file's matrix.
    PackedTransposed(Nf4Config),
    /// In NF4, as it is in the file.
    AlreadyPacked,
}

impl Form {
    /// How the values are packed.
    fn config(self) -> Option<Nf4Config> {
        match self {
            Self::Packed(config) | Self::PackedTransposed(config) => Some(config),
            _ => None,
        }
    }
}

impl Plan {
    /// # Errors
    ///
    /// [`PeftError::BaseMismatch`] with all that does not fit; [`PeftError::Config`] for options out of range and for a
    /// name map that does not name every parameter apart; [`PeftError::AlreadyQuantized`],
    /// [`PeftError::ForeignReparameterization`], and those of the targets.
    pub fn new<M: Module>(
        checkpoint: &BaseCheckpoint,
        module: &M,
        head: Option<&str>,
        options: &BaseOptions,
    ) -> Result<Self> {
        options.check()?;
        let parameters = base_parameters(module)?;
        let targets = match &options.nf4 {
            None => None,
            Some((targets, _)) => Some(choose_linear(&parameters, head, targets)?),
        };
        let vocabulary = Vocabulary::of(&parameters, head);
        let chosen: BTreeSet<&str> = targets
            .iter()
            .flat_map(|report| &report.matched)
            .map(|target| target.path.as_str())
            .collect();
        let parameters = by_name(parameters, options)?;
        let lookup = Lookup::new(checkpoint, options, &parameters)?;
        let mut planner = Planner {
            checkpoint,
            options,
            lookup: &lookup,
            tables: vocabulary.tables(&parameters, &lookup, options),
            report: BaseReport::default(),
            mismatch: BaseMismatch::default(),
            broken: None,
            used: HashMap::new(),
            shared: BTreeSet::new(),
            companions: BTreeSet::new(),
        };
        let mut jobs = Vec::with_capacity(parameters.len());
        for (name, parameter) in &parameters {
            let packed = chosen.contains(parameter.module());
            jobs.extend(planner.job(name, parameter, packed)?);
        }
        let embedding = vocabulary.embedding.and_then(|path| {
            let tensor = jobs.iter().find(|job: &&Job| job.parameter.path == path)?;
            checkpoint.tensor(&tensor.tensor)
        });
        let copies = planner.rest(embedding);
        let Planner {
            mut report,
            mut mismatch,
            broken,
            ..
        } = planner;
        mismatch.fitting = jobs.len();
        if let Some(error) = broken {
            mismatch.fitting += 1;
            mismatch.check(checkpoint)?;
            return Err(error);
        }
        let nothing = options.allow_nothing;
        let passed = mismatch.is_none() || (nothing && mismatch.lists_nothing());
        if !passed {
            mismatch.proposal = proposal::of(checkpoint, &parameters, mismatch.fitting);
            let tensors = jobs.iter().map(|job| job.tensor.clone());
            mismatch.fitted = tensors.collect();
            mismatch.check(checkpoint)?;
        }
        let states = jobs.iter().filter_map(|job| job.state.as_ref());
        model_config::check(checkpoint, states, options)?;
        // As they lie on the disk.
        jobs.sort_by_cached_key(|job| checkpoint.place(&job.tensor));
        report.loaded.sort();
        report.targets = targets;
        report.index_faults = checkpoint.index_faults().to_vec();
        Ok(Self {
            jobs,
            copies,
            report,
        })
    }

    /// Bytes that are read: into parameters, and of copies and what they are compared with.
    pub fn num_bytes(&self, checkpoint: &BaseCheckpoint) -> u64 {
        let size = |name: &String| checkpoint.tensor(name).map_or(0, |tensor| tensor.num_bytes);
        let copies = self.copies.iter().map(|(copy, _)| 2 * size(copy));
        let jobs = self.jobs.iter().map(Job::num_bytes);
        jobs.chain(copies).map(|bytes| bytes as u64).sum()
    }

    /// The most bytes of f32 scales that a weight has beside it until it is packed.
    pub fn largest_scales(&self) -> usize {
        let scales = self.jobs.iter().map(|job| match job.form.config() {
            Some(config) if config.double_quant => {
                size_of::<f32>() * config.block_size.blocks(job.num_values())
            }
            _ => 0,
        });
        scales.max().unwrap_or(0)
    }
}

/// Where a model has a row for each token: paths of parameters.
struct Vocabulary {
    embedding: Option<String>,
    head: Option<String>,
}

impl Vocabulary {
    fn of(parameters: &[BaseParameter], head: Option<&str>) -> Self {
        let layers = parameters.iter().filter_map(BaseParameter::token_layer);
        let layers: Vec<_> = layers.collect();
        let weight = |module: &str| match module {
            "" => "weight".to_owned(),
            module => format!("{module}.weight"),
        };
        Self {
            embedding: input_embedding(&layers)
                .ok()
                .map(|layer| weight(layer.module)),
            head: output_head(&layers, head).map(weight),
        }
    }

    /// The names of the parameters whose numbers of rows may differ from the files', if any may.
    fn tables(
        &self,
        parameters: &BTreeMap<String, BaseParameter>,
        lookup: &Lookup,
        options: &BaseOptions,
    ) -> BTreeSet<String> {
        if options.resize.is_none() {
            return BTreeSet::new();
        }
        let head = self.head.iter();
        let bias = head.clone().filter_map(|path| path.strip_suffix("weight"));
        let bias: Vec<String> = bias.map(|module| format!("{module}bias")).collect();
        let paths: Vec<&String> = self.embedding.iter().chain(head).chain(&bias).collect();
        let mut tables = BTreeSet::new();
        for (name, parameter) in parameters {
            let named = options.resized.iter().any(|table| means(name, table));
            if named || paths.contains(&&parameter.path) {
                tables.extend(lookup.tied_to(name).map(str::to_owned));
                tables.insert(name.clone());
            }
        }
        tables
    }
}

/// What becomes of tensors and parameters, one after the other.
struct Planner<'a> {
    checkpoint: &'a BaseCheckpoint,
    options: &'a BaseOptions,
    lookup: &'a Lookup<'a>,
    tables: BTreeSet<String>,
    report: BaseReport,
    mismatch: BaseMismatch,
    /// What is wrong inside of a tensor; names, shapes and types come first, all of them.
    broken: Option<PeftError>,
    /// The tensors that are a parameter's own, by whose name.
    used: HashMap<String, String>,
    /// The tensors that parameters have which are tied to them.
    shared: BTreeSet<String>,
    /// Tensors that belong to a weight in four bits.
    companions: BTreeSet<String>,
}

impl Planner<'_> {
    /// What to read for a parameter; nothing where it stays as it is, or does not fit.
    fn job(&mut self, name: &str, parameter: &BaseParameter, chosen: bool) -> Result<Option<Job>> {
        let (checkpoint, options) = (self.checkpoint, self.options);
        let own = self.lookup.find(name);
        let Some(tensor) = own.or_else(|| self.lookup.find_tied(name)) else {
            self.missing(name, parameter);
            return Ok(None);
        };
        if own.is_some()
            && let Some(other) = self.used.insert(tensor.name.to_owned(), name.to_owned())
        {
            return Err(PeftError::config(
                "with_alias, with_other_prefix",
                format!("`{other}` and `{name}` are both `{}`", tensor.name),
                "a tensor for each parameter",
            ));
        }
        let parts = match parameter.is_linear() {
            true => bitsandbytes::companions(checkpoint, tensor.name),
            false => Vec::new(),
        };
        let four_bit = !parts.is_empty();
        self.companions.extend(parts);
        let mut state = None;
        if four_bit {
            state = self.state(&tensor, parameter);
            if state.is_none() {
                return Ok(None);
            }
        }
        let form = self.form(tensor.name, parameter, chosen, state.as_ref());
        let job = match state {
            None => self.fit(name, parameter, &tensor, form),
            Some(state) => {
                let dtype = options.dtype.unwrap_or(state.dtype);
                let fits = fit_dtype(parameter, tensor.name, dtype, &mut self.mismatch);
                fits.then(|| Job {
                    parameter: parameter.clone(),
                    tensor: tensor.name.to_owned(),
                    shape: state.shape.to_vec(),
                    stored: DType::F32,
                    dtype,
                    form,
                    resize: None,
                    state: Some(state),
                })
            }
        };
        let Some(job) = job else {
            return Ok(None);
        };
        if four_bit {
            self.report.four_bit.push(job.tensor.clone());
        }
        match own {
            Some(tensor) => self.report.loaded.push(tensor.name.to_owned()),
            None => {
                let pair = (name.to_owned(), tensor.name.to_owned());
                self.report.tied.push(pair);
                self.shared.insert(tensor.name.to_owned());
            }
        }
        Ok(Some(job))
    }

    /// A parameter without a tensor.
    fn missing(&mut self, name: &str, parameter: &BaseParameter) {
        let parts = match parameter.is_linear() {
            true => bitsandbytes::companions(self.checkpoint, name),
            false => Vec::new(),
        };
        let options = self.options;
        let optional = options.optional.iter().chain(&options.skipped);
        let optional = options.allow_missing || optional.clone().any(|other| means(name, other));
        match parts.is_empty() && optional {
            true => self.report.left.push(name.to_owned()),
            false => self.mismatch.missing.push(name.to_owned()),
        }
        self.companions.extend(parts);
    }

    /// The state of a weight in four bits, if it is one that can be read.
    fn state(&mut self, tensor: &BaseTensor, parameter: &BaseParameter) -> Option<QuantState> {
        let shape = [parameter.shape[1], parameter.shape[0]];
        let is_table = |name: &String| self.tables.contains(name);
        let is_table = self.used.get(tensor.name).is_some_and(is_table);
        let shapes = self.mismatch.shapes.len();
        let state = bitsandbytes::state(self.checkpoint, tensor.name, shape, &mut self.mismatch);
        if is_table && self.mismatch.shapes.len() > shapes {
            let error = PeftError::config(
                "with_resized_vocabulary",
                format!("`{}`, which the files have in four bits", tensor.name),
                "tables that are dense in the files: load the model with its own number of tokens, and resize it then",
            );
            self.broken.get_or_insert(error);
        }
        state.unwrap_or_else(|error| {
            self.broken.get_or_insert(error);
            None
        })
    }

    /// The form that a parameter's values take.
    fn form(
        &self,
        tensor: &str,
        parameter: &BaseParameter,
        chosen: bool,
        state: Option<&QuantState>,
    ) -> Form {
        let options = self.options;
        if state.is_some_and(|state| state.quant_type == QuantType::Nf4) {
            return Form::AlreadyPacked;
        }
        if !parameter.is_linear() {
            return Form::AsStored;
        }
        // In four bits the files have every weight as `[d_out, d_in]`.
        let conv1d = state.is_none() && options.is_conv1d(tensor);
        let config = options.nf4.as_ref().map(|(_, config)| *config);
        let packed = chosen && (state.is_none() || options.requantize_fp4);
        match config.filter(|_| packed) {
            Some(config) if conv1d => Form::PackedTransposed(config),
            Some(config) => Form::Packed(config),
            // The layout in which the parameter is loaded, `[d_in, d_out]` unless its loader transposes, and the file's.
            None if parameter.loader_transposes == conv1d => Form::Transposed,
            None => Form::AsStored,
        }
    }

    /// Checks that a dense tensor can be the values of a parameter.
    fn fit(
        &mut self,
        name: &str,
        parameter: &BaseParameter,
        tensor: &BaseTensor,
        form: Form,
    ) -> Option<Job> {
        let options = self.options;
        let mut expected = parameter.shape.clone();
        let conv1d = parameter.is_linear() && options.is_conv1d(tensor.name);
        if parameter.is_linear() && !conv1d {
            expected.reverse();
        }
        let mut resize = None;
        let mut fits = expected == tensor.shape;
        if !fits {
            let mismatch = Mismatch {
                tensor: tensor.name.to_owned(),
                expected: expected.clone(),
                found: tensor.shape.to_vec(),
            };
            let rows = match (tensor.shape, &expected[..]) {
                ([rows, rest @ ..], [_, others @ ..]) if rest == others && !conv1d => Some(*rows),
                _ => None,
            };
            let rows = rows.filter(|_| self.tables.contains(name));
            if let (Some(rows), Some(new_rows)) = (rows, options.resize) {
                resize = Some((rows, new_rows));
                fits = true;
                self.report.resized.push(Resized {
                    tensor: tensor.name.to_owned(),
                    from: rows,
                    to: expected[0],
                });
            } else if options.ignore_mismatched_sizes {
                self.report.mismatched.push(mismatch);
                return None;
            } else {
                self.mismatch.shapes.push(mismatch);
            }
        }
        let stored = match (elements::from_file(tensor.name, tensor.dtype), tensor.dtype) {
            (Ok(stored), _) => stored,
            (Err(_), Dtype::F64) if options.dtype.is_some() => DType::F64,
            (Err(_), _) => {
                self.mismatch.dtypes.push(DTypeMismatch {
                    tensor: tensor.name.to_owned(),
                    expected: "F32, BF16 or F16".to_owned(),
                    found: tensor.dtype.to_string(),
                });
                return None;
            }
        };
        let dtype = options.dtype.unwrap_or_else(|| stored.into());
        let fits = fit_dtype(parameter, tensor.name, dtype, &mut self.mismatch) && fits;
        // In the order in which the values are packed, the shape is `[d_out, d_in]` too.
        fits.then(|| Job {
            parameter: parameter.clone(),
            tensor: tensor.name.to_owned(),
            shape: expected,
            stored,
            dtype,
            form,
            resize,
            state: None,
        })
    }

    /// What becomes of the tensors without a parameter, of which those are returned that must be equal to another. `embedding` is
    /// the tensor of the input embedding.
    fn rest(&mut self, embedding: Option<BaseTensor>) -> Vec<(String, String)> {
        let (checkpoint, options) = (self.checkpoint, self.options);
        let mut copies = Vec::new();
        for tensor in checkpoint.tensors() {
            let name = tensor.name;
            let has_place = self.used.contains_key(name) || self.shared.contains(name);
            if has_place || self.companions.contains(name) {
                continue;
            }
            let is = |names: &[String]| names.iter().any(|other| means(name, other));
            if is(&options.ignored) || is(&options.skipped) {
                self.report.ignored.push(name.to_owned());
                continue;
            }
            let like =
                |other: &BaseTensor| (tensor.dtype, tensor.shape) == (other.dtype, other.shape);
            let tied = self.lookup.tied_to_tensor(name);
            // A tensor of the embedding's form is an output head that is tied to it, if it is equal.
            let source = tied.or_else(|| embedding.filter(like));
            match source {
                // What several parameters get was used.
                Some(source) if like(&source) => {
                    copies.push((name.to_owned(), source.name.to_owned()));
                }
                Some(source) => {
                    let pair = (name.to_owned(), source.name.to_owned());
                    self.mismatch.unequal.push(pair);
                }
                None if options.allow_unexpected => self.report.ignored.push(name.to_owned()),
                None => self.mismatch.unexpected.push(name.to_owned()),
            }
        }
        copies
    }
}

impl Job {
    /// How many values there are.
    pub fn num_values(&self) -> usize {
        self.shape.iter().product()
    }

    /// How many values of the file are read.
    pub fn num_read(&self) -> usize {
        match self.resize {
            None => self.num_values(),
            Some((rows, _)) => {
                let row: usize = self.shape[1..].iter().product();
                rows.min(self.shape[0]) * row
            }
        }
    }

    /// How many bytes are read.
    pub fn num_bytes(&self) -> usize {
        match &self.state {
            Some(state) => state.packed_len() + state.scale_bytes(),
            None => self.num_read() * self.stored.size(),
        }
    }

    /// The weight in four bits that it is in the file.
    pub fn four_bit<'a>(&'a self, checkpoint: &'a BaseCheckpoint) -> Option<FourBit<'a>> {
        self.state.as_ref().map(|state| FourBit {
            checkpoint,
            weight: &self.tensor,
            state,
        })
    }

    /// The weight in FP4 that is to be restored.
    pub fn fp4<'a>(&'a self, checkpoint: &'a BaseCheckpoint) -> Option<FourBit<'a>> {
        let weight = self.four_bit(checkpoint);
        weight.filter(|weight| weight.state.quant_type == QuantType::Fp4)
    }

    /// The shape in which values of this form are loaded.
    pub fn loaded_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if self.form == Form::Transposed {
            shape.reverse();
        }
        shape
    }
}

impl BaseMismatch {
    /// # Errors
    ///
    /// [`PeftError::BaseMismatch`] unless all fits.
    pub(super) fn check(mut self, checkpoint: &BaseCheckpoint) -> Result<()> {
        self.missing.sort();
        self.unexpected.sort();
        self.shapes.sort_by(|a, b| a.tensor.cmp(&b.tensor));
        self.dtypes.sort_by(|a, b| a.tensor.cmp(&b.tensor));
        self.unequal.sort();
        match self.is_none() {
            true => Ok(()),
            false => Err(PeftError::BaseMismatch {
                path: checkpoint.path().to_owned(),
                report: Box::new(self),
            }),
        }
    }
}

impl BaseOptions {
    /// Whether the weight of this name is that of a `Conv1D`.
    fn is_conv1d(&self, tensor: &str) -> bool {
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        self.conv1d.iter().any(|name| means(module, name))
    }
}

/// The parameters by the files' names of their tensors.
fn by_name(
    parameters: Vec<BaseParameter>,
    options: &BaseOptions,
) -> Result<BTreeMap<String, BaseParameter>> {
    let mut named = BTreeMap::new();
    // Names of modules are asked for once a module.
    let mut modules: HashMap<String, String> = HashMap::new();
    for parameter in parameters {
        let module = match parameter.module() {
            "" => String::new(),
            module => match modules.get(module) {
                Some(path) => path.clone(),
                None => {
                    let path = options.names.to_file(module)?;
                    modules.insert(module.to_owned(), path.clone());
                    path
                }
            },
        };
        let name = options
            .names
            .tensor_of_file_module(&module, &parameter.torch_name)?;
        let path = parameter.path.clone();
        if let Some(other) = named.insert(name.clone(), parameter) {
            return Err(PeftError::config(
                "name map",
                format!("`{}` and `{path}` become `{name}`", other.path),
                "a name for each parameter",
            ));
        }
    }
    Ok(named)
}

/// Checks that the parameter's device has an element type.
fn fit_dtype(
    parameter: &BaseParameter,
    tensor: &str,
    dtype: FloatDType,
    mismatch: &mut BaseMismatch,
) -> bool {
    let fits = parameter.device.supports_dtype(dtype);
    if !fits {
        mismatch.dtypes.push(DTypeMismatch {
            tensor: tensor.to_owned(),
            expected: "a type that the device has, or a cast to one".to_owned(),
            found: format!("{:?}", DType::from(dtype)),
        });
    }
    fits
}
