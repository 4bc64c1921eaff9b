//! A LoRA adapter on the host: its configuration and its factors, as a directory holds them.

use std::path::{Path, PathBuf};

use burn::tensor::TensorData;

use super::config::AdapterConfig;
use super::keys::Factor;
use super::read::{self, ReadOptions};
use super::write::{self, WriteOptions};
use crate::model::DEFAULT_ADAPTER;
use crate::{PeftError, Result};

/// The factors of one module, in PyTorch's layout: `ΔW = s·B·A` has the shape `[d_out, d_in]`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraTensors {
    /// The module's path in the file's naming, for instance `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// `[r, d_in]`, of type F32, BF16 or F16.
    pub a: TensorData,
    /// `[d_out, r]`, of the same type.
    pub b: TensorData,
    /// `[d_out]`, of the same type: the magnitude that DoRA has and LoRA has not.
    pub magnitude: Option<TensorData>,
}

impl LoraTensors {
    /// All there are, as the file calls them.
    pub fn iter(&self) -> impl Iterator<Item = (Factor, &TensorData)> {
        let magnitude = self.magnitude.iter();
        [(Factor::A, &self.a), (Factor::B, &self.b)]
            .into_iter()
            .chain(magnitude.map(|magnitude| (Factor::Magnitude, magnitude)))
    }
}

/// An adapter as PEFT's directory holds it: `adapter_config.json` and `adapter_model.safetensors`.
///
/// ```
/// # fn main() -> burn_peft::Result<()> {
/// use burn_peft::format::{AdapterConfig, AdapterFile, LoraTensors, ReadOptions, WriteOptions};
/// use burn_peft::model::TargetConfig;
/// use burn::tensor::TensorData;
///
/// let adapter = AdapterFile {
///     config: AdapterConfig::new(2, 4.0, TargetConfig::list(["q_proj"])),
///     tensors: vec![LoraTensors {
///         path: "model.layers.0.self_attn.q_proj".into(),
///         a: TensorData::ones::<f32, _>([2, 8]),
///         b: TensorData::zeros::<f32, _>([6, 2]),
///         magnitude: None,
///     }],
/// };
/// # let scratch = tempfile::tempdir().unwrap();
/// # let dir = scratch.path().join("adapter");
/// adapter.write(&dir, &WriteOptions::default())?;
/// assert_eq!(AdapterFile::read(&dir, &ReadOptions::default())?.tensors, adapter.tensors);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterFile {
    /// The configuration.
    pub config: AdapterConfig,
    /// The factors; sorted by path when they were read.
    pub tensors: Vec<LoraTensors>,
}

impl AdapterFile {
    /// Reads the adapter in `dir`. Holds the factors once, in the types of the file.
    ///
    /// Everything in the directory is checked first: the configuration, that every tensor is a factor of a linear
    /// module, that none lacks its partner, that ranks are the configuration's, that types are F32, BF16 or F16, and
    /// that all values are finite. Which modules there are is for the tensors to say, not for `target_modules`.
    ///
    /// # Errors
    ///
    /// Those of [`AdapterConfig::read`] and [`SafetensorsFile::open`](super::SafetensorsFile::open), and, in
    /// [`PeftError::InFile`], [`PeftError::Incomplete`] with the names of all tensors that do not fit,
    /// [`PeftError::DType`] and [`PeftError::NotFinite`]; [`PeftError::Digest`] as [`ReadOptions::digest`] has it.
    pub fn read(dir: &Path, options: &ReadOptions) -> Result<Self> {
        read::read(dir, options)
    }

    /// Writes the adapter to `dir`, which is made if it is not there, as PEFT would.
    ///
    /// The same adapter always gives the same bytes. Each file appears whole or not at all, first the tensors, then
    /// the configuration, and a failure leaves everything as it was. Needs memory for the factors once more.
    ///
    /// # Errors
    ///
    /// [`PeftError::Exists`] where one of the two files is there and `options` does not allow to overwrite it; the
    /// errors of [`AdapterConfig::to_json`]; [`PeftError::Config`] for two modules of the same path, a path that is
    /// none, or one that `target_modules` does not name, which PEFT would not load; [`PeftError::Shape`],
    /// [`PeftError::DType`] and [`PeftError::NotFinite`] for tensors that could not be read back; [`PeftError::Io`].
    pub fn write(&self, dir: &Path, options: &WriteOptions) -> Result<()> {
        write::write(self, dir, options)
    }
}

/// Where the adapter `name` lies under `dir`: in `dir` itself if it is [`DEFAULT_ADAPTER`], else in its folder.
///
/// # Errors
///
/// [`PeftError::AdapterName`] for a name that is empty, has a dot, a separator, a colon or a control character, or
/// contains `lora_`: it would lead elsewhere, or break PEFT's keys.
pub fn adapter_dir(dir: &Path, name: &str) -> Result<PathBuf> {
    let forbidden = |c: char| c.is_control() || matches!(c, '.' | '/' | '\\' | ':');
    if name.is_empty() || name.contains(forbidden) || name.contains("lora_") {
        return Err(PeftError::AdapterName {
            name: name.to_owned(),
            reason: "it must not be empty, nor have dots, separators, colons, control characters or `lora_`".into(),
        });
    }
    Ok(match name {
        DEFAULT_ADAPTER => dir.to_owned(),
        name => dir.join(name),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_default_adapter_lies_in_the_directory_itself() {
        let dir = Path::new("out");
        assert_eq!(adapter_dir(dir, "default").unwrap(), dir);
        assert_eq!(
            adapter_dir(dir, "my-adapter 2").unwrap(),
            dir.join("my-adapter 2")
        );
    }

    #[test]
    fn names_that_lead_elsewhere_or_break_keys_are_refused() {
        for name in [
            "", ".", "..", "../x", "/etc", "a/b", "a\\b", "C:x", "a\0b", "a\nb", "v1.0", "lora_A",
        ] {
            let error = adapter_dir(Path::new("out"), name).unwrap_err();
            assert!(
                matches!(error, PeftError::AdapterName { .. }),
                "{name:?}: {error}"
            );
        }
    }
}
