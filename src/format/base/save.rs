//! Writing the base of a model as a directory that transformers reads, packed weights in bitsandbytes' format.
//!
//! What is packed is written as it is, dense parameters in their own types, in PyTorch's layout. Each tensor goes from its
//! device to the file in pieces, so that no second copy of it is ever in memory.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{FloatDType, Int, Tensor};
use safetensors::Dtype;

use super::BASE_INDEX_FILE;
use super::bitsandbytes::Part;
use super::lookup::means;
use super::model_config::{Quantization, old_config, rewrite};
use super::quant_state::{QuantState, QuantType};
use super::shards::{Entry, Shard, check_index, check_limits, index, is_of_model, split};
use crate::format::atomic::{Content, Scratch, write_contents};
use crate::format::stored::host;
use crate::format::{NameMap, elements};
use crate::model::{PeftModel, StoredParameter, StoredValue};
use crate::nf4::codebook::CODEBOOK;
use crate::nf4::double::DYNAMIC_MAP;
use crate::nf4::{Nf4Scales, Nf4Weight};
use crate::{PeftError, Result};

/// Name of a model's configuration.
pub const MODEL_CONFIG_FILE: &str = "config.json";

/// Bytes of a tensor that are read from its device at a time.
const PIECE: usize = 4 << 20;

/// How the base of a model is saved. The default overwrites nothing and keeps the model's own paths.
#[derive(Clone, Debug)]
pub struct SaveBaseOptions {
    /// Whether the files may replace older ones. Files of another model that would be left beside these, such as those of
    /// one in more files, are then removed.
    pub overwrite: bool,
    /// How the files call the model's modules.
    pub names: NameMap,
    /// The linear layers that are `Conv1D` in the files, as for [`BaseOptions::with_conv1d`](super::BaseOptions::with_conv1d): dense
    /// weights are written as `[d_in, d_out]`. Default: none.
    pub conv1d: Vec<String>,
    /// The text of the base's `config.json`. It is written with the `quantization_config` of the packed weights, in place of
    /// one that it has, and with the `dtype` of the dense parameters, if they all have one. Without it a `config.json` that is
    /// in the directory is taken for it if `overwrite` is true, since what it says of the weights is no longer so; otherwise
    /// none is written. transformers needs one, this crate does not.
    pub config: Option<String>,
    /// In what bitsandbytes is to compute: f32, bf16 or f16. Default: f32, as in transformers.
    pub compute_dtype: FloatDType,
    /// Most bytes of tensors in one file, unless a tensor has more alone. Default: 50 GB, as in transformers.
    pub max_shard_bytes: u64,
    /// Whether a model that has adapters is saved without them. By default it is an error.
    pub ignore_adapters: bool,
}

impl Default for SaveBaseOptions {
    fn default() -> Self {
        Self {
            overwrite: false,
            names: NameMap::default(),
            conv1d: Vec::new(),
            config: None,
            compute_dtype: FloatDType::F32,
            max_shard_bytes: 50_000_000_000,
            ignore_adapters: false,
        }
    }
}

impl SaveBaseOptions {
    /// The default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets whether older files may be replaced.
    pub fn with_overwrite(mut self, overwrite: bool) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Says how the files call the model's modules.
    pub fn with_names(mut self, names: NameMap) -> Self {
        self.names = names;
        self
    }

    /// Says which linear layers are `Conv1D` in the files.
    pub fn with_conv1d<S: Into<String>>(mut self, modules: impl IntoIterator<Item = S>) -> Self {
        self.conv1d.extend(modules.into_iter().map(Into::into));
        self
    }

    /// Sets the text of the base's `config.json`.
    pub fn with_config(mut self, config: impl Into<Option<String>>) -> Self {
        self.config = config.into();
        self
    }

    /// Sets in what bitsandbytes is to compute.
    pub fn with_compute_dtype(mut self, dtype: FloatDType) -> Self {
        self.compute_dtype = dtype;
        self
    }

    /// Sets the most bytes of tensors in one file.
    pub fn with_max_shard_bytes(mut self, bytes: u64) -> Self {
        self.max_shard_bytes = bytes;
        self
    }

    /// Sets whether a model that has adapters is saved without them.
    pub fn with_ignore_adapters(mut self, ignore: bool) -> Self {
        self.ignore_adapters = ignore;
        self
    }
}

