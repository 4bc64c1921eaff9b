//! A LoRA adapter on the host: its configuration and its factors, as a directory holds them.

use std::path::{Path, PathBuf};

use burn::tensor::TensorData;

use super::config::AdapterConfig;
use super::keys::Factor;
use super::read::{self, ReadOptions};
use super::report::LoadReport;
use super::write::{self, WriteOptions};
#[cfg(doc)]
use crate::PeftError;
use crate::Result;
use crate::model::{DEFAULT_ADAPTER, check_adapter_name};

/// The factors of one module, in PyTorch's layout: `ΔW = s·B·A` has the shape `[d_out, d_in]`.
///
/// | module | `a` | `b` | `magnitude` |
/// |---|---|---|---|
/// | linear layer | `[r, d_in]` | `[d_out, r]` | `[d_out]` |
/// | embedding, `ΔE = s·(B·A)ᵀ` | `[r, tokens]` | `[features, r]` | `[features]` |
/// | `E` experts in one tensor | `[E·r, d_in]`, expert by expert | `[d_out, r·E]`, rank by rank | |
/// | convolution of `g` groups | `[r, channels_in, k_1, …]` | `[channels_out, r/g, 1, …]` | `[1, channels_out, 1, …]` |
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LoraTensors {
    /// The module's path in the file's naming, for instance `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// The factor `A`, of type F32, BF16 or F16.
    pub a: TensorData,
    /// The factor `B`, of the same type.
    pub b: TensorData,
    /// The magnitude that DoRA has and LoRA has not, of the same type.
    pub magnitude: Option<TensorData>,
    /// The bias `[d_out]` of `B` that `lora_bias` asks for, of the same type.
    pub bias: Option<TensorData>,
    /// Whether the module is an embedding, whose keys and layout are its own.
    pub embedding: bool,
    /// Whether these are factors of experts in one tensor, of `target_parameters`. `path` is then that of the module that holds the
    /// tensor, and where it holds several of them that has `.base_layer` behind it once for each later one.
    pub experts: bool,
}

impl LoraTensors {
    /// Plain factors of a linear layer or, by their shapes, of a convolution.
    pub fn new(path: impl Into<String>, a: TensorData, b: TensorData) -> Self {
        Self {
            path: path.into(),
            a,
            b,
            magnitude: None,
            bias: None,
            embedding: false,
            experts: false,
        }
    }

    /// All there are, as the file calls them.
    pub fn iter(&self) -> impl Iterator<Item = (Factor, &TensorData)> {
        let (a, b) = match self.embedding {
            false => (Factor::A, Factor::B),
            true => (Factor::EmbeddingA, Factor::EmbeddingB),
        };
        let bias = self.bias.iter().map(|bias| (Factor::Bias, bias));
        let magnitude = self.magnitude.iter();
        let magnitude = magnitude.map(|magnitude| (Factor::Magnitude, magnitude));
        [(a, &self.a), (b, &self.b)]
            .into_iter()
            .chain(bias)
            .chain(magnitude)
    }
}

/// Values that are no factor: those of a whole parameter, or of some rows of an embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterTensor {
    /// The path in the file's naming: the parameter's, as in `model.norm.weight`, or the embedding's.
    pub path: String,
    /// The values in PyTorch's layout, of type F32, BF16 or F16.
    pub data: TensorData,
}

