//! Strict reading of an adapter's directory.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use burn::tensor::TensorData;

use super::adapter::{AdapterFile, LoraTensors, ParameterTensor};
use super::config::{AdapterConfig, CONFIG_FILE, MAX_CONFIG_BYTES};
use super::digest::DigestCheck;
use super::disguise::not_json;
use super::elements::check_finite;
use super::file::SafetensorsFile;
use super::keys::Factor;
use super::mlx::{self, MLX_WEIGHTS_FILE};
use super::places;
use super::sites::{self, FoundTensor};
use crate::{PeftError, Result};

/// Name of the file of tensors in an adapter's directory.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What PEFT wrote before it had safetensors: a pickle.
pub(super) const PICKLE_FILE: &str = "adapter_model.bin";
/// Largest file of tensors read unless [`ReadOptions::max_bytes`] says otherwise: rank 64 on all linear layers of
/// a model of 70 billion parameters has 3.3 GB in f32.
pub const MAX_WEIGHTS_BYTES: u64 = 16 << 30;

/// What reading an adapter accepts. The default is the strictest.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// Whether a tensor that is no part of the adapter, has another type or shape than its part, or lacks its partner is an error.
    /// Otherwise such tensors are left out, with the other factors of their module, and reported; and unknown keys of the configuration
    /// are passed over. Default: true. [`LoadOptions::strict`](super::LoadOptions::strict) covers reading too.
    pub strict: bool,
    /// Whether keys of the configuration that are not known are passed over, as PEFT does. A newer PEFT may have given
    /// them a meaning that changes the outputs. Known keys that are not supported are refused all the same.
    pub allow_unknown_keys: bool,
    /// Keys of the configuration that are read as if they were absent. It gets past any key that is refused: the adapter is then
    /// computed without what the key asks for.
    pub ignored_keys: Vec<String>,
    /// The version of PEFT that wrote a file that does not say so, for instance `"0.17.1"`. PEFT names its version since 0.18; what an older
    /// one wrote may mean something else, and where nothing in the file tells, reading refuses it without this option.
    pub assumed_peft_version: Option<String>,
    /// Whether NaN and infinity in a tensor are values like others.
    pub allow_non_finite: bool,
    /// The largest file of tensors that is read, in bytes; [`MAX_WEIGHTS_BYTES`] by default.
    pub max_bytes: u64,
    /// What is done with a digest of the two files, which [`WriteOptions::digest`](super::WriteOptions::digest) writes.
    pub digest: DigestCheck,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            strict: true,
            allow_unknown_keys: false,
            ignored_keys: Vec::new(),
            assumed_peft_version: None,
            allow_non_finite: false,
            max_bytes: MAX_WEIGHTS_BYTES,
            digest: DigestCheck::default(),
        }
    }
}

impl ReadOptions {
    /// The strictest.
    pub fn new() -> Self {
        Self::default()
    }

    /// Leaves out what does not fit, or refuses it.
    pub fn with_strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Passes over keys of the configuration that are not known.
    pub fn with_allow_unknown_keys(mut self, allow: bool) -> Self {
        self.allow_unknown_keys = allow;
        self
    }

    /// Reads these keys of the configuration as if they were absent.
    pub fn with_ignored_keys<S: Into<String>>(mut self, keys: impl IntoIterator<Item = S>) -> Self {
        self.ignored_keys.extend(keys.into_iter().map(Into::into));
        self
    }

    /// Says which version of PEFT wrote a file that does not say so.
    pub fn with_assumed_peft_version(mut self, version: impl Into<String>) -> Self {
        self.assumed_peft_version = Some(version.into());
        self
    }

    /// Takes NaN and infinity in a tensor for values like others.
    pub fn with_allow_non_finite(mut self, allow: bool) -> Self {
        self.allow_non_finite = allow;
        self
    }

    /// Sets the largest file of tensors that is read, in bytes.
    pub fn with_max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// Sets how a digest of the two files is checked.
    pub fn with_digest(mut self, digest: DigestCheck) -> Self {
        self.digest = digest;
        self
    }
}

/// See [`AdapterFile::read`].
pub(super) fn read(dir: &Path, options: &ReadOptions) -> Result<AdapterFile> {
    let mut weights = dir.join(WEIGHTS_FILE);
    let mlx_weights = dir.join(MLX_WEIGHTS_FILE);
    let config_file = dir.join(CONFIG_FILE);
    let of_mlx = !weights.exists() && mlx_weights.exists();
    if !config_file.exists() {
        places::explain_absence(dir)?;
    }
    let json = read_bounded(&config_file, MAX_CONFIG_BYTES)?;
    let in_config = |error: PeftError| not_json(&config_file, &json, error);
    let (mut file, config) = if of_mlx {
        weights = mlx_weights;
        let file = SafetensorsFile::open(&weights, options.max_bytes)?;
        let config = mlx::parse(&json, file.shapes(), options).map_err(in_config)?;
        (file, config)
    } else {
        let config = AdapterConfig::from_json(&json, options).map_err(in_config)?;
        if !weights.exists() {
            places::explain_no_weights(dir)?;
        }
        let file = SafetensorsFile::open(&weights, options.max_bytes)?;
        (file, config)
    };
    // Whoever saves takes the configuration away before the tensors and puts it back after them. Open files stay what
    // they were.
    if read_bounded(&config_file, MAX_CONFIG_BYTES)? != json {
        return Err(PeftError::Malformed {
            path: config_file,
            reason: "changed while the adapter was read".to_owned(),
        });
    }
    file.check_digest(&json, options.digest)?;
    read_tensors(file, &weights, config, options)
}

