//! Log-probabilities of a reference, computed once and kept in a file beside the data.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{DType, Device};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest as _, Sha256};

use super::log_probs::LogProbs;
use super::ragged::Ragged;
use crate::dataset::Example;
use crate::format::{read_bounded, write_files};
use crate::model::PeftModel;
use crate::{PeftError, Result};

/// The keys of a file's metadata.
const KEY: &str = "burn_peft.reference";
const CONTENT: &str = "burn_peft.content";

/// The most bytes of a file: some 10^10 tokens.
const MAX_BYTES: u64 = 1 << 36;

/// Log-probabilities per token of many sequences under a fixed reference.
///
/// DPO and its relatives read the same reference on every pass over the data, so its forward passes can be made once. The numbers of each
/// token are kept, not sums: losses by token means, or with `ld_alpha`, stay possible.
///
/// A file knows what it is of: a digest of the reference model (base, adapters in use) and of the examples in their order, tokens and
/// masks. A file of another model or of other data is refused, since nothing else would show that the reference is a wrong one.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredLogProbs {
    key: String,
    values: Ragged,
    starts: Vec<usize>,
}

impl StoredLogProbs {
    /// The log-probabilities of all `examples` in order, which `log_probs` computes a batch at a time: it is given up to `batch` examples and
    /// gives a sequence for each. Give it the reference without autodiff.
    ///
    /// # Errors
    ///
    /// Those of `log_probs`; [`PeftError::Config`] for no examples, a batch of zero, and a result of other sequences than the examples have;
    /// [`PeftError::DeviceRead`].
    pub fn compute<M: Module>(
        reference: &PeftModel<M>,
        examples: &[Example],
        batch: usize,
        mut log_probs: impl FnMut(&[Example]) -> Result<LogProbs>,
    ) -> Result<Self> {
        if batch == 0 {
            return Err(PeftError::config("batch", 0, "at least 1"));
        }
        let (mut values, mut lens) = (Vec::new(), Vec::new());
        for part in examples.chunks(batch) {
            let own = log_probs(part)?.to_ragged()?;
            values.extend_from_slice(own.values());
            lens.extend_from_slice(own.lens());
        }
        check_lens(&lens, examples)?;
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let row = row_of(&lens, at);
            return Err(PeftError::config(
                format!("log-probabilities of example {row}"),
                values[at],
                "finite numbers: the reference gives no probability to a token of the data",
            ));
        }
        Ok(Self::new(
            key(reference, examples),
            Ragged::new(values, lens)?,
        ))
    }

    fn new(key: String, values: Ragged) -> Self {
        let starts = values.lens().iter().scan(0, |sum, len| {
            let start = *sum;
            *sum += len;
            Some(start)
        });
        Self {
            starts: starts.collect(),
            key,
            values,
        }
    }

    /// The log-probabilities of these examples, by their places in the data, without graph.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for a place that is not there, or no places.
    pub fn get(&self, places: &[usize], device: &Device) -> Result<LogProbs> {
        let all = self.values.sequences();
        if let Some(place) = places.iter().find(|&&place| place >= all) {
            return Err(PeftError::config("example", place, format!("one of {all}")));
        }
        let row = |&place: &usize| {
            let (start, len) = (self.starts[place], self.values.lens()[place]);
            &self.values.values()[start..start + len]
        };
        let rows: Vec<&[f32]> = places.iter().map(row).collect();
        Ok(Ragged::from_rows(&rows)?.to_log_probs(device, DType::F32))
    }

    /// All of them.
    pub fn values(&self) -> &Ragged {
        &self.values
    }

    /// Writes a safetensors file: `log_probs` (f32) and `lens` (u64), with the digests in its metadata.
    ///
    /// # Errors
    ///
    /// [`PeftError::Exists`] where a file is there and `overwrite` is false; [`PeftError::Io`]. Nothing has changed then.
    pub fn save(&self, path: impl AsRef<Path>, overwrite: bool) -> Result<()> {
        let path = path.as_ref();
        let malformed = |reason: String| PeftError::Malformed {
            path: path.into(),
            reason,
        };
        let values: &[u8] = &little_endian(self.values.values().iter().map(|v| v.to_le_bytes()));
        let lens = self.values.lens().iter();
        let lens: &[u8] = &little_endian(lens.map(|&len| (len as u64).to_le_bytes()));
        let view = |dtype, len, bytes| TensorView::new(dtype, vec![len], bytes);
        let tensors = [
            ("lens", view(Dtype::U64, self.values.sequences(), lens)),
            ("log_probs", view(Dtype::F32, self.values.tokens(), values)),
        ];
        let mut views = Vec::new();
        for (name, tensor) in tensors {
            views.push((name, tensor.map_err(|error| malformed(error.to_string()))?));
        }
        let metadata = [(KEY, self.key.clone()), (CONTENT, content(lens, values))];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value));
        let bytes = safetensors::serialize(views, Some(metadata.into_iter().collect()))
            .map_err(|error| malformed(error.to_string()))?;
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            return Err(malformed("the path of no file".into()));
        };
        let dir = match path.parent() {
            Some(dir) if dir != Path::new("") => dir,
            _ => Path::new("."),
        };
        write_files(dir, &[(name, &bytes)], overwrite)
    }

    /// Reads a file that is of this reference and these examples.
    ///
    /// # Errors
    ///
    /// [`PeftError::Stale`] where it is of another model or of other data; [`PeftError::Malformed`] where it is damaged or none of
    /// these; [`PeftError::Io`].
    pub fn load<M: Module>(
        path: impl AsRef<Path>,
        reference: &PeftModel<M>,
        examples: &[Example],
    ) -> Result<Self> {
        let path = path.as_ref();
        let malformed = |reason: String| PeftError::Malformed {
            path: path.into(),
            reason,
        };
        let bytes = read_bounded(path, MAX_BYTES)?;
        let (_, header) =
            SafeTensors::read_metadata(&bytes).map_err(|error| malformed(error.to_string()))?;
        let file =
            SafeTensors::deserialize(&bytes).map_err(|error| malformed(error.to_string()))?;
        let metadata = header.metadata().as_ref();
        let entry = |key: &str| {
            let value = metadata.and_then(|metadata| metadata.get(key));
            let missing = || {
                malformed(format!(
                    "no `{key}` in its metadata, so it holds no log-probabilities of a reference"
                ))
            };
            value.cloned().ok_or_else(missing)
        };
        let found = entry(KEY)?;
        let tensor = |name: &str, dtype: Dtype| {
            let tensor = file
                .tensor(name)
                .map_err(|error| malformed(error.to_string()))?;
            match tensor.dtype() == dtype && tensor.shape().len() == 1 {
                true => Ok(tensor.data().to_vec()),
                false => Err(malformed(format!(
                    "`{name}`: expected {dtype:?} of one axis, found {:?} {:?}",
                    tensor.dtype(),
                    tensor.shape()
                ))),
            }
        };
        let (lens, values) = (
            tensor("lens", Dtype::U64)?,
            tensor("log_probs", Dtype::F32)?,
        );
        if entry(CONTENT)? != content(&lens, &values) {
            return Err(malformed(
                "its numbers do not fit their digest: it is damaged".into(),
            ));
        }
        let expected = key(reference, examples);
        if found != expected {
            return Err(PeftError::Stale {
                path: path.into(),
                expected,
                found,
            });
        }
        let lens = lens
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| u64::from_le_bytes(bytes) as usize);
        let lens: Vec<usize> = lens.collect();
        check_lens(&lens, examples)?;
        let values = values
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| f32::from_le_bytes(bytes));
        Ok(Self::new(found, Ragged::new(values.collect(), lens)?))
    }
}