/// What [`save_base`](PeftModel::save_base) has written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SaveBaseReport {
    /// The files, those of tensors first.
    pub files: Vec<PathBuf>,
    /// How many tensors there are, those of which a packed weight is made each by itself.
    pub tensors: usize,
    /// How many weights are packed.
    pub packed: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
}

impl<M: Module> PeftModel<M> {
    /// Writes the base into `dir` as transformers' `save_pretrained` would: `model.safetensors`, or several files and
    /// `model.safetensors.index.json`, and `config.json`. [`load_base`](PeftModel::load_base) reads it again, and so does
    /// `AutoModelForCausalLM.from_pretrained` with bitsandbytes.
    ///
    /// Weights in NF4 are written as bitsandbytes stores them, byte for byte as they are; everything else dense, in its own
    /// type. Every parameter is written under its own name, also where several share an id: they may differ in value. Files
    /// appear whole or not at all, as those of [adapters](PeftModel::save_adapter) do, and the same base gives the same bytes.
    ///
    /// What was not yet initialised is, and stays so.
    ///
    /// # Memory
    ///
    /// Two pieces of 4 MiB, or the scales of one weight twice where those are larger. No second copy of the model, or of a tensor.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for a model with adapters, unless they are to be ignored; for a module that the map cannot name,
    /// or names as another; for another compute type than f32, bf16 and f16. [`PeftError::Json`] for a configuration that is no
    /// object, also for one in the directory; [`PeftError::DType`] for a parameter that is neither of these types; [`PeftError::ForeignReparameterization`];
    /// [`PeftError::DeviceRead`]; [`PeftError::Malformed`] for what [`BaseCheckpoint::open`](crate::format::BaseCheckpoint::open)
    /// would refuse: no tensor at all, more files than [`MAX_SHARDS`](crate::format::MAX_SHARDS), more tensors in one than
    /// [`MAX_TENSORS`](crate::format::MAX_TENSORS), or in all than [`MAX_INDEX_TENSORS`](crate::format::MAX_INDEX_TENSORS);
    /// [`PeftError::Exists`] and [`PeftError::Io`]. Nothing has changed on disk then.
    pub fn save_base(
        &self,
        dir: impl AsRef<Path>,
        options: &SaveBaseOptions,
    ) -> Result<SaveBaseReport> {
        let dir = dir.as_ref();
        let adapters: Vec<_> = self.adapters().collect();
        if !adapters.is_empty() && !options.ignore_adapters {
            return Err(PeftError::config(
                "ignore_adapters",
                "false",
                format!(
                    "true for a model with adapters ({adapters:?}), of which the base alone is saved"
                ),
            ));
        }
        if !matches!(
            options.compute_dtype,
            FloatDType::F32 | FloatDType::BF16 | FloatDType::F16
        ) {
            return Err(PeftError::config(
                "compute_dtype",
                format!("{:?}", options.compute_dtype),
                "F32, BF16 or F16",
            ));
        }
        let old = match options.config {
            None if options.overwrite => old_config(dir)?,
            _ => None,
        };
        let head = self.head_path();
        let base = self.stored_base()?;
        let plan = Plan::new(base, head.as_deref(), old.as_deref(), options)?;
        let shards = split(plan.entries(), options.max_shard_bytes);
        check_limits(dir, &shards)?;
        let headers = shards.iter().map(Shard::header);
        let headers: Vec<_> = headers.collect::<Result<_>>()?;
        let index = (shards.len() > 1).then(|| index(&shards, plan.total_parameters));
        if let Some(index) = &index {
            check_index(dir, index.len())?;
        }
        let mut files = Vec::with_capacity(shards.len() + 2);
        for (shard, header) in shards.iter().zip(headers) {
            let plan = &plan;
            let write = move |scratch: &mut Scratch| {
                scratch.write(&header)?;
                for entry in &shard.entries {
                    plan.tensors[&entry.name].1.write(&entry.name, scratch)?;
                }
                Ok(())
            };
            files.push((shard.file.as_str(), Content::Stream(Box::new(write))));
        }
        if let Some(index) = &index {
            files.push((BASE_INDEX_FILE, Content::Bytes(index.as_bytes())));
        }
        // The configuration comes last: a directory without it is no model to transformers.
        if let Some(config) = &plan.config {
            files.push((MODEL_CONFIG_FILE, Content::Bytes(config.as_bytes())));
        }
        let entries = shards.iter().flat_map(|shard| &shard.entries);
        let report = SaveBaseReport {
            files: files.iter().map(|(name, _)| dir.join(name)).collect(),
            tensors: plan.tensors.len(),
            packed: plan.packed,
            bytes: entries.map(|entry| entry.num_bytes() as u64).sum(),
        };
        write_contents(dir, files, Some(&is_of_model), options.overwrite)?;
        Ok(report)
    }
}

