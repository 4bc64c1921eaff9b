//! The file: tensors and a manifest in safetensors, ended by the digest of all that stands before it.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::tensor::{DType, TensorData};
use safetensors::tensor::{SafeTensors, View};
use safetensors::{Dtype, serialize};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::description::Description;
use crate::format::elements::{Stored, from_file, swap_to_host};
use crate::format::{MAX_HEADER_BYTES, MAX_TENSORS, read_bounded};
use crate::{PeftError, Result};

/// Largest checkpoint read: the largest adapters, with an optimiser that keeps two values for each of theirs.
pub const MAX_CHECKPOINT_BYTES: u64 = 3 * crate::format::MAX_WEIGHTS_BYTES;
/// Key of the JSON in the header's `__metadata__`.
pub const METADATA_KEY: &str = "burn_peft.checkpoint";

/// Version of this format.
const FORMAT: u64 = 1;
/// Name of the digest's tensor. It is the only one of single bytes, and safetensors puts those last.
const DIGEST: &str = "sha256";
/// Bytes of the digest.
const DIGEST_BYTES: usize = 32;

/// What is no tensor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub seed: u64,
    pub step: u64,
    /// What the checkpoint belongs to.
    pub belongs_to: Description,
    /// By parameter path.
    pub optimizer: BTreeMap<String, Numbers>,
}

/// What the optimiser keeps for one parameter beside tensors.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Numbers {
    /// The parameter's path in the module that the optimiser was given, by which parameter groups choose.
    pub path: Option<String>,
    pub numbers: BTreeMap<String, Number>,
}

/// A number with its kind, exactly.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Number {
    Int(i64),
    Uint(u64),
    /// The bits of a float, which decimals might not give back.
    FloatBits(u64),
    Bool(bool),
}

/// The manifest with the version of the format, which is looked at first.
#[derive(Serialize)]
struct Versioned<'a> {
    format: u64,
    #[serde(flatten)]
    manifest: &'a Manifest,
}

enum Entry<'a> {
    Tensor(Stored<'a>),
    Digest,
}

impl View for Entry<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::Tensor(tensor) => tensor.dtype(),
            Self::Digest => Dtype::U8,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::Tensor(tensor) => tensor.shape(),
            Self::Digest => &[DIGEST_BYTES],
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Tensor(tensor) => tensor.data(),
            Self::Digest => Cow::Borrowed(&[0; DIGEST_BYTES]),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Self::Tensor(tensor) => tensor.data_len(),
            Self::Digest => DIGEST_BYTES,
        }
    }
}

/// The bytes of a checkpoint.
///
/// # Errors
///
/// [`PeftError::DType`] for a tensor that is not F32, BF16, F16 or I32.
pub(super) fn to_bytes(
    manifest: &Manifest,
    tensors: &BTreeMap<String, TensorData>,
) -> Result<Vec<u8>> {
    let format = FORMAT;
    let json = serde_json::to_string(&Versioned { format, manifest }).map_err(PeftError::json)?;
    let mut entries = vec![(DIGEST, Entry::Digest)];
    for (name, data) in tensors {
        entries.push((name, Entry::Tensor(Stored::or_words(name, data)?)));
    }
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), json)]);
    let mut bytes =
        serialize(entries, Some(metadata)).expect("shapes and lengths of tensors in memory agree");
    let end = bytes.len() - DIGEST_BYTES;
    let digest = Sha256::digest(&bytes[..end]);
    bytes[end..].copy_from_slice(&digest);
    Ok(bytes)
}

/// Reads a checkpoint whole, twice in memory for a moment.
///
/// # Errors
///
/// [`PeftError::Io`]; [`PeftError::Malformed`] for anything but a whole file that [`to_bytes`] may have made;
/// [`PeftError::DType`] in [`PeftError::InFile`].
pub(super) fn read(path: &Path) -> Result<(Manifest, BTreeMap<String, TensorData>)> {
    let bytes = read_bounded(path, MAX_CHECKPOINT_BYTES)?;
    parse(&bytes).map_err(|error| match error {
        Refused::Because(reason) => PeftError::Malformed {
            path: path.to_owned(),
            reason,
        },
        Refused::Error(error) => error.in_file(path),
    })
}

