//! Writing an adapter's directory: deterministic, atomic, and never over something without being asked.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::TensorData;

use super::adapter::AdapterFile;
use super::atomic;
use super::config::{CONFIG_FILE, MAX_CONFIG_BYTES};
use super::digest;
use super::elements::{Stored, check_finite};
use super::header::Header;
use super::keys::{is_path, parameter_key, parse_key, rows_key, tensor_key};
use super::limits::{FileLimits, MAX_HEADER_BYTES};
use super::read::{WEIGHTS_FILE, check_dtypes};
use super::sites::check_shape;
use super::tied::TiedHead;
use crate::{PeftError, Result};

/// How an adapter is written. The default overwrites nothing.
#[derive(Clone, Debug, Default)]
pub struct WriteOptions {
    /// Whether the two files may replace older ones.
    pub overwrite: bool,
    /// Whether the metadata of the tensors' file holds a SHA-256 of both files, by which reading knows any damage to
    /// either, and files that do not belong together. PEFT passes over it. Without it the bytes are those of PEFT. A
    /// checkpoint has a digest of its own in any case.
    pub digest: bool,
}

/// See [`AdapterFile::write`].
pub(super) fn write(adapter: &AdapterFile, dir: &Path, options: &WriteOptions) -> Result<()> {
    let config = adapter.config.to_json()?;
    let mut weights = weights(adapter, options.digest)?;
    if options.digest {
        digest::seal(&mut weights, &config);
    }
    check_limits(&weights, &config)?;
    // The configuration comes last: a directory without it is no adapter.
    atomic::write_files(
        dir,
        &[(WEIGHTS_FILE, &weights), (CONFIG_FILE, &config)],
        options.overwrite,
    )
}

/// Checks that what is to be written is within the limits of what is read.
///
/// # Errors
///
/// [`PeftError::Malformed`] with the name of the file.
fn check_limits(weights: &[u8], config: &[u8]) -> Result<()> {
    let malformed = |file: &str, reason: String| {
        let path = file.into();
        Err(PeftError::Malformed { path, reason })
    };
    // Of a file that was just made, the length stands before the header.
    let (length, rest) = weights.split_first_chunk().expect("a safetensors file");
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        let reason = format!("a header of {length} bytes: at most {MAX_HEADER_BYTES} are read");
        return malformed(WEIGHTS_FILE, reason);
    }
    if let Err(reason) = Header::parse(&rest[..length as usize], &FileLimits::default()) {
        return malformed(WEIGHTS_FILE, reason);
    }
    if config.len() as u64 > MAX_CONFIG_BYTES {
        let found = config.len();
        let reason = format!(
            "{found} bytes: at most {MAX_CONFIG_BYTES} are read; fewer modules with ranks of their own make it smaller"
        );
        return malformed(CONFIG_FILE, reason);
    }
    Ok(())
}

/// The bytes of the file of tensors, in the order of PEFT's own: by element type, then by name.
fn weights(adapter: &AdapterFile, digest: bool) -> Result<Vec<u8>> {
    let matcher = adapter.config.validate()?;
    let tied = TiedHead::of(adapter);
    let mut tensors = Tensors::default();
    for module in &adapter.tensors {
        let path = &module.path;
        let experts: Vec<_> = adapter.config.experts_at(path).collect();
        let seen = match &experts[..] {
            [only] if module.experts => only,
            _ => path,
        };
        let r = matcher.rank_for(seen, adapter.config.r)?;
        let shape = module.module_shape().of_experts(module.count_experts(r));
        for (key, found, expected) in [
            (
                "use_dora",
                module.magnitude.is_some(),
                adapter.config.use_dora,
            ),
            (
                "lora_bias",
                module.bias.is_some(),
                adapter.config.lora_bias && !module.embedding,
            ),
        ] {
            if found != expected {
                return Err(PeftError::config(
                    key,
                    expected,
                    format!("{found}, as its tensors say, for `{path}`"),
                ));
            }
        }
        let keys: Vec<_> = module
            .iter()
            .map(|(factor, _)| tensor_key(path, factor))
            .collect();
        for (key, (factor, data)) in keys.iter().zip(module.iter()) {
            if parse_key(key) != Some((path, factor)) {
                return Err(bad_path(path, "dotted names, none of them empty"));
            }
            check_shape(key.clone(), data.shape(), shape.shape(factor, r)).map_err(|mismatch| {
                PeftError::Shape {
                    tensor: mismatch.tensor,
                    expected: mismatch.expected,
                    found: mismatch.found,
                }
            })?;
            tensors.add(path, key.clone(), data)?;
        }
        check_dtypes(module, &keys)?;
        let of_experts = module.experts && !experts.is_empty();
        if !of_experts && !matcher.matches(path)? && !tied.has_factors(module) {
            return Err(bad_path(
                path,
                "modules that `target_modules` names, or PEFT would not load them",
            ));
        }
    }
    let adapted = adapter.adapted();
    let adapted = |path: &str| {
        let module = path.rsplit_once('.');
        module.is_some_and(|(module, _)| adapted.contains(module))
    };
    for copy in &adapter.copies {
        if !adapter.config.has_parameter(&copy.path) && !tied.has_copy(copy) {
            return Err(bad_path(
                &copy.path,
                "a parameter that `modules_to_save` or `bias` means, or PEFT would not load it",
            ));
        }
        let key = parameter_key(&copy.path, adapted(&copy.path));
        tensors.add(&copy.path, key, &copy.data)?;
    }
    for rows in &adapter.rows {
        tensors.add(&rows.path, rows_key(&rows.path), &rows.data)?;
    }
    if tensors.tensors.is_empty() {
        return Err(bad_path("", "at least one module"));
    }
    let metadata = digest::metadata(digest);
    safetensors::serialize(tensors.tensors, Some(metadata)).map_err(|error| PeftError::Malformed {
        path: WEIGHTS_FILE.into(),
        reason: error.to_string(),
    })
}

/// What is to be written, by key.
#[derive(Default)]
struct Tensors<'a> {
    tensors: BTreeMap<String, Stored<'a>>,
}

impl<'a> Tensors<'a> {
    /// Adds a tensor that can be read back.
    fn add(&mut self, path: &str, key: String, data: &'a TensorData) -> Result<()> {
        if !is_path(path) {
            return Err(bad_path(path, "dotted names, none of them empty"));
        }
        check_finite(&key, data)?;
        let stored = Stored::new(&key, data)?;
        match self.tensors.insert(key, stored) {
            None => Ok(()),
            Some(_) => Err(bad_path(path, "every module once")),
        }
    }
}

fn bad_path(path: &str, expected: &str) -> PeftError {
    PeftError::config("module path", format!("`{path}`"), expected)
}
