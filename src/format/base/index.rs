//! The index of a checkpoint in several files, `model.safetensors.index.json`, and whether it tells the truth.
//!
//! ```text
//! {"metadata": {"total_size": bytes of all tensors}, "weight_map": {"TENSOR": "FILE", ..}}
//! ```
//!
//! An index is a claim about other files. It is held to it to the letter: each file it names is there, holds the tensors
//! that the index places in it and no other, and the sizes add up. Loaders that take the index's word read a tensor from
//! one place where another loader reads it from elsewhere. Keys beside the two are passed over, as in transformers.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde_json::Value;

use crate::format::json;
use crate::format::read::read_bounded;
use crate::{PeftError, Result};

/// Largest index read, in bytes. That of a model of 1 trillion parameters in 2,000 experts has about 10 MB.
pub const MAX_INDEX_BYTES: u64 = 32 << 20;
/// Most tensors of an index.
pub const MAX_INDEX_TENSORS: usize = 400_000;
/// Most files of an index; each is held open, of which a process may often have 1024.
pub const MAX_SHARDS: usize = 512;

/// How an index differs from the files beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IndexFault {
    /// The index places a tensor in what is not the name of a file beside it.
    NotAFileName {
        /// The tensor.
        tensor: String,
        /// What stands in the place of a file's name.
        file: String,
    },
    /// A file that the index names is not there.
    MissingShard {
        /// The file's name.
        file: String,
    },
    /// The index places a tensor in a file that does not hold it, nor does another.
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// The file in which it should be.
        file: String,
    },
    /// A tensor is in another file than the index says.
    Misplaced {
        /// The tensor.
        tensor: String,
        /// The file in which it should be.
        expected: String,
        /// The file in which it is.
        found: String,
    },
    /// A file holds a tensor that the index does not name.
    Unlisted {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        file: String,
    },
    /// Two files hold a tensor of the same name.
    Duplicate {
        /// The tensor.
        tensor: String,
        /// The files.
        files: [String; 2],
    },
    /// `metadata.total_size` is not the number of bytes of all tensors.
    TotalSize {
        /// What the index says, as it stands there.
        stated: String,
        /// The bytes of the tensors in the files.
        found: u64,
    },
}

impl fmt::Display for IndexFault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let e = |text: &'_ str| text.escape_debug().to_string();
        match self {
            Self::NotAFileName { tensor, file } => {
                let (tensor, file) = (e(tensor), e(file));
                write!(
                    f,
                    "`{tensor}` is placed in `{file}`, which is not the name of a file beside it"
                )
            }
            Self::MissingShard { file } => write!(f, "the file `{}` is not there", e(file)),
            Self::MissingTensor { tensor, file } => {
                write!(f, "`{}` is not in `{}`", e(tensor), e(file))
            }
            Self::Misplaced {
                tensor,
                expected,
                found,
            } => {
                let (tensor, expected, found) = (e(tensor), e(expected), e(found));
                write!(
                    f,
                    "`{tensor}` is placed in `{expected}`, but is in `{found}`"
                )
            }
            Self::Unlisted { tensor, file } => {
                write!(f, "`{}` of `{}` is not listed", e(tensor), e(file))
            }
            Self::Duplicate { tensor, files } => {
                let [one, other] = files;
                write!(
                    f,
                    "`{}` is in `{}` and in `{}`",
                    e(tensor),
                    e(one),
                    e(other)
                )
            }
            Self::TotalSize { stated, found } => {
                write!(
                    f,
                    "a total size of {} is stated, the tensors have {found} bytes",
                    e(stated)
                )
            }
        }
    }
}

/// An index as it was read.
pub(super) struct Index {
    /// The name of its file for each tensor.
    pub weight_map: BTreeMap<String, String>,
    /// `metadata.total_size`.
    pub total_size: Option<Value>,
}

