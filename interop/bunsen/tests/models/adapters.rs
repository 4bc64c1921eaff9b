//! Adapters of PEFT.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::Device;
use burn_peft::format::{LoadOptions, SaveBaseOptions, SaveOptions};
use burn_peft::model::PeftModel;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::bases::{base, packed};
use crate::golden::{Golden, Output, directory};
use crate::network::Network;

fn load_options<N: Network>() -> LoadOptions {
    LoadOptions {
        names: N::names(),
        ..Default::default()
    }
}

pub fn save_options<N: Network>() -> SaveOptions {
    SaveOptions {
        names: N::names(),
        overwrite: true,
        ..Default::default()
    }
}

/// Puts the adapter of `data/` on a model.
fn with_adapter<N: Network>(mut model: PeftModel<N>) -> PeftModel<N> {
    let dir = directory::<N>().join("adapter");
    let report = model
        .load_adapter("default", &dir, &load_options::<N>())
        .unwrap();
    let file = fs::read(dir.join("adapter_model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap().len();
    assert_eq!(report.loaded.len(), tensors, "{report}");
    model
}

pub fn is_loaded<N: Network>() {
    let (device, golden) = (Device::default(), Golden::of::<N>());
    let model = with_adapter(base::<N>(&device));
    let input = N::input(&golden, &device);
    golden.assert_equal(model.logits(input.clone()), "logits_adapter", "logits");
    golden.assert_equal(model.disabled().logits(input), "logits", "logits_adapter");
}

pub fn is_loaded_over_nf4<N: Network>() {
    let (device, golden) = (Device::default(), Golden::of::<N>());
    let model = with_adapter(packed::<N>(&device));
    let logits = model.logits(N::input(&golden, &device));
    golden.assert_equal(logits, "logits_nf4_adapter", "logits_nf4");
}

/// Its tensors, by their names, and its configuration.
fn files(dir: &Path) -> (BTreeMap<String, (Vec<usize>, Vec<u8>)>, Value) {
    let bytes = fs::read(dir.join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(name, tensor)| {
        let values = (tensor.shape().to_vec(), tensor.data().to_vec());
        (name.to_owned(), values)
    });
    let config = fs::read(dir.join("adapter_config.json")).unwrap();
    (tensors.collect(), serde_json::from_slice(&config).unwrap())
}

/// What PEFT wrote comes back bit for bit: so PEFT computes the golden outputs from it.
pub fn is_saved_as_it_was<N: Network>() {
    let device = Device::default();
    let out = Output::new::<N>("resaved");
    let model = with_adapter(base::<N>(&device));
    let dir = model
        .save_adapter("default", out.path(), &save_options::<N>())
        .unwrap();
    let golden = Golden::of::<N>();
    out.write_logits(golden.floats("logits_adapter", &device));
    let ((tensors, config), (expected, pefts)) =
        (files(&dir), files(&directory::<N>().join("adapter")));
    assert_eq!(
        tensors.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    assert!(tensors == expected, "the values differ");
    for key in [
        "r",
        "lora_alpha",
        "use_dora",
        "use_rslora",
        "bias",
        "modules_to_save",
    ] {
        assert_eq!(config[key], pefts[key], "{key}");
    }
}

pub fn is_merged<N: Network>() {
    let (device, golden) = (Device::default(), Golden::of::<N>());
    let model = with_adapter(base::<N>(&device));
    let (merged, _) = model.merge_and_unload().unwrap();
    let logits = merged.logits(N::input(&golden, &device));
    golden.assert_equal(logits.clone(), "logits_adapter", "logits");

    let out = Output::new::<N>("merged");
    out.write_logits(logits);
    let options = SaveBaseOptions {
        names: N::names(),
        overwrite: true,
        config: fs::read_to_string(directory::<N>().join("config.json")).ok(),
        ..Default::default()
    };
    let model = PeftModel::new(merged).with_head(N::HEAD);
    model.save_base(out.path(), &options).unwrap();
    // Loads as the checkpoint did.
    let mut again = PeftModel::new(N::fresh(&device));
    again.load_base(out.path(), &N::options()).unwrap();
    let logits = again.logits(N::input(&golden, &device));
    golden.assert_equal(logits, "logits_adapter", "logits");
}