enum Refused {
    Because(String),
    Error(PeftError),
}

impl From<String> for Refused {
    fn from(reason: String) -> Self {
        Self::Because(reason)
    }
}

fn parse(bytes: &[u8]) -> Result<(Manifest, BTreeMap<String, TensorData>), Refused> {
    // First of all: whatever befell the file, nothing of it is looked at.
    let whole = bytes
        .split_last_chunk::<DIGEST_BYTES>()
        .is_some_and(|(content, digest)| Sha256::digest(content)[..] == digest[..]);
    if !whole {
        return Err(format!(
            "no checkpoint, or cut short, or changed: its last {DIGEST_BYTES} bytes are not the SHA-256 of those before"
        )
        .into());
    }
    let header = bytes.first_chunk().copied().map_or(0, u64::from_le_bytes);
    if header > MAX_HEADER_BYTES {
        return Err(
            format!("a header of {header} bytes: at most {MAX_HEADER_BYTES} are read").into(),
        );
    }
    let not_safetensors = |error| format!("not safetensors: {error}");
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(not_safetensors)?;
    let file = SafeTensors::deserialize(bytes).map_err(not_safetensors)?;
    if file.len() > MAX_TENSORS {
        return Err(format!("{} tensors: at most {MAX_TENSORS} are read", file.len()).into());
    }
    let json = metadata.metadata().as_ref();
    let json = json.and_then(|entries| entries.get(METADATA_KEY));
    let json = json.ok_or_else(|| format!("its header has no `{METADATA_KEY}`: no checkpoint"))?;
    let manifest = manifest(json)?;
    let mut tensors = BTreeMap::new();
    let mut digest = false;
    for (name, view) in file.iter() {
        if name == DIGEST && view.dtype() == Dtype::U8 && view.shape() == [DIGEST_BYTES] {
            digest = true;
            continue;
        }
        let dtype = match view.dtype() {
            // Codes of an optimiser.
            Dtype::I32 => DType::I32,
            dtype => from_file(name, dtype).map_err(Refused::Error)?,
        };
        let mut values = view.data().to_vec();
        swap_to_host(&mut values, dtype);
        let data = TensorData::try_from_bytes_vec(values, view.shape(), dtype)
            .map_err(|error| format!("tensor `{name}`: {error}"))?;
        tensors.insert(name.to_owned(), data);
    }
    match digest {
        true => Ok((manifest, tensors)),
        false => Err(format!("there is no tensor `{DIGEST}`: no checkpoint").into()),
    }
}