/// Where the bytes of a tensor come from.
enum Source {
    /// A dense parameter, and whether a file holds its transpose.
    Dense(Tensor<2>, bool),
    /// So many bytes of packed codes.
    Codes(Tensor<1, Int>, usize),
    /// First-level scales.
    Absmax(Nf4Weight),
    /// Second-level scales.
    NestedAbsmax(Nf4Weight),
    /// Few bytes.
    Bytes(Vec<u8>),
}

/// What is written.
#[derive(Default)]
struct Plan {
    /// By name.
    tensors: BTreeMap<String, (Entry, Source)>,
    config: Option<String>,
    /// As transformers counts them: those of a packed weight as if it were dense.
    total_parameters: usize,
    packed: usize,
}

impl Plan {
    fn new(
        parameters: Vec<StoredParameter>,
        head: Option<&str>,
        old_config: Option<&str>,
        options: &SaveBaseOptions,
    ) -> Result<Self> {
        let mut plan = Self::default();
        let (mut packed, mut dense) = (Vec::new(), Vec::new());
        let (mut double_quant, mut dtypes) = (false, HashSet::new());
        for StoredParameter { parameter, value } in parameters {
            let module = match parameter.module() {
                "" => String::new(),
                module => options.names.to_file(module)?,
            };
            let names = &options.names;
            let name = names.tensor_of_file_module(&module, &parameter.torch_name)?;
            let is_head = head == Some(parameter.module());
            plan.total_parameters += parameter.shape.iter().product::<usize>();
            match value {
                StoredValue::Nf4(nf4, dtype) => {
                    double_quant |= nf4.double_quant();
                    plan.add_packed(&name, &nf4, dtype)?;
                    packed.push((module, is_head));
                }
                StoredValue::Dense(tensor) => {
                    let mut shape = parameter.shape.clone();
                    let conv1d = options.conv1d.iter().any(|name| means(&module, name));
                    let transposed = parameter.is_transposed() && !conv1d;
                    if transposed {
                        shape.reverse();
                    }
                    if parameter.is_transposed() {
                        dense.push((module, is_head));
                    }
                    let dtype = elements::to_file(&name, tensor.dtype())?;
                    dtypes.insert(FloatDType::from(tensor.dtype()));
                    let source = Source::Dense(tensor, transposed);
                    plan.add(name, dtype, shape, source)?;
                }
            }
        }
        plan.packed = packed.len();
        let quantization = (plan.packed > 0).then(|| Quantization {
            compute_dtype: options.compute_dtype,
            double_quant,
            skip_modules: skip_modules(&packed, dense),
        });
        let mut dtypes = dtypes.into_iter();
        let dtype = dtypes.next().filter(|_| dtypes.next().is_none());
        let config = options.config.as_deref().or(old_config);
        plan.config = config
            .map(|config| rewrite(config, quantization.as_ref(), dtype))
            .transpose()?;
        Ok(plan)
    }

    fn entries(&self) -> Vec<Entry> {
        let entries = self.tensors.values();
        entries.map(|(entry, _)| entry.clone()).collect()
    }

    /// Adds the tensors of a packed weight, which is restored to `dtype`.
    fn add_packed(&mut self, name: &str, nf4: &Nf4Weight, dtype: FloatDType) -> Result<()> {
        let state = QuantState {
            quant_type: QuantType::Nf4,
            block_size: nf4.block_size(),
            dtype,
            shape: nf4.shape(),
            nested_offset: nf4.nested_offset(),
        };
        for part in Part::of(&state) {
            let (part_dtype, mut shape) = part.expected(&state);
            let source = match part {
                Part::Codes => Source::Codes(nf4.code_words(), state.packed_len()),
                Part::Absmax => Source::Absmax(nf4.clone()),
                Part::NestedAbsmax => Source::NestedAbsmax(nf4.clone()),
                Part::QuantMap => Source::Bytes(little_endian(&CODEBOOK)),
                Part::NestedQuantMap => Source::Bytes(little_endian(&DYNAMIC_MAP)),
                Part::State(_) => {
                    let json = state.to_json().into_bytes();
                    shape = vec![json.len()];
                    Source::Bytes(json)
                }
            };
            self.add(part.tensor(name), part_dtype, shape, source)?;
        }
        Ok(())
    }

