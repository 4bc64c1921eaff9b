//! PEFT's adapter directory: reading what PEFT wrote, writing what PEFT reads, and refusing the rest.

mod base_values;
mod config;
mod conv1d;
mod folders;
mod golden;
mod keys;
mod kinds;
mod loading;
mod model;
mod public;
mod tensors;
mod tied;
mod writers;

use crate::kinds_model;

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use burn_peft::format::{
    AdapterConfig, AdapterFile, CONFIG_FILE, LoraTensors, ReadOptions, WEIGHTS_FILE, WriteOptions,
};
use burn_peft::model::TargetConfig;
use burn_peft::{PeftError, Result};
use serde_json::{Value, json};

/// The directory of an adapter that PEFT wrote.
fn golden(name: &str) -> PathBuf {
    crate::golden("peft").join(name)
}

fn read(dir: &Path) -> Result<AdapterFile> {
    AdapterFile::read(dir, &ReadOptions::default())
}

/// A module with factors of given shapes and distinct values.
fn module(path: &str, r: usize, d_in: usize, d_out: usize) -> LoraTensors {
    let values = |n: usize| (0..n).map(|i| 0.5 + i as f32).collect::<Vec<_>>();
    LoraTensors::new(
        path,
        TensorData::new(values(r * d_in), [r, d_in]),
        TensorData::new(values(d_out * r), [d_out, r]),
    )
}

/// A small adapter of two modules.
fn adapter() -> AdapterFile {
    AdapterFile::new(
        AdapterConfig::new(2, 3.5, TargetConfig::list(["q", "v"])).with_task_type("CAUSAL_LM"),
        vec![module("layers.0.q", 2, 3, 4), module("layers.0.v", 2, 3, 2)],
    )
}

/// A directory that holds `adapter()`, whose files a test may then spoil.
struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        adapter()
            .write(dir.path(), &WriteOptions::default())
            .unwrap();
        Self { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Sets a key of the configuration.
    fn set(&self, key: &str, value: Value) -> &Self {
        let text = fs::read(self.file(CONFIG_FILE)).unwrap();
        let mut object: Value = serde_json::from_slice(&text).unwrap();
        object[key] = value;
        self.config(&object.to_string())
    }

    /// Replaces the text of the configuration.
    fn config(&self, text: &str) -> &Self {
        fs::write(self.file(CONFIG_FILE), text).unwrap();
        self
    }

    /// Replaces the tensors by those of `header`, a JSON object of safetensors, and `data`.
    fn tensors(&self, header: &Value, data: &[u8]) -> &Self {
        let header = header.to_string();
        let length = (header.len() as u64).to_le_bytes();
        self.weights(&[&length, header.as_bytes(), data].concat())
    }

    /// Replaces the bytes of the tensors' file.
    fn weights(&self, bytes: &[u8]) -> &Self {
        fs::write(self.file(WEIGHTS_FILE), bytes).unwrap();
        self
    }

    fn error(&self) -> PeftError {
        read(self.path()).unwrap_err()
    }
}

/// The error inside one that names `file`.
fn inside<'a>(error: &'a PeftError, file: &str) -> &'a PeftError {
    match error {
        PeftError::InFile { path, source } if path.ends_with(file) => source,
        other => panic!("names no {file}: {other}"),
    }
}

/// Header of one F32 tensor that fills `data`.
fn f32_entry(shape: &[usize], begin: usize) -> Value {
    let end = begin + 4 * shape.iter().product::<usize>();
    json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]})
}