fn manifest(json: &str) -> Result<Manifest, String> {
    let not_it = |error: serde_json::Error| format!("`{METADATA_KEY}`: {error}");
    let mut value: serde_json::Value = serde_json::from_str(json).map_err(not_it)?;
    let format = value
        .as_object_mut()
        .and_then(|object| object.shift_remove("format"));
    match format.as_ref().and_then(serde_json::Value::as_u64) {
        Some(FORMAT) => serde_json::from_value(value).map_err(not_it),
        Some(other) => Err(format!(
            "a checkpoint of format {other}: format {FORMAT} is read"
        )),
        None => Err(format!("`{METADATA_KEY}` has no `format`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
        let end = bytes.len() - DIGEST_BYTES;
        let digest = Sha256::digest(&bytes[..end]);
        bytes[end..].copy_from_slice(&digest);
        bytes
    }

    fn manifest() -> Manifest {
        Manifest {
            seed: u64::MAX,
            step: 7,
            belongs_to: Description::from([("a \"b\"".into(), "c".into())]),
            optimizer: BTreeMap::from([(
                "p".into(),
                Numbers {
                    path: None,
                    numbers: BTreeMap::from([
                        ("i".into(), Number::Int(-1)),
                        ("u".into(), Number::Uint(u64::MAX)),
                        ("f".into(), Number::FloatBits(0.1f64.to_bits())),
                        ("b".into(), Number::Bool(true)),
                    ]),
                },
            )]),
        }
    }

    fn refusal(bytes: &[u8]) -> String {
        match parse(bytes) {
            Err(Refused::Because(reason)) => reason,
            Err(Refused::Error(error)) => error.to_string(),
            Ok(_) => panic!("it was read"),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let tensors = BTreeMap::from([
            (
                "x".to_owned(),
                TensorData::from([[1f32, f32::NAN], [-0.0, 3.5]]),
            ),
            (
                "h".to_owned(),
                TensorData::from([1f32, 2.0, 3.0]).convert::<half::bf16>(),
            ),
            ("w".to_owned(), TensorData::from([i32::MIN, -1, 7])),
            // Sorted beside the digest if its type did not put it elsewhere.
            (
                "sha257".to_owned(),
                TensorData::new(Vec::<f32>::new(), [0, 3]),
            ),
        ]);
        let bytes = to_bytes(&manifest(), &tensors).unwrap();
        let Ok((found, read)) = parse(&bytes) else {
            panic!("not read")
        };
        let json = |manifest: &Manifest| serde_json::to_string(manifest).unwrap();
        assert_eq!(json(&found), json(&manifest()));
        assert_eq!(read.len(), 4);
        for (name, data) in &tensors {
            let found = &read[name];
            assert_eq!(found.as_bytes(), data.as_bytes());
            assert_eq!((found.shape(), found.dtype()), (data.shape(), data.dtype()));
        }
        assert_eq!(
            bytes,
            to_bytes(&manifest(), &read).unwrap(),
            "same content, same bytes"
        );
    }

    /// Files whose digest is right, made by somebody who knows how.
    #[test]
    fn a_right_digest_is_not_enough() {
        let metadata =
            |json: &str| Some(HashMap::from([(METADATA_KEY.to_owned(), json.to_owned())]));
        let file = |json| sealed(serialize([(DIGEST, Entry::Digest)], metadata(json)).unwrap());
        for (json, expected) in [
            ("[]", "has no `format`"),
            ("{", "EOF"),
            (r#"{"format": 2}"#, "format 2: format 1 is read"),
            (r#"{"format": 1}"#, "missing field `seed`"),
            (
                r#"{"format": 1, "seed": 1, "step": -1, "belongs_to": {}, "optimizer": {}}"#,
                "invalid value",
            ),
            (
                r#"{"format": 1, "seed": 1, "step": 1, "belongs_to": {}, "optimizer": {}, "more": 1}"#,
                "unknown field `more`",
            ),
        ] {
            let found = refusal(&file(json));
            assert!(found.contains(expected), "{json}: {found}");
        }
        let nothing = sealed(serialize([(DIGEST, Entry::Digest)], None).unwrap());
        assert!(refusal(&nothing).contains("no checkpoint"));
        let good = r#"{"format": 1, "seed": 1, "step": 1, "belongs_to": {}, "optimizer": {}}"#;
        assert!(parse(&file(good)).is_ok());

        let pad = TensorData::from([0f32; 8]);
        let pad = Entry::Tensor(Stored::new("pad", &pad).unwrap());
        let undigested = sealed(serialize([("pad", pad)], metadata(good)).unwrap());
        assert!(refusal(&undigested).contains("no tensor `sha256`"));

        let mut long = file(good);
        long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(refusal(&sealed(long)).contains("at most"));
        assert!(refusal(&sealed(vec![0; 40])).contains("not safetensors"));
        // Nothing but a digest, whose first bytes are taken for the header's length.
        assert!(refusal(&sealed(vec![0; 32])).contains("at most"));
        for short in [0, 1, 31] {
            assert!(refusal(&vec![0; short]).contains("SHA-256"));
        }
    }
}
