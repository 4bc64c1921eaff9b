//! `y = x·(W + s·A·B) + b` over random shapes, ranks and batches.

use burn::module::Param;
use burn::nn::{DropoutConfig, Linear, LinearLayout};
use burn::tensor::{DType, Device, Distribution, FloatDType, Tensor};
use burn_peft::PeftError;
use burn_peft::adapter::{Lora, LoraConfig, LoraInit};
use burn_peft::layer::{
    Adapted, FrozenLinear, LoraLinear, Nf4Linear, Nf4LinearConfig, QLoraLinear,
};
use burn_peft::nf4::Nf4Config;
use proptest::prelude::*;

use crate::layers::{device, linear, lora, max_diff, num_params, random, scale, values};

/// How much DoRA's norms enlarge an error: `max_j (‖W_j‖ + s·‖A‖·‖B_j‖)² / ‖(W + ΔW)_j‖²`. In a weight of few rows the change may
/// cancel a column.
fn condition<B: FrozenLinear>(layer: &Adapted<B, Lora>) -> f32 {
    if layer.delta.magnitude.is_none() {
        return 1.0;
    }
    let norms = |weight: Tensor<2>| weight.square().sum_dim(0).sqrt();
    let (weight, change) = (layer.base.dense_weight(), layer.delta.delta_weight());
    let sum = norms(weight.clone() + change.clone());
    let a = layer.delta.a.val().square().sum().sqrt() * layer.delta.scale();
    let factors = norms(layer.delta.b.val()) * a.unsqueeze();
    let ratio = (norms(weight) + factors) / sum.clamp_min(f32::MIN_POSITIVE);
    values(&ratio.square()).into_iter().fold(1.0, f32::max)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_layer_is_its_merged_layer(
        (d_in, d_out, rank) in (1usize..70, 1usize..70, 1usize..80),
        rows in 0usize..9,
        (bias, col, rslora, dora, packed) in any::<(bool, bool, bool, bool, bool)>(),
        alpha in 0.5f64..20.0,
    ) {
        let device = device();
        let layout = if col { LinearLayout::Col } else { LinearLayout::Row };
        let base = linear(d_in, d_out, bias, layout, &device);
        let config = LoraConfig::new(rank).with_alpha(alpha).with_rslora(rslora).with_dora(dora);
        let delta = lora(&config, d_in, d_out, &device);
        let x = random([rows, d_in], &device);
        let (y, merged, condition) = if packed {
            let base = Nf4Linear::from_linear(base, &Nf4Config::new().with_double_quant(rslora)).unwrap();
            let layer = Adapted { base, delta };
            (layer.forward(x.clone()), layer.merge().0, condition(&layer))
        } else {
            let layer = Adapted { base, delta };
            (layer.forward(x.clone()), layer.merge().0, condition(&layer))
        };
        prop_assert_eq!(y.dims(), [rows, d_out]);
        if rows > 0 {
            let expected = merged.forward(x.clone());
            // Two orders of at most 80 f32 products of values of size s·√r: relative to the largest intermediate.
            let size = scale(&expected) * scale(&merged.weight.val());
            // DoRA's norms are three more such sums, one of them of sums, whose errors add up before they cancel.
            let bound = if dora { 1e-4 } else { 2e-5 };
            prop_assert!(max_diff(&y, &expected) <= bound * size * condition, "{} of {size}", max_diff(&y, &expected));
        }
    }
}

#[test]
fn a_fresh_adapter_changes_nothing() {
    let device = device();
    for layout in [LinearLayout::Row, LinearLayout::Col] {
        for bias in [true, false] {
            let base = linear(40, 24, bias, layout, &device);
            let x = random([7, 40], &device);
            let y = base.forward(x.clone());
            // Batches that Burn folds into rows, and such as it does not.
            let batches = [[3, 5, 40], [2, 130, 40], [40, 1, 40], [1, 300, 40]];
            let batches = batches.map(|shape| random(shape, &device));
            let inits = [LoraInit::Kaiming, LoraInit::Gaussian].map(|init| (init, false));
            for (init, dora) in inits.into_iter().chain([(LoraInit::Kaiming, true)]) {
                let config = LoraConfig::new(4).with_init(init).with_dora(dora);
                let layer = LoraLinear::from_linear(base.clone(), &config).unwrap();
                assert_eq!(values(&layer.forward(x.clone())), values(&y), "bit-equal");
                for batch in &batches {
                    let y = base.forward(batch.clone());
                    let found = layer.forward(batch.clone());
                    assert_eq!(values(&found), values(&y), "bit-equal in batches");
                }
                let nf4 = Nf4Linear::from_linear(base.clone(), &Nf4Config::new()).unwrap();
                let layer = QLoraLinear::from_nf4(nf4.clone(), &config).unwrap();
                assert_eq!(
                    values(&layer.forward(x.clone())),
                    values(&nf4.forward(x.clone())),
                    "bit-equal"
                );
            }
        }
    }
}

