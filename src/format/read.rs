//! Strict reading of an adapter's directory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::adapter::{AdapterFile, LoraTensors};
use super::config::{AdapterConfig, CONFIG_FILE, MAX_CONFIG_BYTES};
use super::digest::DigestCheck;
use super::elements::{check_finite, transposed};
use super::file::SafetensorsFile;
use super::keys::{Factor, ReadKey, read_key, tensor_key};
use super::mlx::{self, MLX_WEIGHTS_FILE};
use super::report::{LoadReport, Mismatch};
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
    let in_config = |error: PeftError| error.in_file(&config_file);
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
    mut file: SafetensorsFile,
    weights: &Path,
    config: AdapterConfig,
    options: &ReadOptions,
) -> Result<AdapterFile> {
    let sites = sites(&file, &config).map_err(|error| error.in_file(weights))?;
    let mut tensors = Vec::with_capacity(sites.len());
    for (path, keys) in sites {
        let read = |key: &String| {
            let data = file.read(key)?;
            if !options.allow_non_finite {
                check_finite(key, &data).map_err(|error| error.in_file(weights))?;
            }
            match read_key(key) {
                Some(key) if key.transposed => Ok(transposed(&data)),
                _ => Ok(data),
            }
        };
        let factors = keys.iter().map(read);
        let mut factors = factors.collect::<Result<Vec<_>>>()?.into_iter();
        let module = LoraTensors {
            a: factors.next().expect("every module has a factor A"),
            b: factors.next().expect("every module has a factor B"),
            magnitude: factors.next(),
            path,
        };
        check_dtypes(&module, &keys).map_err(|error| error.in_file(weights))?;
        tensors.push(module);
    }
    Ok(AdapterFile { config, tensors })
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

/// The module paths that have all factors, with their keys, by names and shapes alone; anything else in the file is an
/// error.
fn sites(file: &SafetensorsFile, config: &AdapterConfig) -> Result<Vec<(String, Vec<String>)>> {
    let matcher = config.validate()?;
    let mut report = LoadReport::default();
    let factors = Factor::of(config.use_dora);
    /// Key of a tensor, and its shape in PyTorch's layout.
    type Found<'a> = Option<(&'a str, Vec<usize>)>;
    let mut sites: BTreeMap<String, [Found; 3]> = BTreeMap::new();
    for (key, shape) in file.shapes() {
        // Two keys may mean one factor: of two adapters, say. Only one of them has a place.
        match read_key(key).filter(|key| factors.contains(&key.factor)) {
            Some(ReadKey {
                path,
                factor,
                transposed,
            }) => match &mut sites.entry(path).or_default()[factor as usize] {
                place @ None => {
                    let mut shape = shape.to_vec();
                    if transposed {
                        shape.reverse();
                    }
                    *place = Some((key, shape));
                }
                Some(_) => report.unexpected.push(key.to_owned()),
            },
            None => report.unexpected.push(key.to_owned()),
        }
    }
    let mut found = Vec::with_capacity(sites.len());
    for (path, tensors) in sites {
        let r = matcher.rank_for(&path, config.r)?;
        let [a, b, _] = tensors
            .each_ref()
            .map(|tensor| tensor.as_ref().map(|(_, shape)| shape.as_slice()));
        let dims = dims(a, b);
        let mut keys = Vec::with_capacity(factors.len());
        for (&factor, tensor) in factors.iter().zip(tensors) {
            match tensor {
                None => report.missing.push(tensor_key(&path, factor)),
                Some((key, shape)) => {
                    keys.push(key.to_owned());
                    match check_shape(key.to_owned(), factor, &shape, r, dims) {
                        Ok(key) => report.loaded.push(key),
                        Err(mismatch) => report.mismatched.push(mismatch),
                    }
                }
            }
        }
        found.push((path, keys));
    }
    report.strict().map(|_| found)
}

/// `[d_in, d_out]` of a module as its factors have them, which a file alone cannot tell otherwise; at least 1.
pub(super) fn dims(a: Option<&[usize]>, b: Option<&[usize]>) -> [usize; 2] {
    let side = |shape: Option<&[usize]>, axis: usize| {
        let side = shape.and_then(|shape| shape.get(axis));
        side.copied().unwrap_or(1).max(1)
    };
    [side(a, 1), side(b, 0)]
}

/// A factor has rank `r` and the sides of its module.
pub(super) fn check_shape(
    tensor: String,
    factor: Factor,
    shape: &[usize],
    r: usize,
    dims: [usize; 2],
) -> Result<String, Mismatch> {
    let expected = factor.shape(r, dims);
    if shape == expected {
        return Ok(tensor);
    }
    Err(Mismatch {
        tensor,
        expected,
        found: shape.to_vec(),
    })
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
