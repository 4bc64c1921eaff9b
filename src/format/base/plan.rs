//! Which tensor of a checkpoint goes into which parameter of a model, and in what form: all that can be checked before a
//! value is read.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use burn::module::Module;
use burn::tensor::{DType, FloatDType};

use super::bitsandbytes;
use super::checkpoint::{BaseCheckpoint, BaseTensor};
use super::four_bit::FourBit;
use super::model_config;
use super::options::BaseOptions;
use super::quant_state::{QuantState, QuantType};
use super::report::{BaseMismatch, BaseReport, DTypeMismatch};
use crate::format::{Mismatch, elements};
use crate::model::{BaseParameter, base_parameters, choose_linear, is_named};
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
    /// Its shape in the file.
    pub shape: Vec<usize>,
    /// Its element type in the file.
    pub stored: DType,
    /// The element type asked for.
    pub dtype: FloatDType,
    pub form: Form,
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
    /// In NF4, as it is in the file.
    AlreadyPacked,
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
        head: &str,
        options: &BaseOptions,
    ) -> Result<Self> {
        options.check()?;
        let parameters = base_parameters(module)?;
        let targets = match &options.nf4 {
            None => None,
            Some((targets, _)) => Some(choose_linear(&parameters, head, targets)?),
        };
        let chosen: BTreeSet<&str> = targets
            .iter()
            .flat_map(|report| &report.matched)
            .map(|target| target.path.as_str())
            .collect();
        let parameters = by_name(parameters, options)?;
        let (mut report, mut mismatch) = (BaseReport::default(), BaseMismatch::default());
        let mut jobs = Vec::with_capacity(parameters.len());
        let mut companions = BTreeSet::new();
        // What is wrong inside of a tensor; names, shapes and types come first, all of them.
        let mut broken = None;
        for (name, parameter) in &parameters {
            let source = options.source_of(name);
            let Some(tensor) = checkpoint
                .tensor(name)
                .or_else(|| checkpoint.tensor(source?))
            else {
                let parts = match parameter.is_linear {
                    true => bitsandbytes::companions(checkpoint, name),
                    false => Vec::new(),
                };
                match parts.is_empty() && options.is_optional(name) {
                    true => report.left.push(name.clone()),
                    false => mismatch.missing.push(name.clone()),
                }
                companions.extend(parts);
                continue;
            };
            let parts = match parameter.is_linear {
                true => bitsandbytes::companions(checkpoint, tensor.name),
                false => Vec::new(),
            };
            let (four_bit, mut state) = (!parts.is_empty(), None);
            if four_bit {
                let shape = [parameter.shape[1], parameter.shape[0]];
                companions.extend(parts);
                state = bitsandbytes::state(checkpoint, tensor.name, shape, &mut mismatch)
                    .unwrap_or_else(|error| {
                        broken.get_or_insert(error);
                        None
                    });
                if state.is_none() {
                    continue;
                }
            }
            let packed = parameter.is_linear && chosen.contains(parameter.module());
            let config = options.nf4.as_ref().map(|(_, config)| *config);
            let repacked = state.is_none() || options.requantize_fp4;
            let form = match config.filter(|_| packed && repacked) {
                _ if state.is_some_and(|state| state.quant_type == QuantType::Nf4) => {
                    Form::AlreadyPacked
                }
                Some(config) => Form::Packed(config),
                None if parameter.is_linear && !parameter.loader_transposes => Form::Transposed,
                None => Form::AsStored,
            };
            let job = match state {
                None => fit(parameter, &tensor, options.dtype, form, &mut mismatch),
                Some(state) => {
                    let dtype = options.dtype.unwrap_or(state.dtype);
                    let name = tensor.name;
                    fit_dtype(parameter, name, dtype, &mut mismatch).then(|| Job {
                        parameter: parameter.clone(),
                        tensor: name.to_owned(),
                        shape: state.shape.to_vec(),
                        stored: DType::F32,
                        dtype,
                        form,
                        state: Some(state),
                    })
                }
            };
            let Some(job) = job else {
                continue;
            };
            if four_bit {
                report.four_bit.push(job.tensor.clone());
            }
            match tensor.name == name {
                true => report.loaded.push(name.clone()),
                false => report.tied.push((name.clone(), tensor.name.to_owned())),
            }
            jobs.push(job);
        }
        let mut copies = Vec::new();
        for tensor in checkpoint.tensors() {
            let name = tensor.name;
            if parameters.contains_key(name) || companions.contains(name) {
                continue;
            }
            let source = options.source_of(name).and_then(|of| checkpoint.tensor(of));
            if options.is_ignored(name) {
                report.ignored.push(name.to_owned());
            } else if let Some(source) = source {
                let pair = (name.to_owned(), source.name.to_owned());
                match (tensor.dtype, tensor.shape) == (source.dtype, source.shape) {
                    true => copies.push(pair),
                    false => mismatch.unequal.push(pair),
                }
            } else {
                mismatch.unexpected.push(name.to_owned());
            }
        }
        mismatch.fitting = jobs.len();
        if let Some(error) = broken {
            mismatch.fitting += 1;
            mismatch.check(checkpoint)?;
            return Err(error);
        }
        mismatch.check(checkpoint)?;
        let states = jobs.iter().filter_map(|job| job.state.as_ref());
        model_config::check(checkpoint, states)?;
        // As they lie on the disk.
        jobs.sort_by_cached_key(|job| checkpoint.place(&job.tensor));
        report.targets = targets;
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
        let scales = self.jobs.iter().map(|job| match job.form {
            Form::Packed(config) if config.double_quant => {
                size_of::<f32>() * config.block_size.blocks(job.num_values())
            }
            _ => 0,
        });
        scales.max().unwrap_or(0)
    }
}

