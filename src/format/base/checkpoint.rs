//! An open checkpoint: the tensors of one safetensors file or of several, read by position.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::index::{Index, IndexFault, MAX_INDEX_TENSORS, MAX_SHARDS, refuse};
use crate::format::SafetensorsFile;
use crate::{PeftError, Result};

/// Name of the file of a model in one file.
pub const BASE_FILE: &str = "model.safetensors";
/// Name of the index of a model in several files.
pub const BASE_INDEX_FILE: &str = "model.safetensors.index.json";
/// What transformers wrote before it had safetensors: pickles.
const PICKLES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];

/// The tensors of a base model on disk, whose headers and index were checked. No value was read.
///
/// Reads are by position and take `&self`, so that several threads may read at once; nothing is mapped into memory. The
/// files are held open, so that one replaced on disk meanwhile is still the one that was checked; one that is cut is an
/// error of the read that meets it.
///
/// Names of files lead nowhere but beside the index. Links are followed, as everywhere in this crate: the cache of
/// Hugging Face is made of them.
///
/// # Memory
///
/// The names, types and shapes.
#[derive(Debug)]
pub struct BaseCheckpoint {
    path: PathBuf,
    shards: Vec<SafetensorsFile>,
    /// Which of the files holds a tensor.
    tensors: BTreeMap<String, usize>,
}

/// What is known of one tensor of a [`BaseCheckpoint`] before its values are read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BaseTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape, as in the file.
    pub shape: &'a [usize],
    /// How many bytes its values have.
    pub num_bytes: usize,
    /// The file that holds it.
    pub file: &'a Path,
}