impl Index {
    /// Reads the index at `path`, and nothing of the files it names.
    ///
    /// # Errors
    ///
    /// [`PeftError::Io`]; [`PeftError::Malformed`] for what is no index, or a larger one than is read;
    /// [`PeftError::Json`] in [`PeftError::InFile`], also for a key that stands twice; [`PeftError::Index`] for a tensor
    /// that it places elsewhere than in a file beside it.
    pub fn read(path: &Path) -> Result<Self> {
        let malformed = |reason: String| PeftError::Malformed {
            path: path.to_owned(),
            reason,
        };
        let json = read_bounded(path, MAX_INDEX_BYTES)?;
        // Each tensor has one value; the others are few.
        let mut index = json::object_of(&json, MAX_INDEX_TENSORS + 1024)
            .map_err(|error| error.in_file(path))?;
        drop(json);
        let total_size = match index.remove("metadata") {
            None => None,
            Some(Value::Object(mut metadata)) => metadata.remove("total_size"),
            Some(_) => return Err(malformed("`metadata` is not an object".to_owned())),
        };
        let Some(Value::Object(entries)) = index.remove("weight_map") else {
            return Err(malformed("there is no object `weight_map`".to_owned()));
        };
        if entries.is_empty() {
            return Err(malformed("`weight_map` lists no tensor".to_owned()));
        }
        if entries.len() > MAX_INDEX_TENSORS {
            let found = entries.len();
            return Err(malformed(format!(
                "{found} tensors: at most {MAX_INDEX_TENSORS} are read"
            )));
        }
        let mut weight_map = BTreeMap::new();
        let mut faults = Vec::new();
        for (tensor, file) in entries {
            match file {
                Value::String(file) if is_file_name(&file) => {
                    weight_map.insert(tensor, file);
                }
                Value::String(file) => faults.push(IndexFault::NotAFileName { tensor, file }),
                _ => {
                    let tensor = tensor.escape_debug();
                    return Err(malformed(format!("the file of `{tensor}` is not a text")));
                }
            }
        }
        refuse(path, faults)?;
        Ok(Self {
            weight_map,
            total_size,
        })
    }

    /// Notes a total size that is not this one.
    pub fn check_total_size(&self, found: u64, faults: &mut Vec<IndexFault>) {
        let Some(stated) = &self.total_size else {
            return;
        };
        // Some writers divide, and so state a float.
        let is_equal = match stated.as_u64() {
            Some(stated) => stated == found,
            None => stated.as_f64().is_some_and(|stated| stated == found as f64),
        };
        if !is_equal {
            let mut stated = stated.to_string();
            stated.truncate(stated.floor_char_boundary(40));
            faults.push(IndexFault::TotalSize { stated, found });
        }
    }
}

/// An error with these faults, if there are any.
pub(super) fn refuse(path: &Path, faults: Vec<IndexFault>) -> Result<()> {
    match faults.is_empty() {
        true => Ok(()),
        false => Err(PeftError::Index {
            path: path.to_owned(),
            faults,
        }),
    }
}

/// Whether this names a file in the directory itself, on any system.
fn is_file_name(name: &str) -> bool {
    name.ends_with(".safetensors")
        && !name.starts_with('.')
        && !name.contains(['/', '\\', ':'])
        && !name.contains(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_of_files_beside_it_pass() {
        for name in ["model-00001-of-00002.safetensors", "é.safetensors"] {
            assert!(is_file_name(name), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            ".safetensors",
            "../model.safetensors",
            "/etc/model.safetensors",
            "a/model.safetensors",
            "a\\model.safetensors",
            "C:model.safetensors",
            "a\0.safetensors",
            "a\n.safetensors",
            "model.bin",
        ] {
            assert!(!is_file_name(name), "{name:?}");
        }
    }

    #[test]
    fn a_total_size_may_be_written_as_a_float() {
        let faults = |stated: &str, found| {
            let mut faults = Vec::new();
            let index = Index {
                weight_map: BTreeMap::new(),
                total_size: Some(serde_json::from_str(stated).unwrap()),
            };
            index.check_total_size(found, &mut faults);
            faults
        };
        assert_eq!(faults("12", 12), []);
        assert_eq!(faults("12.0", 12), []);
        for stated in ["13", "12.5", "-12", "\"12\"", "null", "[]"] {
            let expected = IndexFault::TotalSize {
                stated: stated.to_owned(),
                found: 12,
            };
            assert_eq!(faults(stated, 12), [expected]);
        }
    }
}
