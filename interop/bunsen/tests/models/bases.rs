//! Checkpoints of transformers and torchvision.

use burn::tensor::Device;
use burn_peft::model::PeftModel;
use burn_peft::nf4::Nf4Config;

use crate::golden::{Golden, directory};
use crate::network::Network;

/// The model of `data/`, with the weights of its checkpoint.
pub fn base<N: Network>(device: &Device) -> PeftModel<N> {
    let mut model = PeftModel::new(N::fresh(device)).with_head(N::HEAD);
    let report = model.load_base(directory::<N>(), &N::options()).unwrap();
    assert!(report.left.is_empty(), "{report}");
    model
}

/// The same, packed in NF4 while it is read.
pub fn packed<N: Network>(device: &Device) -> PeftModel<N> {
    let mut model = PeftModel::new(N::fresh(device)).with_head(N::HEAD);
    let options = N::options().with_nf4(N::packed(), Nf4Config::new());
    let report = model.load_base(directory::<N>(), &options).unwrap();
    assert!(report.packed > 0, "{report}");
    model
}

pub fn is_loaded<N: Network>() {
    let (device, golden) = (Device::default(), Golden::of::<N>());
    let model = base::<N>(&device);
    let logits = model.logits(N::input(&golden, &device));
    golden.assert_equal(logits, "logits", "logits_nf4");
}

pub fn is_packed<N: Network>() {
    let (device, golden) = (Device::default(), Golden::of::<N>());
    let logits = packed::<N>(&device).logits(N::input(&golden, &device));
    golden.assert_equal(logits.clone(), "logits_nf4", "logits");

    // Packed after loading: the same codes and scales.
    let mut model = base::<N>(&device);
    model.quantize_nf4(&N::packed(), &Nf4Config::new()).unwrap();
    let again = model.logits(N::input(&golden, &device));
    assert_eq!(again.into_data(), logits.into_data());
}