fn little_endian<const N: usize>(values: impl Iterator<Item = [u8; N]>) -> Vec<u8> {
    values.flatten().collect()
}

/// One sequence for each example, of as many tokens as it has supervised.
fn check_lens(lens: &[usize], examples: &[Example]) -> Result<()> {
    let expected: Vec<usize> = examples.iter().map(Example::supervised_count).collect();
    if expected.is_empty() {
        return Err(PeftError::config("examples", 0, "at least one"));
    }
    super::segments::same_lens("log-probabilities", lens, &expected)
}

/// The sequence that a token is of.
fn row_of(lens: &[usize], token: usize) -> usize {
    let mut end = 0;
    lens.iter()
        .position(|len| {
            end += len;
            token < end
        })
        .unwrap_or(lens.len())
}

/// The digest of a reference and of the examples.
fn key<M: Module>(reference: &PeftModel<M>, examples: &[Example]) -> String {
    let mut hash = Sha256::new();
    hash.update(b"burn-peft reference\0");
    hash.update(reference.fingerprint());
    hash.update((examples.len() as u64).to_le_bytes());
    for example in examples {
        hash.update((example.tokens().len() as u64).to_le_bytes());
        for (token, supervised) in example.tokens().iter().zip(example.supervised()) {
            hash.update(token.to_le_bytes());
            hash.update([u8::from(*supervised)]);
        }
    }
    hex(hash)
}

fn content(lens: &[u8], values: &[u8]) -> String {
    let mut hash = Sha256::new();
    hash.update((lens.len() as u64).to_le_bytes());
    hash.update(lens);
    hash.update(values);
    hex(hash)
}

fn hex(hash: Sha256) -> String {
    let digest = hash.finalize();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
