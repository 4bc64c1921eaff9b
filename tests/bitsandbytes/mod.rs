//! Checkpoints in four bits, in bitsandbytes' format: read, written, refused.
//!
//! Those of `tests/golden/bitsandbytes` were written by transformers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::format::{BaseCheckpoint, BaseOptions, Dtype};
use burn_peft::model::PeftModel;
use sha2::{Digest, Sha256};

mod golden;
mod hostile;
mod linears;
mod saving;

use llama::config::LlamaConfig;
use llama::model::LlamaForCausalLm;

/// A file of the goldens.
fn golden(path: &str) -> PathBuf {
    crate::golden("bitsandbytes").join(path)
}

/// A Llama of the golden `name` without values.
fn empty(name: &str) -> PeftModel<LlamaForCausalLm> {
    let config = LlamaConfig::from_dir(&golden(name)).unwrap();
    PeftModel::new(config.init(&Device::default()))
}

/// The Llama of the golden `name`.
fn load(name: &str, options: &BaseOptions) -> PeftModel<LlamaForCausalLm> {
    let mut model = empty(name);
    model.load_base(golden(name), options).unwrap();
    model
}

/// The tensors of a checkpoint: type, shape and bytes.
fn tensors(path: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let checkpoint = BaseCheckpoint::open(path).unwrap();
    let tensors = checkpoint.tensors().map(|tensor| {
        let bytes = checkpoint.read(tensor.name).unwrap();
        let found = (tensor.dtype, tensor.shape.to_vec(), bytes);
        (tensor.name.to_owned(), found)
    });
    tensors.collect()
}

/// `digests.json` of a golden.
fn digests(name: &str) -> BTreeMap<String, String> {
    let text = fs::read_to_string(golden(name).join("digests.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// As in `digests.json`, of a weight in Burn's layout `[d_in, d_out]`.
fn digest(weight: Tensor<2>) -> String {
    let values = weight.transpose().into_data().try_to_vec::<f32>().unwrap();
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Tokens and logits of a golden.
fn expected(name: &str) -> (Tensor<2, Int>, TensorData) {
    let tensors = tensors(&golden(name).join("expected.safetensors"));
    let (_, shape, bytes) = &tensors["input_ids"];
    let (values, _) = bytes.as_chunks();
    let ids: Vec<i64> = values
        .iter()
        .map(|bytes| i64::from_le_bytes(*bytes))
        .collect();
    let ids = Tensor::from_data(TensorData::new(ids, shape.clone()), &Device::default());
    let (_, shape, bytes) = &tensors["logits"];
    let (values, _) = bytes.as_chunks();
    let logits: Vec<f32> = values
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect();
    (ids, TensorData::new(logits, shape.clone()))
}

fn largest_difference(a: &TensorData, b: &TensorData) -> f32 {
    assert_eq!(a.shape(), b.shape());
    let pairs = a.iter::<f32>().zip(b.iter::<f32>());
    let differences = pairs.map(|(a, b)| (a - b).abs());
    // Not `f32::max`, which drops NaN.
    differences.fold(0.0, |most, found| if found <= most { most } else { found })
}
