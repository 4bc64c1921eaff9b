//! Writing an adapter's directory: deterministic, atomic, and never over something without being asked.

use std::collections::BTreeMap;
use std::path::Path;

use super::adapter::AdapterFile;
use super::atomic;
use super::config::CONFIG_FILE;
use super::digest;
use super::elements::{Stored, check_finite};
use super::keys::{parse_key, tensor_key};
use super::read::{WEIGHTS_FILE, check_dtypes, check_shape, dims};
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
    // The configuration comes last: a directory without it is no adapter.
    atomic::write_files(
        dir,
        &[(WEIGHTS_FILE, &weights), (CONFIG_FILE, &config)],
        options.overwrite,
    )
}

/// The bytes of the file of tensors, in the order of PEFT's own: by element type, then by name.
fn weights(adapter: &AdapterFile, digest: bool) -> Result<Vec<u8>> {
    let matcher = adapter.config.validate()?;
    let mut tensors = BTreeMap::new();
    for module in &adapter.tensors {
        let path = &module.path;
        let r = matcher.rank_for(path, adapter.config.r)?;
        let dims = dims(Some(module.a.shape()), Some(module.b.shape()));
        if module.magnitude.is_some() != adapter.config.use_dora {
            return Err(PeftError::Config {
                name: "use_dora".into(),
                value: adapter.config.use_dora.to_string(),
                expected: format!("true for a module with a magnitude, else false: `{path}`"),
            });
        }
        let keys: Vec<_> = module
            .iter()
            .map(|(factor, _)| tensor_key(path, factor))
            .collect();
        for (key, (factor, data)) in keys.iter().zip(module.iter()) {
            if parse_key(key) != Some((path, factor)) {
                return Err(bad_path(path, "dotted names, none of them empty"));
            }
            check_shape(key.clone(), factor, data.shape(), r, dims).map_err(|mismatch| {
                PeftError::Shape {
                    tensor: mismatch.tensor,
                    expected: mismatch.expected,
                    found: mismatch.found,
                }
            })?;
            check_finite(key, data)?;
            let stored = Stored::new(key, data)?;
            if tensors.insert(key.clone(), stored).is_some() {
                return Err(bad_path(path, "every module once"));
            }
        }
        check_dtypes(module, &keys)?;
        if !matcher.matches(path)? {
            return Err(bad_path(
                path,
                "modules that `target_modules` names, or PEFT would not load them",
            ));
        }
    }
    if tensors.is_empty() {
        return Err(bad_path("", "at least one module"));
    }
    let metadata = digest::metadata(digest);
    safetensors::serialize(tensors, Some(metadata)).map_err(|error| PeftError::Malformed {
        path: WEIGHTS_FILE.into(),
        reason: error.to_string(),
    })
}

fn bad_path(path: &str, expected: &str) -> PeftError {
    PeftError::Config {
        name: "module path".to_owned(),
        value: format!("`{path}`"),
        expected: expected.to_owned(),
    }
}
