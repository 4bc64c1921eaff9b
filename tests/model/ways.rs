//! The two ways of computing an adapted model: composed by Burn's own layers, and factored.

use burn::module::Module;
use burn::nn::attention::{MhaInput, MultiHeadAttentionConfig};
use burn::nn::transformer::{TransformerEncoderConfig, TransformerEncoderInput};
use burn::tensor::{Distribution, Tensor};
use burn_peft::adapter::LoraConfig;
use burn_peft::model::{PeftConfig, PeftModel, TargetConfig, Way};
use burn_peft::nf4::Nf4Config;

use crate::model::{Net, adapted_as, config, device, input, max_diff, values, with_random_b};

#[test]
fn both_ways_give_the_same_outputs_and_gradients() {
    let device = device();
    device.seed(11);
    for (pack, dora) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut model = PeftModel::new(Net::new(&device));
        if pack {
            let nf4 = Nf4Config::new().with_double_quant(true);
            model
                .quantize_nf4(&TargetConfig::all_linear(), &nf4)
                .unwrap();
        }
        let mut config = config(TargetConfig::all_linear());
        config.lora.dora = dora;
        adapted_as(&mut model, "default", &config);
        let x = input(&device).require_grad();
        assert!(
            model
                .report()
                .weights
                .iter()
                .all(|weight| weight.way == Way::Unused)
        );

        let fast = model.forward_peft(x.clone());
        assert!(
            model
                .report()
                .weights
                .iter()
                .all(|weight| weight.way == Way::Factored)
        );
        assert_eq!(model.report().composed().count(), 0);
        let slow = model.forward(x.clone());
        let report = model.report();
        assert_eq!(report.composed().collect::<Vec<_>>().len(), 5);
        assert!(report.to_string().contains("blocks.1.down"), "{report}");

        // f32 sums of 48 terms through four layers, forward and backward.
        assert!(max_diff(&slow, &fast) <= 1e-4);
        let slow = slow.powi_scalar(2).sum().backward();
        let fast = fast.powi_scalar(2).sum().backward();
        let close = |slow: Tensor<2>, fast: Tensor<2>| {
            let size = values(&slow)
                .iter()
                .fold(1.0, |max: f32, value| max.max(value.abs()));
            assert!(
                max_diff(&slow, &fast) <= 1e-4 * size,
                "{}",
                max_diff(&slow, &fast)
            );
            assert!(values(&slow).iter().any(|value| *value != 0.0));
        };
        close(x.grad(&slow).unwrap(), x.grad(&fast).unwrap());
        for (_, lora) in model.factors("default").unwrap() {
            close(
                lora.a.val().grad(&slow).unwrap(),
                lora.a.val().grad(&fast).unwrap(),
            );
            close(
                lora.b.val().grad(&slow).unwrap(),
                lora.b.val().grad(&fast).unwrap(),
            );
            assert_eq!(lora.magnitude.is_some(), dora);
            if let Some(magnitude) = &lora.magnitude {
                let magnitude = magnitude.val();
                close(
                    magnitude.grad(&slow).unwrap().unsqueeze(),
                    magnitude.grad(&fast).unwrap().unsqueeze(),
                );
            }
        }
    }
}

/// The magnitude of a fresh DoRA is that of the base, packed or dense, so that the model stays as it was.
#[test]
fn a_fresh_dora_changes_nothing() {
    let device = device();
    for pack in [false, true] {
        let mut model = PeftModel::new(Net::new(&device));
        if pack {
            let targets = TargetConfig::all_linear();
            model.quantize_nf4(&targets, &Nf4Config::new()).unwrap();
        }
        let x = input(&device);
        let base = model.forward_peft(x.clone());
        let mut config = config(TargetConfig::all_linear());
        config.lora.dora = true;
        model.add_adapter("default", &config).unwrap();
        assert_eq!(
            values(&model.forward_peft(x.clone())),
            values(&base),
            "bit-equal"
        );
        let composed = model.forward(x);
        assert!(
            max_diff(&composed, &base) <= 1e-5,
            "{}",
            max_diff(&composed, &base)
        );
    }
}

/// Layers of Burn that call their linears themselves.
#[test]
fn burns_attention_and_transformer_are_right_unchanged() {
    let device = device();
    device.seed(12);
    let x = Tensor::<3>::random([2, 5, 16], Distribution::Normal(0.0, 1.0), &device);
    let attention = MultiHeadAttentionConfig::new(16, 2)
        .with_dropout(0.0)
        .init(&device);
    check(
        attention,
        |attention, x| attention.forward(MhaInput::self_attn(x)).context,
        &x,
        4,
    );
    let encoder = TransformerEncoderConfig::new(16, 32, 2, 2)
        .with_dropout(0.0)
        .init(&device);
    check(
        encoder,
        |encoder, x| encoder.forward(TransformerEncoderInput::new(x)),
        &x,
        12,
    );
}

/// The adapted module equals the module with merged weights, trains its factors, and disabled equals the base.
fn check<M: Module>(
    module: M,
    forward: impl Fn(&M, Tensor<3>) -> Tensor<3>,
    x: &Tensor<3>,
    linears: usize,
) {
    let base = forward(&module, x.clone());
    let mut model = PeftModel::new(module);
    let config = PeftConfig::new(LoraConfig::new(2), TargetConfig::all_linear());
    let report = model.add_adapter("fresh", &config).unwrap();
    assert_eq!(report.targets.matched.len(), linears);
    assert_eq!(max_diff(&forward(&model, x.clone()), &base), 0.0);
    let factors = model.factors("fresh").unwrap();
    let factors = factors
        .into_iter()
        .map(|(path, lora)| (path, with_random_b(&lora)))
        .collect();
    model.insert_adapter("random", &config, factors).unwrap();
    model.set_adapter("random").unwrap();
    let y = forward(&model, x.clone());
    assert!(max_diff(&y, &base) > 1e-3);
    let gradients = y.clone().powi_scalar(2).sum().backward();
    for (path, lora) in model.factors("random").unwrap() {
        assert!(lora.b.val().grad(&gradients).is_some(), "{path}");
    }
    assert_eq!(model.report().composed().count(), linears);
    assert_eq!(
        values(&forward(&model.disabled(), x.clone())),
        values(&base)
    );
    let (merged, _) = model.merge_and_unload().unwrap();
    // The same weights, but for the order of two additions.
    assert!(max_diff(&forward(&merged, x.clone()), &y) <= 1e-5);
}
