//! An open checkpoint: the tensors of one safetensors file or of several, read by position.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::index::{Faults, Index, IndexFault, IndexFaultKind};
use super::options::BaseOptions;
use crate::format::{FileLimits, SafetensorsFile};
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
    /// Faults of the index that were passed over.
    faults: Vec<IndexFault>,
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
    /// an index by its own path, which ends in `.json`. Where a directory has both, the single file is the model, as
    /// in transformers.
    ///
    /// # Errors
    ///
    /// [`PeftError::Io`]; [`PeftError::Malformed`] for a directory without either file, for what is no whole safetensors
    /// file (cut, say), for what is no index, and for more than the [limits](FileLimits) allow; [`PeftError::Index`] with all
    /// that an index says and the files do not bear out: files and
    /// tensors that are missing, misplaced, unlisted or there twice, names that lead elsewhere, a wrong total size;
    /// [`PeftError::Json`] for a key twice.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, &BaseOptions::new())
    }

    /// As [`open`](Self::open), as far as `options` concern files: their
    /// [limits](BaseOptions::with_limits) and the [faults of an index](BaseOptions::with_allowed_index_faults) that are passed over.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, options: &BaseOptions) -> Result<Self> {
        let path = path.as_ref();
        let limits = &options.limits;
        let sharded = |path: &Path| Self::open_sharded(path, limits, &options.index_faults);
        let name = path.as_os_str().to_string_lossy();
        if name.ends_with(".json") && !path.is_dir() {
            return sharded(path);
        }
        if !path.is_dir() {
            return Self::from_files_with([path], options);
        }
        // A link that leads nowhere is an error of the file it stands for, not a reason to take another.
        let is_there = |name: &str| path.join(name).symlink_metadata().is_ok();
        if is_there(BASE_FILE) {
            return Self::from_files_with([path.join(BASE_FILE)], options);
        }
        if is_there(BASE_INDEX_FILE) {
            return sharded(&path.join(BASE_INDEX_FILE));
        }
        let mut reason = format!("neither {BASE_FILE} nor {BASE_INDEX_FILE} is there");
        if let Some(pickle) = PICKLES.iter().find(|name| is_there(name)) {
            reason += &format!(
                "; {pickle} is a pickle, which is never read: `AutoModel.from_pretrained(dir).save_pretrained(out)` in Python converts it"
            );
        }
        let others = std::fs::read_dir(path).map_err(PeftError::io(path))?;
        let others = others.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut others: Vec<String> = others
            .filter(|name| name.ends_with(".safetensors") || name.ends_with(".index.json"))
            .collect();
        others.sort();
        if !others.is_empty() {
            others.truncate(4);
            reason += &format!("; there is {others:?}, which can be given by its path");
        }
        Err(PeftError::Malformed {
            path: path.to_owned(),
            reason,
        })
    }

    /// The tensors of these files, without an index: some files of a model, or files that no index names.
    ///
    /// # Errors
    ///
    /// [`PeftError::Io`]; [`PeftError::Malformed`] for what is no whole safetensors file, for a tensor that two files hold, and for
    /// no file at all.
    pub fn from_files<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Self> {
        Self::from_files_with(paths, &BaseOptions::new())
    }

    /// As [`from_files`](Self::from_files), with the limits of `options`.
    ///
    /// # Errors
    ///
    /// As [`from_files`](Self::from_files).
    pub fn from_files_with<P: AsRef<Path>>(
        paths: impl IntoIterator<Item = P>,
        options: &BaseOptions,
    ) -> Result<Self> {
        let (mut shards, mut tensors) = (Vec::new(), BTreeMap::new());
        for path in paths {
            // It is read by parts, whose sizes are bounded.
            let file = SafetensorsFile::open_with(path.as_ref(), u64::MAX, &options.limits)?;
            for name in file.tensors().keys() {
                if let Some(other) = tensors.insert(name.clone(), shards.len()) {
                    let other: &SafetensorsFile = &shards[other];
                    return Err(PeftError::Malformed {
                        path: file.path().to_owned(),
                        reason: format!(
                            "tensor `{}` is in {} too",
                            name.escape_debug(),
                            other.path().display()
                        ),
                    });
                }
            }
            shards.push(file);
        }
        let path = shards.first().map(|file| file.path().to_owned());
        Ok(Self {
            path: path.ok_or_else(|| PeftError::config("files", "none", "at least one file"))?,
            shards,
            tensors,
            faults: Vec::new(),
        })
    }

    fn open_sharded(path: &Path, limits: &FileLimits, allowed: &[IndexFaultKind]) -> Result<Self> {
        let mut faults = Faults::new(allowed);
        let index = Index::read(path, limits, &mut faults)?;
        let malformed = |reason: String| PeftError::Malformed {
            path: path.to_owned(),
            reason,
        };
        if index.files.len() > limits.shards {
            return Err(malformed(format!(
                "{} files: at most {} are read, or `FileLimits::shards`",
                index.files.len(),
                limits.shards
            )));
        }
        let is_there: Vec<bool> = index
            .files
            .iter()
            .map(|name| path.with_file_name(name).symlink_metadata().is_ok())
            .collect();
        for (name, _) in index
            .files
            .iter()
            .zip(&is_there)
            .filter(|(_, there)| !**there)
        {
            let file = name.clone();
            faults.push(IndexFault::MissingShard { file });
        }
        faults.check(path)?;
        let mut shards = Vec::with_capacity(index.files.len());
        let mut tensors: BTreeMap<String, usize> = BTreeMap::new();
        // Which file of the index a shard is.
        let mut of_index = Vec::with_capacity(index.files.len());
        let (mut total_size, mut count) = (0_u64, 0);
        for (place, name) in index
            .files
            .iter()
            .enumerate()
            .filter(|(place, _)| is_there[*place])
        {
            let file = SafetensorsFile::open_with(path.with_file_name(name), u64::MAX, limits)?;
            // Those that stand twice too: one file under many names has no more names than one.
            count += file.tensors().len();
            if count > limits.index_tensors {
                return Err(malformed(format!(
                    "more than {} tensors, or `FileLimits::index_tensors`",
                    limits.index_tensors
                )));
            }
            let shard = shards.len();
            for (tensor, info) in file.tensors() {
                match tensors.entry(tensor.clone()) {
                    Entry::Vacant(entry) => {
                        entry.insert(shard);
                        total_size = total_size.saturating_add(num_bytes(info) as u64);
                    }
                    Entry::Occupied(mut entry) => {
                        let first: usize = of_index[*entry.get()];
                        faults.push(IndexFault::Duplicate {
                            tensor: tensor.clone(),
                            files: [first, place].map(|place| index.files[place].clone()),
                        });
                        entry.insert(shard);
                    }
                }
            }
            shards.push(file);
            of_index.push(place);
        }
        let holds = |place: usize, tensor: &str| {
            let shard = of_index.iter().position(|other| *other == place);
            shard.is_some_and(|shard| shards[shard].tensors().contains_key(tensor))
        };
        for (tensor, &shard) in &tensors {
            let found = of_index[shard];
            match index.weight_map.get(tensor) {
                None => faults.push(IndexFault::Unlisted {
                    tensor: tensor.clone(),
                    file: index.files[found].clone(),
                }),
                // Where it stands twice, that was said.
                Some(&expected) if expected != found && !holds(expected, tensor) => {
                    faults.push(IndexFault::Misplaced {
                        tensor: tensor.clone(),
                        expected: index.files[expected].clone(),
                        found: index.files[found].clone(),
                    });
                }
                Some(_) => {}
            }
        }
        for (tensor, &file) in &index.weight_map {
            // Of a file that is missing, that was said.
            if !tensors.contains_key(tensor) && is_there[file] {
                let (tensor, file) = (tensor.clone(), index.files[file].clone());
                faults.push(IndexFault::MissingTensor { tensor, file });
            }
        }
        // Of other tensors than those listed the sum says nothing.
        if faults.is_empty() {
            index.check_total_size(total_size, &mut faults);
        }
        faults.check(path)?;
        Ok(Self {
            path: path.to_owned(),
            shards,
            tensors,
            faults: faults.passed,
        })
    }

    /// The faults of the index that were [passed over](BaseOptions::with_allowed_index_faults).
    pub fn index_faults(&self) -> &[IndexFault] {
        &self.faults
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
