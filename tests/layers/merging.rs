//! Merging: exact in f32, once rounded otherwise, and lossy into NF4.

use burn::nn::LinearLayout;
use burn::tensor::{DType, FloatDType, Tensor};
use burn_peft::adapter::LoraConfig;
use burn_peft::layer::{Adapted, FrozenLinear, Nf4Linear};
use burn_peft::nf4::Nf4Config;

use crate::layers::{device, linear, lora, max_diff, random, scale, values};

#[test]
fn a_merged_packed_layer_is_dense_and_computes_the_same() {
    let device = device();
    device.seed(9);
    let base = linear(48, 40, true, LinearLayout::Row, &device);
    let base = Nf4Linear::from_linear(base, &Nf4Config::new()).unwrap();
    let layer = Adapted {
        base,
        delta: lora(&LoraConfig::new(4).with_alpha(2.0), 48, 40, &device),
    };
    let (merged, report) = layer.merge();
    assert_eq!(report.max_cast_error, 0.0, "f32 is cast to itself");
    assert_eq!(merged.weight.val().dims(), [48, 40]);
    assert!(!merged.weight.val().is_require_grad());
    let x = random([6, 48], &device);
    let expected = layer.forward(x.clone());
    assert!(max_diff(&merged.forward(x), &expected) <= 1e-5 * scale(&expected));
}

#[test]
fn a_merge_into_bf16_rounds_once_and_says_how_much() {
    let device = device();
    device.seed(10);
    let mut base = linear(48, 40, false, LinearLayout::Row, &device);
    base.weight = base.weight.map(|weight| weight.cast(FloatDType::BF16));
    let delta = lora(&LoraConfig::new(4).with_alpha(0.1), 48, 40, &device);
    let exact: Tensor<2> = base.weight.val().cast(FloatDType::F32) + delta.delta_weight();
    let (merged, report) = Adapted { base, delta }.merge();
    assert_eq!(merged.weight.val().dtype(), DType::BF16);
    let rounded = merged.weight.val().cast(FloatDType::F32);
    assert_eq!(
        values(&rounded),
        values(&exact.clone().cast(FloatDType::BF16).cast(FloatDType::F32))
    );
    assert_eq!(report.max_cast_error, max_diff(&rounded, &exact));
    assert!(report.max_cast_error > 0.0);
}

#[test]
fn a_small_change_does_not_survive_nf4_and_a_large_one_does() {
    let device = device();
    device.seed(11);
    let base = linear(256, 256, true, LinearLayout::Row, &device);
    let base = Nf4Linear::from_linear(base, &Nf4Config::new()).unwrap();
    let norm = |x: Tensor<2>| x.powi_scalar(2).sum().sqrt().into_scalar::<f32>();
    let weight = norm(base.dense_weight());
    // Shares kept at ‖ΔW‖ / ‖W‖ of 0.01 and 0.2, as measured for PEFT with bitsandbytes: .02 and .98.
    for (ratio, low, high) in [(0.01, 0.0, 0.1), (0.2, 0.9, 1.1)] {
        let delta = lora(&LoraConfig::new(8), 256, 256, &device);
        let alpha = f64::from(8.0 * ratio * weight / norm(delta.delta_weight()));
        let delta = LoraConfig::new(8)
            .with_alpha(alpha)
            .with_factors(delta.a.val(), delta.b.val())
            .unwrap();
        let layer = Adapted {
            base: base.clone(),
            delta,
        };
        let (merged, report) = layer.merge_into_nf4(&Nf4Config::new()).unwrap();
        assert!(
            (low..high).contains(&report.survived),
            "{ratio}: {report:?}"
        );
        assert_eq!(merged.weight.shape(), [256, 256]);
        let exact = layer.delta.delta_weight() + base.dense_weight();
        let error = norm(merged.dense_weight() - exact) / norm(layer.delta.delta_weight());
        assert!(
            (error - report.relative_error).abs() <= 1e-4 * error,
            "{error} against {report:?}"
        );
    }
    let fresh = Adapted {
        base: base.clone(),
        delta: LoraConfig::new(2).init(256, 256, &device).unwrap(),
    };
    let (same, report) = fresh.merge_into_nf4(&Nf4Config::new()).unwrap();
    assert_eq!(
        same.weight.to_data(),
        base.weight.to_data(),
        "requantising NF4 is exact"
    );
    assert_eq!(report.survived, 1.0);
}