#[test]
fn inputs_of_any_rank() {
    let device = device();
    let base = Nf4LinearConfig::new(12, 8)
        .init(&Nf4Config::new(), &device)
        .unwrap();
    let layer = Adapted {
        base,
        delta: lora(&LoraConfig::new(2), 12, 8, &device),
    };
    let x = random([2, 3, 12], &device);
    let rows = layer.forward(x.clone().reshape([6, 12]));
    assert_eq!(values(&layer.forward(x.clone())), values(&rows));
    assert_eq!(layer.forward(x.clone()).dims(), [2, 3, 8]);
    let row: Tensor<1> = x.slice([0..1, 0..1]).reshape([12]);
    let one = layer.forward(row);
    assert_eq!(one.dims(), [8]);
    // One row is another path through the product, of 12 terms.
    let first: Tensor<1> = rows.narrow(0, 0, 1).reshape([8]);
    assert!(max_diff(&one, &first) <= 4e-6 * scale(&first));
}

#[test]
#[should_panic(expected = "axis 1 expected 12, got 11")]
fn a_wrong_input_is_a_programmers_mistake() {
    let device = device();
    let base = Nf4LinearConfig::new(12, 8)
        .init(&Nf4Config::new(), &device)
        .unwrap();
    QLoraLinear::from_nf4(base, &LoraConfig::new(2))
        .unwrap()
        .forward(random([1, 11], &device));
}

#[test]
fn initial_factors_are_those_of_peft() {
    let device = device();
    device.seed(5);
    let (d_in, rank) = (400, 50);
    let kaiming = LoraConfig::new(rank).init(d_in, 30, &device).unwrap();
    let bound = 1.0 / (d_in as f32).sqrt();
    let a = values(&kaiming.a.val());
    assert!(a.iter().all(|a| a.abs() <= bound));
    // 20,000 uniform values: the mean of |a| is bound/2 with a standard error of bound/√12/√20000, 0.2 % of bound.
    let mean = a.iter().map(|a| a.abs()).sum::<f32>() / a.len() as f32;
    assert!((mean / bound - 0.5).abs() < 0.01, "{mean} of {bound}");
    assert!(values(&kaiming.b.val()).iter().all(|b| *b == 0.0));

    let gaussian = LoraConfig::new(rank)
        .with_init(LoraInit::Gaussian)
        .init(d_in, 30, &device)
        .unwrap();
    let a = values(&gaussian.a.val());
    let deviation = (a.iter().map(|a| a * a).sum::<f32>() / a.len() as f32).sqrt();
    // A standard deviation from 20,000 values has a relative standard error of 0.5 %.
    assert!((deviation * rank as f32 - 1.0).abs() < 0.025, "{deviation}");
    assert!(values(&gaussian.b.val()).iter().all(|b| *b == 0.0));

    let random = LoraConfig::new(rank)
        .with_init(LoraInit::Random)
        .init(d_in, 300, &device)
        .unwrap();
    for (factor, fan_in) in [(&random.a, d_in), (&random.b, rank)] {
        let bound = 1.0 / (fan_in as f32).sqrt();
        let factor = values(&factor.val());
        assert!(factor.iter().all(|value| value.abs() <= bound));
        // Of 15,000 values or more.
        let mean = factor.iter().map(|value| value.abs()).sum::<f32>() / factor.len() as f32;
        assert!((mean / bound - 0.5).abs() < 0.012, "{mean} of {bound}");
    }
}

#[test]
fn the_scale_is_alpha_over_the_rank_or_its_root() {
    let device = device();
    let config = LoraConfig::new(16).with_alpha(24.0);
    assert_eq!(config.init(8, 8, &device).unwrap().scale(), 1.5);
    assert_eq!(
        config
            .with_rslora(true)
            .init(8, 8, &device)
            .unwrap()
            .scale(),
        6.0
    );
}

#[test]
fn dropout_is_the_adapters_alone_and_trainings_alone() {
    let device = device();
    for dora in [false, true] {
        device.seed(6);
        check_dropout(&LoraConfig::new(4).with_dora(dora), &device);
    }
}

fn check_dropout(config: &LoraConfig, device: &Device) {
    use burn::module::Module;
    let base = linear(64, 32, true, LinearLayout::Row, device).no_grad();
    let config = config.clone().with_dropout(0.5);
    let layer = Adapted {
        base: base.clone(),
        delta: lora(&config, 64, 32, device),
    };
    let x = random([200, 64], device);
    let mut certain = layer.clone();
    certain.delta.dropout = DropoutConfig::new(0.0).init();
    let expected = certain.forward(x.clone());
    assert!(
        max_diff(&layer.forward(x.clone()), &expected) > 1.0,
        "training drops"
    );
    let mean = (0..64)
        .map(|_| layer.forward(x.clone()))
        .reduce(|sum, y| sum + y)
        .unwrap()
        / 64.0;
    // Kept values are scaled, so that the mean is that without dropout. Each delta has a standard deviation about its own
    // size, 64 draws make an eighth of it, and 6400 values together a tenth of that again in the mean square.
    let delta = values(&(expected.clone() - base.forward(x.clone())));
    let size = delta.iter().map(|d| d * d).sum::<f32>();
    let error = values(&(mean - expected))
        .iter()
        .map(|e| e * e)
        .sum::<f32>();
    assert!(error < 0.03 * size, "{error} of {size}");

    let valid = layer.valid();
    let plain = x.clone().inner();
    assert_eq!(
        values(&valid.forward(plain.clone())),
        values(&certain.valid().forward(plain))
    );
    let frozen = layer.clone().freeze();
    assert_eq!(
        values(&frozen.forward(x.clone())),
        values(&certain.forward(x))
    );
}

