//! Checkpoints written for tests.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn_peft::PeftError;
use burn_peft::format::{BASE_INDEX_FILE, BaseCheckpoint, Dtype};
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A tensor whose bytes are a pattern of its name.
pub fn tensor(name: &str, dtype: Dtype, shape: &[usize]) -> Tensor {
    let len = shape.iter().product::<usize>() * dtype.bitsize() / 8;
    let seed: usize = name.bytes().map(usize::from).sum();
    Tensor {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
        bytes: (0..len).map(|i| ((i * 7 + seed) % 251) as u8).collect(),
    }
}

/// The bytes of a safetensors file.
pub fn serialize(tensors: &[Tensor]) -> Vec<u8> {
    let views = tensors.iter().map(|tensor| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
        (tensor.name.as_str(), view.unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// A directory that is gone afterwards.
pub struct Dir(TempDir);

impl Dir {
    pub fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Self {
        fs::write(self.file(name), bytes).unwrap();
        self
    }

    pub fn tensors(&self, file: &str, tensors: &[Tensor]) -> &Self {
        self.write(file, serialize(tensors))
    }

    /// Files by name with their tensors, and the index that is true of them.
    pub fn sharded(&self, shards: &[(&str, Vec<Tensor>)]) -> Value {
        let (mut map, mut size) = (Map::new(), 0);
        for (file, tensors) in shards {
            self.tensors(file, tensors);
            for tensor in tensors {
                size += tensor.bytes.len();
                map.insert(tensor.name.clone(), json!(file));
            }
        }
        let index = json!({"metadata": {"total_size": size}, "weight_map": map});
        self.index(&index);
        index
    }

    pub fn index(&self, index: &Value) -> &Self {
        self.write(BASE_INDEX_FILE, index.to_string())
    }

    pub fn open(&self) -> Result<BaseCheckpoint, PeftError> {
        BaseCheckpoint::open(self.path())
    }
}

/// Everything in a checkpoint, by the ways of reading there are.
pub fn content(checkpoint: &BaseCheckpoint) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let tensors = checkpoint.tensors().map(|tensor| {
        let bytes = checkpoint.read(tensor.name).unwrap();
        assert_eq!(bytes.len(), tensor.num_bytes);
        let value = (tensor.dtype, tensor.shape.to_vec(), bytes);
        (tensor.name.to_owned(), value)
    });
    tensors.collect()
}
