//! Bytes by what they are stored as, before and after adapters: nothing is upcast.

use burn::module::{Module, ModuleMapper, Param, Quantizer};
use burn::tensor::quantization::{Calibration, QuantValue};
use burn::tensor::{DType, FloatDType, Tensor};
use burn_peft::adapter::LoraConfig;
use burn_peft::layer::Nf4Linear;
use burn_peft::model::{PeftConfig, PeftModel, Storage, Stored, TargetConfig};
use burn_peft::nf4::Nf4Config;

use crate::model::{Net, WIDTH, device, input};

struct Bf16;

impl ModuleMapper for Bf16 {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(FloatDType::BF16).detach())
    }
}

#[test]
fn a_bf16_base_stays_bf16_under_adapters() {
    let device = device();
    let net = Net::new(&device);
    let params = net.num_params();
    let fresh = Storage::of(&net);
    assert_eq!(fresh.bytes_of(Stored::Uninitialized), 4 * params);
    let net = net.map(&mut Bf16);
    let before = Storage::of(&net);
    assert_eq!(before.bytes(), 2 * params);
    assert_eq!(before.bytes_of(Stored::Dense(DType::BF16)), 2 * params);

    let mut model = PeftModel::new(net);
    assert_eq!(Storage::of(&model), before);
    let targets = TargetConfig::list(["up", "down"]);
    let nf4 = Nf4Config::new();
    let packed = model.quantize_nf4(&targets, &nf4).unwrap();
    let adapter = PeftConfig::new(LoraConfig::new(2), targets);
    let report = model.add_adapter("default", &adapter).unwrap();
    // Forward passes, too, leave every parameter what it is.
    let y = model.forward_peft(input(&device).cast(FloatDType::BF16));
    assert_eq!(y.dtype(), DType::BF16);
    let after = Storage::of(&model);
    let dense = Stored::Dense(DType::BF16);
    let left = 2 * (params - packed.weights * WIDTH * 48);
    assert_eq!(after.bytes_of(dense), left);
    assert_eq!(after.bytes_of(Stored::Nf4), packed.packed_bytes);
    let factors = after.bytes_of(Stored::Dense(DType::F32));
    assert_eq!(factors, report.model.adapter_bytes);
    assert_eq!(after.bytes(), left + packed.packed_bytes + factors);

    let table = before.beside(&after).to_string();
    for line in [
        format!("bf16 {} {left}", 2 * params),
        format!("nf4 0 {}", packed.packed_bytes),
        format!("f32 0 {factors}"),
        format!("all {} {}", before.bytes(), after.bytes()),
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        let found = |row: &str| row.split_whitespace().eq(words.iter().copied());
        assert!(table.lines().any(found), "{line} in\n{table}");
    }
}

#[test]
fn a_quantisation_of_burns_counts_its_values() {
    for (value, bits) in [(QuantValue::Q8S, 8), (QuantValue::Q4S, 4)] {
        let scheme = device().settings().quantization.scheme.with_value(value);
        let linear = burn::nn::LinearConfig::new(64, 32)
            .with_bias(false)
            .init(&device().inner());
        let quantized = linear.quantize_weights(&mut Quantizer::new(Calibration::MinMax, scheme));
        assert_eq!(Storage::of(&quantized).bytes(), 64 * 32 * bits / 8);
    }
}

#[test]
fn a_packed_layer_of_its_own_is_packed_too() {
    let linear = burn::nn::LinearConfig::new(64, 64).init(&device());
    let layer = Nf4Linear::from_linear(linear, &Nf4Config::new()).unwrap();
    let storage = Storage::of(&layer);
    assert_eq!(storage.bytes_of(Stored::Nf4), layer.weight.num_bytes());
    // And the bias.
    assert_eq!(storage.bytes(), layer.weight.num_bytes() + 4 * 64);
    assert!(storage.to_string().contains("nf4"), "{storage}");
}