/// The adapter of this configuration whose tensors are in `file`, at `weights`.
fn read_tensors(
    file: SafetensorsFile,
    weights: &Path,
    mut config: AdapterConfig,
    options: &ReadOptions,
) -> Result<AdapterFile> {
    let mut found = sites::find(&file, &mut config).map_err(|error| error.in_file(weights))?;
    if options.strict && !found.report.is_complete() {
        found.report.unexpected.append(&mut found.doubtful);
        found.report.unexpected.sort();
        let error = PeftError::Incomplete {
            report: Box::new(found.report),
        };
        return Err(error.in_file(weights));
    }
    let mut skipped = found.report;
    skipped.loaded.clear();
    let read = |tensor: &FoundTensor| {
        let data = file.read(&tensor.key)?;
        if !options.allow_non_finite {
            check_finite(&tensor.key, &data).map_err(|error| error.in_file(weights))?;
        }
        Ok::<_, PeftError>(tensor.in_place(data))
    };
    let mut tensors = Vec::with_capacity(found.modules.len());
    'modules: for found in found.modules {
        let all: Vec<_> = found
            .factors
            .iter()
            .map(|(_, tensor)| tensor.key.clone())
            .collect();
        let mut keys = Vec::with_capacity(all.len());
        let mut module = LoraTensors::new(found.path, empty(), empty());
        module.experts = found.experts;
        for (factor, tensor) in found.factors {
            let data = match read(&tensor) {
                Err(error) if !options.strict && is_of_type(&error) => {
                    skipped.note_type(&error);
                    skipped.leave_out(all);
                    continue 'modules;
                }
                data => data?,
            };
            match factor {
                Factor::A => module.a = data,
                Factor::B => module.b = data,
                Factor::EmbeddingA => (module.a, module.embedding) = (data, true),
                Factor::EmbeddingB => module.b = data,
                Factor::Bias => module.bias = Some(data),
                Factor::Magnitude => module.magnitude = Some(data),
            }
            keys.push(tensor.key);
        }
        match check_dtypes(&module, &keys) {
            Err(error) if !options.strict => {
                skipped.note_type(&error);
                skipped.leave_out(all);
            }
            checked => {
                checked.map_err(|error| error.in_file(weights))?;
                tensors.push(module);
            }
        }
    }
    let mut values = |tensors: Vec<(String, FoundTensor)>| {
        let mut values = Vec::with_capacity(tensors.len());
        for (path, tensor) in tensors {
            match read(&tensor) {
                Err(error) if !options.strict && is_of_type(&error) => skipped.note_type(&error),
                data => values.push(ParameterTensor { path, data: data? }),
            }
        }
        Ok::<_, PeftError>(values)
    };
    Ok(AdapterFile {
        copies: values(found.parameters)?,
        rows: values(found.rows)?,
        base_values: values(found.bases)?,
        config,
        tensors,
        skipped,
    })
}

/// Whether the error is that a tensor has a type that no adapter has.
fn is_of_type(error: &PeftError) -> bool {
    match error {
        PeftError::InFile { source, .. } => is_of_type(source),
        error => matches!(error, PeftError::DType { .. }),
    }
}

/// In the place of a factor that is about to be read.
fn empty() -> TensorData {
    TensorData::new(Vec::<f32>::new(), [0, 0])
}

/// All tensors of a module, here with their keys, are of the type of its factor A.
pub(super) fn check_dtypes(module: &LoraTensors, keys: &[String]) -> Result<()> {
    let expected = module.a.dtype();
    let mut tensors = keys.iter().zip(module.iter());
    match tensors.find(|(_, (_, data))| data.dtype() != expected) {
        None => Ok(()),
        Some((key, (_, data))) => Err(PeftError::DType {
            tensor: key.clone(),
            expected: format!("{expected:?}, which its factor A has"),
            found: format!("{:?}", data.dtype()),
        }),
    }
}

/// Opens a regular file of at most `max_bytes` bytes and returns it with its size.
///
/// Asked for before opening, so that a pipe does not make the caller wait for a writer that never comes.
pub(super) fn open_regular(path: &Path, max_bytes: u64) -> Result<(File, u64)> {
    let check = |metadata: std::fs::Metadata| {
        let reason = match metadata.len() {
            _ if !metadata.is_file() => "not a regular file".to_owned(),
            size if size > max_bytes => format!("{size} bytes: at most {max_bytes} are read"),
            size => return Ok(size),
        };
        Err(PeftError::Malformed {
            path: path.to_owned(),
            reason,
        })
    };
    check(std::fs::metadata(path).map_err(PeftError::io(path))?)?;
    let file = File::open(path).map_err(PeftError::io(path))?;
    let size = check(file.metadata().map_err(PeftError::io(path))?)?;
    Ok((file, size))
}

/// The content of a regular file of at most `max_bytes` bytes.
pub(crate) fn read_bounded(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let (file, size) = open_regular(path, max_bytes)?;
    let mut bytes = Vec::with_capacity(size as usize);
    // The file may have grown since.
    file.take(max_bytes)
        .read_to_end(&mut bytes)
        .map_err(PeftError::io(path))?;
    Ok(bytes)
}