impl BaseCheckpoint {
    /// Opens a safetensors file; or a directory with [`BASE_FILE`], or else [`BASE_INDEX_FILE`] and the files it names; or
    /// an index by its own path, which ends in `.index.json`. Where a directory has both, the single file is the model, as
    /// in transformers.
    ///
    /// # Errors
    ///
    /// [`PeftError::Io`]; [`PeftError::Malformed`] for a directory without either file, for what is no whole safetensors
    /// file (cut, say), for what is no index or names more than [`MAX_SHARDS`] files, and for more tensors than
    /// [`MAX_INDEX_TENSORS`]; [`PeftError::Index`] with all that an index says and the files do not bear out: files and
    /// tensors that are missing, misplaced, unlisted or there twice, names that lead elsewhere, a wrong total size;
    /// [`PeftError::Json`] for a key twice.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.as_os_str().to_string_lossy().ends_with(".index.json") {
            return Self::open_sharded(path);
        }
        if !path.is_dir() {
            return Self::open_single(path);
        }
        // A link that leads nowhere is an error of the file it stands for, not a reason to take another.
        let is_there = |name: &str| path.join(name).symlink_metadata().is_ok();
        if is_there(BASE_FILE) {
            return Self::open_single(&path.join(BASE_FILE));
        }
        if is_there(BASE_INDEX_FILE) {
            return Self::open_sharded(&path.join(BASE_INDEX_FILE));
        }
        let mut reason = format!("neither {BASE_FILE} nor {BASE_INDEX_FILE} is there");
        if let Some(pickle) = PICKLES.iter().find(|name| is_there(name)) {
            reason += &format!("; {pickle} is a pickle, which is never read");
        }
        Err(PeftError::Malformed {
            path: path.to_owned(),
            reason,
        })
    }

    fn open_single(path: &Path) -> Result<Self> {
        // It is read by parts, whose sizes are bounded.
        let file = SafetensorsFile::open(path, u64::MAX)?;
        Ok(Self {
            path: path.to_owned(),
            tensors: file
                .tensors()
                .keys()
                .map(|name| (name.clone(), 0))
                .collect(),
            shards: vec![file],
        })
    }

    fn open_sharded(path: &Path) -> Result<Self> {
        let index = Index::read(path)?;
        let mut names: Vec<&String> = index.weight_map.values().collect();
        names.sort();
        names.dedup();
        if names.len() > MAX_SHARDS {
            return Err(PeftError::Malformed {
                path: path.to_owned(),
                reason: format!("{} files: at most {MAX_SHARDS} are read", names.len()),
            });
        }
        let mut faults = Vec::new();
        for name in &names {
            if path.with_file_name(name).symlink_metadata().is_err() {
                let file = (*name).clone();
                faults.push(IndexFault::MissingShard { file });
            }
        }
        refuse(path, faults)?;
        let (mut shards, mut tensors) = (Vec::with_capacity(names.len()), BTreeMap::new());
        let mut faults = Vec::new();
        let (mut total_size, mut count) = (0_u64, 0);
        for (shard, name) in names.iter().enumerate() {
            let file = SafetensorsFile::open(&path.with_file_name(name), u64::MAX)?;
            // Those that stand twice too: one file under many names has no more names than one.
            count += file.tensors().len();
            if count > MAX_INDEX_TENSORS {
                return Err(PeftError::Malformed {
                    path: path.to_owned(),
                    reason: format!("more than {MAX_INDEX_TENSORS} tensors"),
                });
            }
            for (tensor, info) in file.tensors() {
                match tensors.entry(tensor.clone()) {
                    Entry::Vacant(place) => {
                        place.insert(shard);
                        total_size = total_size.saturating_add(num_bytes(info) as u64);
                    }
                    Entry::Occupied(place) => faults.push(IndexFault::Duplicate {
                        tensor: tensor.clone(),
                        files: [names[*place.get()], name].map(|name| name.clone()),
                    }),
                }
            }
            shards.push(file);
        }
        for (tensor, &shard) in &tensors {
            let (tensor, found) = (tensor.clone(), names[shard].clone());
            faults.extend(match index.weight_map.get(&tensor) {
                None => Some(IndexFault::Unlisted {
                    tensor,
                    file: found,
                }),
                // Where it stands twice, that was said.
                Some(expected)
                    if *expected != found && !holds(&shards, &names, expected, &tensor) =>
                {
                    Some(IndexFault::Misplaced {
                        tensor,
                        expected: expected.clone(),
                        found,
                    })
                }
                Some(_) => None,
            });
        }
        for (tensor, file) in &index.weight_map {
            if !tensors.contains_key(tensor) {
                let (tensor, file) = (tensor.clone(), file.clone());
                faults.push(IndexFault::MissingTensor { tensor, file });
            }
        }
        // Of other tensors than those listed the sum says nothing.
        if faults.is_empty() {
            index.check_total_size(total_size, &mut faults);
        }
        refuse(path, faults)?;
        Ok(Self {
            path: path.to_owned(),
            shards,
            tensors,
        })
    }

    /// The file, or the index where there are several.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that hold the tensors, sorted by name.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.shards.iter().map(SafetensorsFile::path)
    }

    /// Every tensor, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = BaseTensor<'_>> {
        self.tensors.keys().filter_map(|name| self.tensor(name))
    }

    /// What is known of the tensor `name`, if there is one.
    pub fn tensor(&self, name: &str) -> Option<BaseTensor<'_>> {
        let file = &self.shards[*self.tensors.get(name)?];
        let (name, info) = file.tensors().get_key_value(name)?;
        Some(BaseTensor {
            name,
            dtype: info.dtype,
            shape: &info.shape,
            num_bytes: num_bytes(info),
            file: file.path(),
        })
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Bytes of the values of all tensors.
    pub fn num_bytes(&self) -> u64 {
        let bytes = self.tensors().map(|tensor| tensor.num_bytes as u64);
        bytes.sum()
    }

    /// Fills `out` with the bytes of the tensor `name` from its byte `offset` on, little-endian as they are in the file.
    /// May be called from several threads at once.
    ///
    /// # Errors
    ///
    /// [`PeftError::Malformed`] for a tensor that is not there, for bytes beyond its end, and if its file was cut since
    /// it was opened; [`PeftError::Io`].
    pub fn read_at(&self, name: &str, offset: usize, out: &mut [u8]) -> Result<()> {
        self.shard(name)?.read_at(name, offset, out)
    }

    /// All bytes of the tensor `name`, little-endian as they are in the file: its
    /// [`num_bytes`](BaseTensor::num_bytes), which the file was seen to have, are allocated.
    ///
    /// # Errors
    ///
    /// As [`read_at`](Self::read_at).
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let file = self.shard(name)?;
        let mut bytes = vec![0; file.tensors().get(name).map_or(0, num_bytes)];
        file.read_at(name, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Where a tensor lies: which file, and from which byte of its values on.
    pub(super) fn place(&self, name: &str) -> Option<(usize, usize)> {
        let shard = *self.tensors.get(name)?;
        let info = self.shards[shard].tensors().get(name)?;
        Some((shard, info.data_offsets.0))
    }

    fn shard(&self, name: &str) -> Result<&SafetensorsFile> {
        let shard = self.tensors.get(name);
        let shard = shard.ok_or_else(|| PeftError::Malformed {
            path: self.path.clone(),
            reason: format!("there is no tensor `{}`", name.escape_debug()),
        })?;
        Ok(&self.shards[*shard])
    }
}

fn num_bytes(info: &TensorInfo) -> usize {
    info.data_offsets.1 - info.data_offsets.0
}

/// Whether the file of this name holds the tensor.
fn holds(shards: &[SafetensorsFile], names: &[&String], file: &str, tensor: &str) -> bool {
    let file = names.iter().position(|name| *name == file);
    file.is_some_and(|file| shards[file].tensors().contains_key(tensor))
}
