//! Training steps: the factors move, the base does not; records and optimisers leave packed bytes alone.

use burn::module::{Module, ModuleMapper, Param, Quantizer};
use burn::nn::LinearLayout;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{DType, FloatDType, Tensor, quantization::Calibration};
use burn_peft::adapter::LoraConfig;
use burn_peft::layer::{LoraLinear, QLoraLinear};
use burn_peft::nf4::Nf4Config;

use crate::layers::{device, linear, random, values};

fn config() -> LoraConfig {
    LoraConfig::new(4).with_alpha(8.0)
}

#[test]
fn two_steps_move_both_factors_and_not_the_base() {
    let device = device();
    device.seed(7);
    let base = linear(64, 32, true, LinearLayout::Row, &device);
    let (x, target) = (random([16, 64], &device), random([16, 32], &device));

    let mut dense = LoraLinear::from_linear(base.clone(), &config()).unwrap();
    let (start, weight) = (dense.clone(), values(&dense.base.weight.val()));
    let mut optimizer = AdamWConfig::new().init();
    let mut losses = Vec::new();
    for _ in 0..2 {
        let loss = (dense.forward(x.clone()) - target.clone())
            .powi_scalar(2)
            .mean();
        losses.push(loss.clone().into_scalar::<f32>());
        let gradients = GradientsParams::from_grads(loss.backward(), &dense);
        dense = optimizer.step(1e-2, dense, gradients);
    }
    assert_ne!(values(&dense.delta.a.val()), values(&start.delta.a.val()));
    assert_ne!(values(&dense.delta.b.val()), values(&start.delta.b.val()));
    assert_eq!(values(&dense.base.weight.val()), weight);
    assert_eq!(
        values(&dense.base.bias.as_ref().unwrap().val()),
        values(&base.bias.unwrap().val())
    );
    let last = (dense.forward(x) - target)
        .powi_scalar(2)
        .mean()
        .into_scalar::<f32>();
    assert!(last < losses[0], "the loss falls: {losses:?}, {last}");
}

/// What a cast of a whole model does to its float parameters.
struct Cast(FloatDType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}

#[test]
fn packed_bytes_survive_whatever_walks_the_parameters() {
    let device = device();
    device.seed(8);
    for double_quant in [false, true] {
        let nf4 = Nf4Config::new().with_double_quant(double_quant);
        let base = linear(64, 32, true, LinearLayout::Row, &device);
        let mut layer = QLoraLinear::from_linear(base, &nf4, &config()).unwrap();
        let bytes = layer.base.weight.to_data();
        let start = layer.clone();

        layer = layer.unfreeze();
        assert!(layer.base.bias.as_ref().unwrap().val().is_require_grad());
        let mut optimizer = AdamWConfig::new().with_weight_decay(0.1).init();
        let x = random([16, 64], &device);
        for _ in 0..10 {
            let loss = layer.forward(x.clone()).powi_scalar(2).mean();
            let gradients = GradientsParams::from_grads(loss.backward(), &layer);
            layer = optimizer.step(1e-2, layer, gradients);
        }
        assert_ne!(values(&layer.delta.a.val()), values(&start.delta.a.val()));
        assert_eq!(
            layer.base.weight.to_data(),
            bytes,
            "ten steps with weight decay"
        );

        let half = layer.clone().map(&mut Cast(FloatDType::BF16));
        assert_eq!(half.delta.a.val().dtype(), DType::BF16);
        assert_eq!(half.base.weight.to_data(), bytes, "a cast to bf16");

        let scheme = device.settings().quantization.scheme;
        let quantized = layer
            .clone()
            .valid()
            .quantize_weights(&mut Quantizer::new(Calibration::MinMax, scheme));
        assert_eq!(quantized.base.weight.to_data(), bytes, "quantize_weights");

        let plain = device.clone().without_autodiff();
        assert_eq!(
            layer.clone().to_device(&device).base.weight.to_data(),
            bytes,
            "to_device"
        );
        assert_eq!(
            layer.clone().fork(&device).base.weight.to_data(),
            bytes,
            "fork"
        );
        assert_eq!(layer.valid().base.weight.to_data(), bytes, "valid");
        assert_eq!(layer.valid().train().base.weight.to_data(), bytes, "train");
        assert_eq!(layer.valid().to_device(&plain).base.weight.to_data(), bytes);

        let other = linear(64, 32, true, LinearLayout::Row, &device);
        let other = QLoraLinear::from_linear(other, &nf4, &config()).unwrap();
        assert_ne!(other.base.weight.to_data(), bytes);
        let record = layer.clone().into_record().into_bytes().unwrap();
        let record = burn::store::ModuleRecord::from_bytes(record).unwrap();
        let loaded = other.load_record(record);
        assert_eq!(loaded.base.weight.to_data(), bytes, "a record");
        assert_eq!(
            values(&loaded.forward(x.clone())),
            values(&layer.forward(x))
        );
    }
}

#[test]
fn only_the_factors_require_a_gradient() {
    let device = device();
    // Burn 0.22 loads a record of its column layout into uninitialised parameters only.
    let base = linear(16, 8, true, LinearLayout::Row, &device);
    let dense = LoraLinear::from_linear(base.clone(), &config()).unwrap();
    let packed = QLoraLinear::from_linear(base, &Nf4Config::new(), &config()).unwrap();
    for dense in [
        dense.clone(),
        dense.clone().valid().train(),
        dense.clone().load_record(dense.into_record()),
    ] {
        assert!(dense.delta.a.val().is_require_grad() && dense.delta.b.val().is_require_grad());
        assert!(!dense.base.weight.val().is_require_grad());
        assert!(!dense.base.bias.as_ref().unwrap().val().is_require_grad());
    }
    for packed in [
        packed.clone(),
        packed.clone().valid().train(),
        packed.clone().load_record(packed.into_record()),
    ] {
        assert!(packed.delta.a.val().is_require_grad() && packed.delta.b.val().is_require_grad());
        assert!(!packed.base.bias.as_ref().unwrap().val().is_require_grad());
    }
}

#[test]
fn display_and_size() {
    let device = device();
    let base = linear(64, 32, true, LinearLayout::Row, &device);
    let packed = QLoraLinear::from_linear(base, &Nf4Config::new(), &config()).unwrap();
    let weight = &packed.base.weight;
    assert_eq!(weight.num_weights(), 64 * 32);
    assert_eq!(weight.num_bytes(), 64 * 32 / 2 + 4 * 32);
    assert_eq!(weight.num_bytes() * 8, 64 * 32 * 9 / 2, "4.5 bits a weight");
    let shown = packed.to_string();
    for part in [
        "d_input: 64",
        "d_output: 32",
        "block_size: 64",
        "double_quant: false",
        "bytes: 1152",
    ] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    // 2^20 weights: 2^19 bytes of codes, 2^14 blocks of one byte each, 64 groups and one offset of four bytes each.
    let base = linear(1024, 1024, false, LinearLayout::Row, &device);
    let double = Nf4Config::new().with_double_quant(true);
    let packed = QLoraLinear::from_linear(base, &double, &config()).unwrap();
    let bytes = packed.base.weight.num_bytes();
    assert_eq!(bytes, (1 << 19) + (1 << 14) + 4 * 64 + 4);
    let bits = 8.0 * bytes as f64 / f64::from(1 << 20);
    assert!((bits - 4.127).abs() < 5e-4, "{bits}");
}