/// An adapter as PEFT's directory holds it: `adapter_config.json` and `adapter_model.safetensors`.
///
/// ```
/// # fn main() -> burn_peft::Result<()> {
/// use burn_peft::format::{AdapterConfig, AdapterFile, LoraTensors, ReadOptions, WriteOptions};
/// use burn_peft::model::TargetConfig;
/// use burn::tensor::TensorData;
///
/// let adapter = AdapterFile::new(
///     AdapterConfig::new(2, 4.0, TargetConfig::list(["q_proj"])),
///     vec![LoraTensors::new(
///         "model.layers.0.self_attn.q_proj",
///         TensorData::ones::<f32, _>([2, 8]),
///         TensorData::zeros::<f32, _>([6, 2]),
///     )],
/// );
/// # let scratch = tempfile::tempdir().unwrap();
/// # let dir = scratch.path().join("adapter");
/// adapter.write(&dir, &WriteOptions::default())?;
/// assert_eq!(AdapterFile::read(&dir, &ReadOptions::default())?.tensors, adapter.tensors);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AdapterFile {
    /// The configuration.
    pub config: AdapterConfig,
    /// The factors; sorted by path when they were read.
    pub tensors: Vec<LoraTensors>,
    /// Parameters that the adapter has copies of, by their own paths: of `modules_to_save` and `bias`.
    pub copies: Vec<ParameterTensor>,
    /// Rows of embeddings, by the embedding's path: of `trainable_token_indices`, which says which rows these are.
    pub rows: Vec<ParameterTensor>,
    /// Values of the frozen base that PEFT stored beside the adapter, by the parameters' paths: of embeddings that are adapted, or whose
    /// vocabulary was resized. PEFT loads them into the base; here they become a frozen base that belongs to the adapter, unless the model's
    /// own is equal.
    pub base_values: Vec<ParameterTensor>,
    /// What reading passed over because [`ReadOptions::strict`] was false; empty otherwise.
    pub skipped: LoadReport,
}

impl AdapterFile {
    /// An adapter of factors alone.
    pub fn new(config: AdapterConfig, tensors: Vec<LoraTensors>) -> Self {
        Self {
            config,
            tensors,
            copies: Vec::new(),
            rows: Vec::new(),
            base_values: Vec::new(),
            skipped: LoadReport::default(),
        }
    }

    /// Reads the adapter in `dir`. Holds the factors once, in the types of the file.
    ///
    /// Everything in the directory is checked first: the configuration, that every tensor is a factor of a module, what
    /// the configuration has beside factors, or may be a base value, that none lacks its partner, that ranks are the configuration's,
    /// that types are F32, BF16 or F16, and that all values are finite. Which modules there are is for the tensors to say, not for
    /// `target_modules`. If `options` are not strict, what does not fit is left out and stands in [`skipped`](Self::skipped).
    ///
    /// # Errors
    ///
    /// Those of [`AdapterConfig::read`] and [`SafetensorsFile::open`](super::SafetensorsFile::open), and, in
    /// [`PeftError::InFile`], [`PeftError::Incomplete`] with the names of all tensors that do not fit,
    /// [`PeftError::DType`] and [`PeftError::NotFinite`]; [`PeftError::Digest`] as [`ReadOptions::digest`] has it.
    pub fn read(dir: impl AsRef<Path>, options: &ReadOptions) -> Result<Self> {
        read::read(dir.as_ref(), options)
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
    pub fn write(&self, dir: impl AsRef<Path>, options: &WriteOptions) -> Result<()> {
        write::write(self, dir.as_ref(), options)
    }
}

/// Where the adapter `name` lies under `dir`: in `dir` itself if it is [`DEFAULT_ADAPTER`], else in its folder.
///
/// # Errors
///
/// [`PeftError::AdapterName`] for a name that no adapter of a model can have: one that is empty or too long, or has a dot, a separator, a
/// colon or a control character, which would lead elsewhere.
pub fn adapter_dir(dir: impl AsRef<Path>, name: &str) -> Result<PathBuf> {
    let dir = dir.as_ref();
    check_adapter_name(name)?;
    Ok(match name {
        DEFAULT_ADAPTER => dir.to_owned(),
        name => dir.join(name),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PeftError;

    #[test]
    fn only_the_default_adapter_lies_in_the_directory_itself() {
        let dir = Path::new("out");
        assert_eq!(adapter_dir(dir, "default").unwrap(), dir);
        assert_eq!(
            adapter_dir(dir, "my-adapter 2").unwrap(),
            dir.join("my-adapter 2")
        );
        // As PEFT takes them.
        for name in ["lora_sql", "lora_", "数据", "a+b (2)"] {
            assert_eq!(adapter_dir(dir, name).unwrap(), dir.join(name));
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in [
            "", ".", "..", "../x", "/etc", "a/b", "a\\b", "C:x", "a\0b", "a\nb", "v1.0", "nf4",
        ] {
            let error = adapter_dir(Path::new("out"), name).unwrap_err();
            assert!(
                matches!(error, PeftError::AdapterName { .. }),
                "{name:?}: {error}"
            );
        }
    }
}
