//! Files that somebody broke, by accident or on purpose, and disks and processes that fail: what an adapter's directory
//! can do to its reader, and what saving one leaves behind.
//!
//! `docs/hostile.md` lists every attack with its test and its outcome. Loading is into a model that has an adapter
//! already; whatever is refused must leave its parameters, ids, adapters and outputs as they were, to the bit, and may not
//! allocate more than a small multiple of what the files weigh.
//!
//! `BURN_PEFT_LONG=1` tries every byte at every place, where otherwise a sample is tried.

mod bytes;
mod config;
mod digest;
mod header;
mod kill;
mod paths;
mod saving;
mod table;
mod tensors;
mod values;
mod victim;

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use burn_peft::PeftError;
use burn_peft::format::{
    AdapterConfig, AdapterFile, CONFIG_FILE, LoraTensors, ReadOptions, WEIGHTS_FILE, WriteOptions,
};
use burn_peft::model::TargetConfig;
use peak_alloc::PeakAlloc;
use serde_json::{Value, json};

use victim::Victim;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Modules of `Victim`'s model, whose factors are `[2, 6]` and `[6, 2]`.
const MODULES: [&str; 2] = ["blocks.0.query", "blocks.1.query"];

/// Key of a factor, `A` or `B`, of the module at `path`, as PEFT writes it.
fn key(path: &str, factor: &str) -> String {
    format!("base_model.model.{path}.lora_{factor}.weight")
}

/// A module with factors of given shapes and distinct values, that begin with `first`.
fn module(path: &str, r: usize, [d_in, d_out]: [usize; 2], first: f32) -> LoraTensors {
    let values = |n: usize| (0..n).map(|i| first + i as f32 / 8.0).collect::<Vec<_>>();
    LoraTensors::new(
        path,
        TensorData::new(values(r * d_in), [r, d_in]),
        TensorData::new(values(d_out * r), [d_out, r]),
    )
}

/// A small adapter that fits the model, with values and an alpha that tell it from others.
fn adapter(first: f32) -> AdapterFile {
    AdapterFile::new(
        AdapterConfig::new(2, f64::from(first), TargetConfig::list(["query"])),
        MODULES.map(|path| module(path, 2, [6, 6], first)).into(),
    )
}

const OVERWRITE: WriteOptions = WriteOptions {
    overwrite: true,
    keep_existing: false,
    digest: false,
};

/// A directory that holds `adapter(0.5)`, whose files a test may then spoil.
struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Self {
        Self::of(&adapter(0.5), false)
    }

    fn of(adapter: &AdapterFile, digest: bool) -> Self {
        Self::at(tempfile::tempdir().unwrap(), adapter, digest)
    }

    /// In memory where the system has a place for that: to write a file again waits for some disks, and who writes it ten
    /// thousand times waits for a minute.
    fn in_memory(adapter: &AdapterFile, digest: bool) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        Self::at(dir.unwrap(), adapter, digest)
    }

    fn at(dir: tempfile::TempDir, adapter: &AdapterFile, digest: bool) -> Self {
        let options = WriteOptions {
            digest,
            ..Default::default()
        };
        adapter.write(dir.path(), &options).unwrap();
        Self { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.file(name)).unwrap()
    }

    /// Sets a key of the configuration.
    fn set(&self, key: &str, value: Value) -> &Self {
        let mut object: Value = serde_json::from_slice(&self.bytes(CONFIG_FILE)).unwrap();
        object[key] = value;
        self.config(object.to_string())
    }

    /// Replaces the text of the configuration.
    fn config(&self, text: impl AsRef<[u8]>) -> &Self {
        fs::write(self.file(CONFIG_FILE), text).unwrap();
        self
    }

    /// Replaces the file of tensors by this header and these values.
    fn tensors(&self, header: impl AsRef<[u8]>, values: &[u8]) -> &Self {
        let header = header.as_ref();
        let length = (header.len() as u64).to_le_bytes();
        self.weights(&[&length, header, values].concat())
    }

    /// Replaces the file of tensors by these, of zeros: name, type, bytes of a value, shape.
    fn zeros(&self, tensors: &[(String, &str, usize, &[usize])]) -> &Self {
        let mut header = json!({});
        let mut end = 0;
        for (name, dtype, size, shape) in tensors {
            let begin = end;
            end += size * shape.iter().product::<usize>();
            header[name] = json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]});
        }
        self.tensors(header.to_string(), &vec![0; end])
    }

    /// Replaces the bytes of the file of tensors.
    fn weights(&self, bytes: &[u8]) -> &Self {
        fs::write(self.file(WEIGHTS_FILE), bytes).unwrap();
        self
    }

    /// The error of loading it, after which the model is as it was.
    fn refused(&self) -> PeftError {
        Victim::new().refuses(self.path())
    }

    /// [`refused`](Self::refused), inside an error that names this file.
    fn refused_in(&self, file: &str) -> PeftError {
        match self.refused() {
            PeftError::InFile { path, source } if path == self.file(file) => *source,
            other => panic!("names no {file}: {other}"),
        }
    }

    /// The reason for which one of the two files, which the error names, is not what its place demands.
    fn malformed(&self, file: &str) -> String {
        match self.refused() {
            PeftError::Malformed { path, reason } if path == self.file(file) => reason,
            other => panic!("not a malformed {file}: {other}"),
        }
    }

    fn read(&self) -> Result<AdapterFile, PeftError> {
        AdapterFile::read(self.path(), &ReadOptions::default())
    }
}

/// Names of the files in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Whether to try everything, however long it takes.
fn long() -> bool {
    std::env::var_os("BURN_PEFT_LONG").is_some_and(|value| value == "1")
}