/// As in PEFT, what DoRA adds to the frozen map sees the dropped input, the part of the weight itself too. With `W` the
/// identity, `B` zero and twice its magnitude, that part is the dropped input.
#[test]
fn dropout_reaches_all_that_dora_adds() {
    let device = device();
    let base = Linear {
        weight: Param::from_tensor(Tensor::eye(16, &device)).set_require_grad(false),
        bias: Some(Param::from_tensor(random([16], &device))),
    };
    let config = LoraConfig::new(2).with_dora(true).with_dropout(0.5);
    let fresh = LoraLinear::from_linear(base.clone(), &config).unwrap();
    let magnitude = fresh.delta.magnitude.as_ref().unwrap().val().detach() * 2.0;
    let layer = Adapted {
        delta: fresh.delta.clone().with_magnitude(magnitude).unwrap(),
        base: fresh.base,
    };
    let x = random([32, 16], &device);
    let added = values(&(layer.forward(x.clone()) - base.forward(x.clone())));
    let mut kept = 0;
    for (added, x) in added.iter().zip(values(&x)) {
        let near = |value: f32| (added - value).abs() <= 2e-5;
        assert!(near(0.0) || near(2.0 * x), "{added} for {x}");
        kept += usize::from(near(2.0 * x));
    }
    // Of 512, more than 9 standard deviations from all and from none.
    assert!((150..362).contains(&kept), "{kept}");
}

#[test]
fn factors_and_inputs_of_half_precision() {
    let device = device();
    let base = linear(32, 16, true, LinearLayout::Row, &device);
    for dtype in [FloatDType::F32, FloatDType::BF16, FloatDType::F16] {
        let config = LoraConfig::new(4).with_dtype(dtype);
        let fresh = config.init(32, 16, &device).unwrap();
        assert_eq!(fresh.a.val().dtype(), DType::from(dtype));
        assert_eq!(fresh.b.val().dtype(), DType::from(dtype));
        let exact = lora(&LoraConfig::new(4), 32, 16, &device);
        let half = config
            .with_factors(exact.a.val().cast(dtype), exact.b.val().cast(dtype))
            .unwrap();
        let x = random([3, 32], &device);
        let left = Adapted {
            base: base.clone(),
            delta: half,
        };
        let right = Adapted {
            base: base.clone(),
            delta: exact,
        };
        let (y, expected) = (left.forward(x.clone()), right.forward(x.clone()));
        assert_eq!(y.dtype(), DType::F32, "the dtype of the base's output");
        // Three roundings of relative 2^-9 (bf16), and sums of terms larger than their result.
        assert!(
            max_diff(&y, &expected) <= 0.06 * scale(&expected),
            "{dtype:?}"
        );
    }
    // An input of bf16 over a packed base gives bf16.
    let nf4 = Nf4Linear::from_linear(base, &Nf4Config::new()).unwrap();
    let layer = Adapted {
        base: nf4,
        delta: lora(&LoraConfig::new(4), 32, 16, &device),
    };
    let x = Tensor::<2>::random([3, 32], Distribution::Default, &device);
    let y = layer.forward(x.clone().cast(FloatDType::BF16));
    assert_eq!(y.dtype(), DType::BF16);
    let expected = layer.forward(x);
    assert!(max_diff(&y.cast(FloatDType::F32), &expected) <= 0.06 * scale(&expected));
}

#[test]
fn bad_configurations_are_named() {
    let device = device();
    for (config, option) in [
        (LoraConfig::new(0), "rank"),
        (LoraConfig::new(4).with_alpha(f64::NAN), "alpha"),
        (LoraConfig::new(4).with_alpha(f64::INFINITY), "alpha"),
        (LoraConfig::new(4).with_dropout(1.0), "dropout"),
        (LoraConfig::new(4).with_dropout(-0.1), "dropout"),
        (LoraConfig::new(4).with_dropout(f64::NAN), "dropout"),
    ] {
        let linear = linear(4, 4, false, LinearLayout::Row, &device);
        match LoraLinear::from_linear(linear, &config).map(|layer| num_params(&layer)) {
            Err(PeftError::Config { name, .. }) => assert_eq!(name, option),
            other => panic!("{config:?}: {other:?}"),
        }
    }
}
