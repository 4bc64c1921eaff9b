//! The index of a checkpoint in several files, `model.safetensors.index.json`, and whether it tells the truth.
//!
//! ```text
//! {"metadata": {"total_size": bytes of all tensors}, "weight_map": {"TENSOR": "FILE", ..}}
//! ```
//!
//! An index is a claim about other files. By default it is held to it to the letter: each file it names is there, holds the
//! tensors that the index places in it and no other, and the sizes add up. Loaders that take the index's word read a tensor
//! from one place where another loader reads it from elsewhere. transformers takes the files' word, and from the index only
//! the names of the files; so does this crate where it is allowed to. Keys beside the two are passed over, as in transformers.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;

use serde_json::Value;

use crate::format::disguise::not_json;
use crate::format::read::read_bounded;
use crate::format::{FileLimits, json};
use crate::{PeftError, Result};

/// The kinds of [`IndexFault`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum IndexFaultKind {
    /// [`IndexFault::NotAFileName`]. Allowed, it lets the index name files in folders below its own.
    NotAFileName,
    /// [`IndexFault::MissingShard`]. Allowed, the tensors of that file are missing.
    MissingShard,
    /// [`IndexFault::MissingTensor`]. Allowed, it is as if the index did not name the tensor.
    MissingTensor,
    /// [`IndexFault::Misplaced`]. Allowed, the tensor is read from where it is.
    Misplaced,
    /// [`IndexFault::Unlisted`]. Allowed, it is as if the index named the tensor.
    Unlisted,
    /// [`IndexFault::Duplicate`]. Allowed, the tensor of the last file by name is the one, as in transformers.
    Duplicate,
    /// [`IndexFault::TotalSize`]. Allowed, it is passed over.
    TotalSize,
}

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

impl IndexFault {
    /// Its kind.
    pub fn kind(&self) -> IndexFaultKind {
        match self {
            Self::NotAFileName { .. } => IndexFaultKind::NotAFileName,
            Self::MissingShard { .. } => IndexFaultKind::MissingShard,
            Self::MissingTensor { .. } => IndexFaultKind::MissingTensor,
            Self::Misplaced { .. } => IndexFaultKind::Misplaced,
            Self::Unlisted { .. } => IndexFaultKind::Unlisted,
            Self::Duplicate { .. } => IndexFaultKind::Duplicate,
            Self::TotalSize { .. } => IndexFaultKind::TotalSize,
        }
    }
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
    /// The names of the files, sorted.
    pub files: Vec<String>,
    /// Which of the files each tensor is placed in.
    pub weight_map: BTreeMap<String, usize>,
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
    /// that it places elsewhere than in a file beside it, or below it, if `faults` allows that.
    pub fn read(path: &Path, limits: &FileLimits, faults: &mut Faults) -> Result<Self> {
        let malformed = |reason: String| PeftError::Malformed {
            path: path.to_owned(),
            reason,
        };
        let json = read_bounded(path, limits.index_bytes).map_err(|error| match error {
            PeftError::Malformed { path, reason } if reason.contains("at most") => {
                let reason = format!("{reason}, or `FileLimits::index_bytes`");
                PeftError::Malformed { path, reason }
            }
            other => other,
        })?;
        // Each tensor has one value; the others are few.
        let most = limits.index_tensors.saturating_add(1024);
        let mut index = json::object_of(&json, most, limits.repeated_names)
            .map_err(|error| not_json(path, &json, error))?;
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
        if entries.len() > limits.index_tensors {
            let (found, most) = (entries.len(), limits.index_tensors);
            return Err(malformed(format!(
                "{found} tensors: at most {most} are read, or `FileLimits::index_tensors`"
            )));
        }
        // Few files for many tensors: each name is kept once.
        let mut places: HashMap<String, usize> = HashMap::new();
        let mut placed = Vec::with_capacity(entries.len());
        for (tensor, file) in entries {
            let Value::String(file) = file else {
                let tensor = tensor.escape_debug();
                return Err(malformed(format!("the file of `{tensor}` is not a text")));
            };
            if !is_file_name(&file) {
                let below = is_below(&file);
                let fault = IndexFault::NotAFileName {
                    tensor: tensor.clone(),
                    file: file.clone(),
                };
                match below {
                    true => faults.push(fault),
                    false => faults.refuse(fault),
                }
                if !below {
                    continue;
                }
            }
            let next = places.len();
            placed.push((tensor, *places.entry(file).or_insert(next)));
        }
        faults.check(path)?;
        let mut files: Vec<(String, usize)> = places.into_iter().collect();
        files.sort();
        let mut sorted = vec![0; files.len()];
        for (rank, (_, place)) in files.iter().enumerate() {
            sorted[*place] = rank;
        }
        let placed = placed.into_iter();
        Ok(Self {
            files: files.into_iter().map(|(file, _)| file).collect(),
            weight_map: placed
                .map(|(tensor, file)| (tensor, sorted[file]))
                .collect(),
            total_size,
        })
    }

    /// Notes a total size that is not this one.
    pub fn check_total_size(&self, found: u64, faults: &mut Faults) {
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

/// The faults of an index: those that are passed over, and the others.
#[derive(Default)]
pub(super) struct Faults {
    allowed: Vec<IndexFaultKind>,
    pub passed: Vec<IndexFault>,
    refused: Vec<IndexFault>,
}

impl Faults {
    pub fn new(allowed: &[IndexFaultKind]) -> Self {
        Self {
            allowed: allowed.to_vec(),
            ..Self::default()
        }
    }

    pub fn push(&mut self, fault: IndexFault) {
        match self.allowed.contains(&fault.kind()) {
            true => self.passed.push(fault),
            false => self.refused.push(fault),
        }
    }

    /// One that no option allows.
    pub fn refuse(&mut self, fault: IndexFault) {
        self.refused.push(fault);
    }

    pub fn is_empty(&self) -> bool {
        self.passed.is_empty() && self.refused.is_empty()
    }

    /// # Errors
    ///
    /// [`PeftError::Index`] with the faults that are not allowed, if there are any.
    pub fn check(&mut self, path: &Path) -> Result<()> {
        match self.refused.is_empty() {
            true => Ok(()),
            false => Err(PeftError::Index {
                path: path.to_owned(),
                faults: std::mem::take(&mut self.refused),
            }),
        }
    }
}

/// Whether this names a file in a folder below the directory, on any system.
fn is_below(name: &str) -> bool {
    name.split('/').all(|part| {
        !part.is_empty()
            && !part.starts_with('.')
            && !part.contains(['\\', ':'])
            && !part.contains(char::is_control)
    }) && name.ends_with(".safetensors")
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
    fn only_names_in_folders_below_it_are_below() {
        for name in ["a.safetensors", "fp16/a.safetensors", "a/b/c.safetensors"] {
            assert!(is_below(name), "{name}");
        }
        for name in [
            "/a.safetensors",
            "../a.safetensors",
            "a/../b.safetensors",
            "a//b.safetensors",
            "a/.hidden/b.safetensors",
            "a\\b.safetensors",
            "C:/b.safetensors",
            "a/b.bin",
            "",
        ] {
            assert!(!is_below(name), "{name}");
        }
    }

    #[test]
    fn a_total_size_may_be_written_as_a_float() {
        let faults = |stated: &str, found| {
            let mut faults = Faults::default();
            let index = Index {
                files: Vec::new(),
                weight_map: BTreeMap::new(),
                total_size: Some(serde_json::from_str(stated).unwrap()),
            };
            index.check_total_size(found, &mut faults);
            faults.refused
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