impl Job {
    /// How many values there are.
    pub fn num_values(&self) -> usize {
        self.shape.iter().product()
    }

    /// How many bytes they have in the file.
    pub fn num_bytes(&self) -> usize {
        match &self.state {
            Some(state) => state.packed_len() + state.scale_bytes(),
            None => self.num_values() * self.stored.size(),
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
    fn source_of(&self, name: &str) -> Option<&str> {
        let mut tied = self.tied.iter();
        let (_, source) = tied.find(|(copy, _)| copy == name)?;
        Some(source)
    }

    fn is_optional(&self, name: &str) -> bool {
        self.optional
            .iter()
            .any(|optional| is_named(name, optional))
    }

    fn is_ignored(&self, name: &str) -> bool {
        self.ignored.iter().any(|ignored| is_named(name, ignored))
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
        let name = match parameter.module() {
            "" => parameter.torch_name.clone(),
            module => {
                let path = match modules.get(module) {
                    Some(path) => path.clone(),
                    None => options.names.to_file(module)?,
                };
                modules.insert(module.to_owned(), path.clone());
                format!("{path}.{}", parameter.torch_name)
            }
        };
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

/// Checks that a tensor can be the values of a parameter.
fn fit(
    parameter: &BaseParameter,
    tensor: &BaseTensor,
    dtype: Option<FloatDType>,
    form: Form,
    mismatch: &mut BaseMismatch,
) -> Option<Job> {
    let mut expected = parameter.shape.clone();
    if parameter.is_linear {
        expected.reverse();
    }
    let fits = expected == tensor.shape;
    if !fits {
        mismatch.shapes.push(Mismatch {
            tensor: tensor.name.to_owned(),
            expected: expected.clone(),
            found: tensor.shape.to_vec(),
        });
    }
    let stored = match elements::from_file(tensor.name, tensor.dtype) {
        Ok(stored) => stored,
        Err(_) => {
            mismatch.dtypes.push(DTypeMismatch {
                tensor: tensor.name.to_owned(),
                expected: "F32, BF16 or F16".to_owned(),
                found: tensor.dtype.to_string(),
            });
            return None;
        }
    };
    let dtype = dtype.unwrap_or_else(|| stored.into());
    let fits = fit_dtype(parameter, tensor.name, dtype, mismatch) && fits;
    fits.then(|| Job {
        parameter: parameter.clone(),
        tensor: tensor.name.to_owned(),
        shape: expected,
        stored,
        dtype,
        form,
        state: None,
    })
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