    fn add(&mut self, name: String, dtype: Dtype, shape: Vec<usize>, source: Source) -> Result<()> {
        let entry = Entry {
            name: name.clone(),
            dtype,
            shape,
        };
        match self.tensors.insert(name.clone(), (entry, source)) {
            None => Ok(()),
            Some(_) => Err(PeftError::config(
                "name map",
                format!("two parameters called `{name}`"),
                "every parameter once",
            )),
        }
    }
}

/// The modules that transformers must be told to leave dense. By itself it leaves the head, and no other linear layer.
fn skip_modules(packed: &[(String, bool)], dense: Vec<(String, bool)>) -> Option<Vec<String>> {
    let head_is_packed = packed.iter().any(|(_, is_head)| *is_head);
    if !head_is_packed && dense.iter().all(|(_, is_head)| *is_head) {
        return None;
    }
    let mut skipped: Vec<String> = dense.into_iter().map(|(module, _)| module).collect();
    for module in &mut skipped {
        // A name also means all that end in it; an expression means what begins with it.
        if packed.iter().any(|(packed, _)| packed.ends_with(&*module)) {
            *module = format!("{}$", regex::escape(module));
        }
    }
    Some(skipped)
}

impl Source {
    /// Writes the tensor `name`.
    fn write(&self, name: &str, scratch: &mut Scratch) -> Result<()> {
        match self {
            Self::Bytes(bytes) => scratch.write(bytes),
            Self::Absmax(nf4) => match nf4.scales_to_data() {
                Nf4Scales::Plain(absmax) => scratch.write(&little_endian(&absmax)),
                Nf4Scales::Double(double) => scratch.write(double.codes()),
            },
            Self::NestedAbsmax(nf4) => match nf4.scales_to_data() {
                Nf4Scales::Plain(_) => Ok(()),
                Nf4Scales::Double(double) => scratch.write(&little_endian(double.absmax())),
            },
            Self::Codes(words, bytes) => write_codes(name, words, *bytes, scratch),
            Self::Dense(tensor, transposed) => write_dense(name, tensor, *transposed, scratch),
        }
    }
}

fn write_codes(
    name: &str,
    words: &Tensor<1, Int>,
    bytes: usize,
    scratch: &mut Scratch,
) -> Result<()> {
    const WORDS: usize = PIECE / 4;
    for first in (0..bytes.div_ceil(4)).step_by(WORDS) {
        let count = WORDS.min(bytes.div_ceil(4) - first);
        let piece = words.clone().narrow(0, first, count).try_into_data();
        let piece = piece.map_err(|error| PeftError::DeviceRead {
            tensor: name.to_owned(),
            reason: error.to_string(),
        })?;
        let mut piece: Vec<u8> = piece
            .iter::<i32>()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        piece.truncate(bytes - 4 * first);
        scratch.write(&piece)?;
    }
    Ok(())
}

fn write_dense(
    name: &str,
    tensor: &Tensor<2>,
    transposed: bool,
    scratch: &mut Scratch,
) -> Result<()> {
    let [mut rows, mut columns] = tensor.dims();
    if transposed {
        (rows, columns) = (columns, rows);
    }
    let at_once = (PIECE / (columns * tensor.dtype().size()).max(1)).max(1);
    for first in (0..rows).step_by(at_once) {
        let last = rows.min(first + at_once);
        let piece = match transposed {
            true => {
                let columns = tensor.clone().slice([0..columns, first..last]);
                columns.transpose()
            }
            false => tensor.clone().slice([first..last, 0..columns]),
        };
        let piece = host(piece, name)?;
        let dtype = piece.dtype();
        let (mut bytes, ..) = piece.into_parts();
        elements::swap_to_host(&mut bytes, dtype);
        scratch.write(&bytes)?;
    }
    Ok(())
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes());
    bytes.collect()
}
