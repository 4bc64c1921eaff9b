//! The tensors of a Hugging Face directory: one safetensors file, or several with an index.
//!
//! Opening reads and checks only the headers. A tensor is read by position when it is asked for, so a model larger
//! than memory can be quantised weight by weight. Burn's own `SafetensorsStore` reads one file, maps it into memory
//! and keeps the file's element type.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::error::{LlamaError, Result};

/// Largest header read, in bytes; real ones have about 150 bytes a tensor.
const MAX_HEADER: u64 = 64 << 20;

/// One tensor in a file that was opened and checked.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    /// The file.
    pub path: PathBuf,
    /// Shape in the file.
    pub shape: Vec<usize>,
    dtype: Dtype,
    start: u64,
    length: usize,
}

/// All tensors of a directory by name.
pub type Checkpoint = BTreeMap<String, StoredTensor>;

/// Opens `dir/model.safetensors`, or else the files named by `dir/model.safetensors.index.json`.
///
/// # Errors
///
/// When a file is absent, is no whole safetensors file, is named by the index outside the directory, or when two
/// files hold a tensor of the same name.
pub fn open(dir: &Path) -> Result<Checkpoint> {
    let single = dir.join("model.safetensors");
    let index = dir.join("model.safetensors.index.json");
    let files = if !single.exists() && index.exists() {
        shards(&index)?
    } else {
        vec![single]
    };
    let mut checkpoint = Checkpoint::new();
    for file in files {
        for (name, tensor) in read_header(&file)? {
            if let Some(other) = checkpoint.get(&name) {
                let reason = format!("tensor `{name}` is also in {}", other.path.display());
                return Err(LlamaError::File { path: file, reason });
            }
            checkpoint.insert(name, tensor);
        }
    }
    Ok(checkpoint)
}

/// The files an index names, each once.
fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(index).map_err(LlamaError::io(index))?;
    let index_content: Index = serde_json::from_str(&text).map_err(LlamaError::file(index))?;
    let names: BTreeSet<String> = index_content.weight_map.into_values().collect();
    names
        .into_iter()
        .map(|name| {
            if Path::new(&name).file_name() != Some(name.as_ref()) {
                let reason = format!("`{name}` is not the name of a file beside it");
                return Err(LlamaError::File {
                    path: index.to_owned(),
                    reason,
                });
            }
            Ok(index.with_file_name(name))
        })
        .collect()
}

/// Reads and checks the header of one file.
fn read_header(path: &Path) -> Result<Checkpoint> {
    let broken = |reason: String| LlamaError::File {
        path: path.to_owned(),
        reason,
    };
    let mut file = File::open(path).map_err(LlamaError::io(path))?;
    let size = file.metadata().map_err(LlamaError::io(path))?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(LlamaError::io(path))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER || length > size - 8 {
        return Err(broken(format!(
            "a header of {length} bytes in a file of {size}"
        )));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(LlamaError::io(path))?;
    // Parsing checks that offsets and shapes agree and that the tensors leave no gap and do not overlap.
    let metadata: Metadata = serde_json::from_slice(&header).map_err(LlamaError::file(path))?;
    let (expected, found) = (metadata.data_len() as u64, size - 8 - length);
    if expected != found {
        return Err(broken(format!(
            "the header describes {expected} bytes of data, the file has {found}"
        )));
    }
    Ok(metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let (start, end) = info.data_offsets;
            let tensor = StoredTensor {
                path: path.to_owned(),
                shape: info.shape.clone(),
                dtype: info.dtype,
                start: 8 + length + start as u64,
                length: end - start,
            };
            (name, tensor)
        })
        .collect())
}

impl StoredTensor {
    /// The element type in Burn's terms. Error: anything but F32, F16, BF16; `name` only names the tensor in it.
    pub fn dtype(&self, name: &str) -> Result<DType> {
        match self.dtype {
            Dtype::F32 => Ok(DType::F32),
            Dtype::F16 => Ok(DType::F16),
            Dtype::BF16 => Ok(DType::BF16),
            other => Err(LlamaError::DType {
                path: self.path.clone(),
                tensor: name.to_owned(),
                found: other.to_string(),
            }),
        }
    }

    /// Reads the values, which are of type `dtype`. Error: the operating system's.
    pub fn read(&self, dtype: DType) -> Result<TensorData> {
        let mut bytes = vec![0; self.length];
        File::open(&self.path)
            .and_then(|mut file| {
                file.seek(SeekFrom::Start(self.start))?;
                file.read_exact(&mut bytes)
            })
            .map_err(LlamaError::io(&self.path))?;
        Ok(TensorData::from_bytes_vec(bytes, self.shape.clone(), dtype))
    }
}
