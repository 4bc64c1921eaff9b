//! Strict reading of an adapter's directory.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use burn::tensor::TensorData;

use super::adapter::{AdapterFile, LoraTensors, ParameterTensor};
use super::config::{AdapterConfig, CONFIG_FILE, MAX_CONFIG_BYTES};
use super::digest::DigestCheck;
use super::disguise::not_json;
use super::elements::{check_finite, transposed};
use super::file::SafetensorsFile;
use super::keys::{Factor, read_key};
use super::mlx::{self, MLX_WEIGHTS_FILE};
use super::sites::{self, FoundTensor};
use crate::{PeftError, Result};

/// Name of the file of tensors in an adapter's directory.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What PEFT wrote before it had safetensors: a pickle.
const PICKLE_FILE: &str = "adapter_model.bin";
/// Largest file of tensors read unless [`ReadOptions::max_bytes`] says otherwise: rank 64 on all linear layers of
/// a model of 70 billion parameters has 3.3 GB in f32.
pub const MAX_WEIGHTS_BYTES: u64 = 16 << 30;

/// What reading an adapter accepts. The default is the strictest.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// Whether keys of the configuration that are not known are passed over, as PEFT does. A newer PEFT may have given
    /// them a meaning that changes the outputs. Known keys that are not supported are refused all the same.
    pub allow_unknown_keys: bool,
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
            allow_unknown_keys: false,
            allow_non_finite: false,
            max_bytes: MAX_WEIGHTS_BYTES,
            digest: DigestCheck::default(),
        }
    }
}

/// See [`AdapterFile::read`].
pub(super) fn read(dir: &Path, options: &ReadOptions) -> Result<AdapterFile> {
    let mut weights = dir.join(WEIGHTS_FILE);
    let mlx_weights = dir.join(MLX_WEIGHTS_FILE);
    let config_file = dir.join(CONFIG_FILE);
    let of_mlx = !weights.exists() && mlx_weights.exists();
    let json = read_bounded(&config_file, MAX_CONFIG_BYTES)?;
    let in_config = |error: PeftError| not_json(&config_file, &json, error);
    let (mut file, config) = if of_mlx {
        weights = mlx_weights;
        let file = SafetensorsFile::open(&weights, options.max_bytes)?;
        let keys = file.shapes().filter_map(|(key, _)| read_key(key));
        let mut paths: Vec<_> = keys.map(|key| key.path).collect();
        paths.sort();
        paths.dedup();
        let config = mlx::parse(&json, paths).map_err(in_config)?;
        (file, config)
    } else {
        let config = AdapterConfig::from_json(&json, options).map_err(in_config)?;
        let pickle = dir.join(PICKLE_FILE);
        if !weights.exists() && pickle.exists() {
            return Err(PeftError::Malformed {
                path: pickle,
                reason: format!(
                    "a pickle, which is never read; `save_pretrained` of PEFT writes {WEIGHTS_FILE}"
                ),
            });
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
    config: AdapterConfig,
    options: &ReadOptions,
) -> Result<AdapterFile> {
    let found = sites::find(&file, &config).map_err(|error| error.in_file(weights))?;
    let read = |tensor: &FoundTensor| {
        let data = file.read(&tensor.key)?;
        if !options.allow_non_finite {
            check_finite(&tensor.key, &data).map_err(|error| error.in_file(weights))?;
        }
        Ok(match tensor.transposed {
            true => transposed(&data),
            false => data,
        })
    };
    let mut tensors = Vec::with_capacity(found.modules.len());
    for found in found.modules {
        let mut keys = Vec::with_capacity(found.factors.len());
        let mut module = LoraTensors::new(found.path, empty(), empty());
        module.experts = found.experts;
        for (factor, tensor) in found.factors {
            let data = read(&tensor)?;
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
        check_dtypes(&module, &keys).map_err(|error| error.in_file(weights))?;
        tensors.push(module);
    }
    let values = |tensors: Vec<(String, FoundTensor)>| {
        let tensors = tensors.iter();
        let read = tensors.map(|(path, tensor)| {
            let (path, data) = (path.clone(), read(tensor)?);
            Ok(ParameterTensor { path, data })
        });
        read.collect::<Result<Vec<_>>>()
    };
    Ok(AdapterFile {
        copies: values(found.parameters)?,
        rows: values(found.rows)?,
        config,
        tensors,
    })
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
