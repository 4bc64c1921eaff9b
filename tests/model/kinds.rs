//! Changes of layers and parameters of every kind, on a model: fresh, chosen, summed, by row, merged, recorded.

use burn::module::{Module, Param};
use burn::tensor::{Device, Distribution, Int, Tensor};
use burn_peft::PeftError;
use burn_peft::adapter::{Change, LoraConfig};
use burn_peft::layer::ExpertLayout;
use burn_peft::model::{
    BiasMode, ChangeKind, PeftConfig, PeftForward, PeftModel, TargetConfig, TiedHead,
    TrainableTokens,
};

use super::kinds_model::Kinds;
use super::{device, max_diff, params, values};

const LAYERS: [&str; 6] = ["embed", "conv1", "grouped", "up", "conv2", "head"];

fn kinds(device: &Device) -> PeftModel<Kinds> {
    let model = Kinds::load(&crate::golden("kinds"), false, device).unwrap();
    PeftModel::new(model).with_expert_layout(ExpertLayout::OutIn)
}

fn tokens(device: &Device) -> Tensor<2, Int> {
    Tensor::from_data([[1, 4, 7, 10, 2, 5, 8], [3, 3, 0, 9, 6, 1, 2]], device)
}

/// Everything at once, but what one way of computing cannot do.
fn everything(lora: LoraConfig) -> PeftConfig {
    PeftConfig::new(lora, TargetConfig::list(LAYERS))
        .with_target_parameters(["experts.weight", "experts.gate"])
        .with_modules_to_save(["norm"])
        .with_bias(BiasMode::LoraOnly)
}

/// The same with trained tokens, whose embedding has no factors then: PEFT has one of the two.
fn everything_and(tokens: Vec<usize>, lora: LoraConfig) -> PeftConfig {
    let mut config = everything(lora).with_trainable_tokens(TrainableTokens::Input(tokens));
    config.targets = config.targets.with_exclude_modules(["embed"]);
    config
}

/// Gives every value of an adapter another.
fn moved(model: &mut PeftModel<Kinds>, name: &str) {
    fn step<const D: usize>(param: &mut Param<Tensor<D>>) {
        let value = param.val();
        let noise = value.random_like(Distribution::Normal(0.0, 0.3));
        *param = Param::from_tensor((value + noise).detach());
    }
    let config = model.config(name).unwrap().clone();
    let changes = model.changes(name).unwrap().into_iter();
    let changes = changes.map(|(path, change)| {
        let change: Change = match change {
            Change::Lora(mut lora) => {
                step(&mut lora.a);
                step(&mut lora.b);
                if let Some(bias) = &mut lora.bias {
                    step(bias);
                }
                lora.into()
            }
            Change::Copy(mut copy) => {
                step(&mut copy.values);
                copy.into()
            }
            Change::Rows(mut rows) => {
                step(&mut rows.rows);
                rows.into()
            }
        };
        (path, change)
    });
    let changes = changes.collect();
    model.swap_changes(name, &config, changes).unwrap();
}

#[test]
fn a_fresh_adapter_on_everything_changes_no_bit_and_trains() {
    let device = device();
    device.seed(1);
    let mut model = kinds(&device);
    let base = model.forward(tokens(&device));
    let lora = LoraConfig::new(2).with_alpha(3.0);
    let config = everything_and(vec![7, 1], lora);
    let report = model.add_adapter("default", &config).unwrap();
    assert_eq!(report.targets.matched.len(), LAYERS.len() - 1);
    // A, B of five layers and two tensors of experts; the norm's two; five biases; the rows.
    assert_eq!(params(&model.clone().adapters_only()).len(), 14 + 2 + 5 + 1);
    let found = model.forward_peft(tokens(&device));
    assert_eq!(values(&found), values(&base));

    let gradients = found.powi_scalar(2).sum().backward();
    for (path, change) in model.changes("default").unwrap() {
        let reached = match &change {
            Change::Lora(lora) => lora.b.val().grad(&gradients).is_some(),
            Change::Copy(copy) => copy.values.val().grad(&gradients).is_some(),
            Change::Rows(rows) => rows.rows.val().grad(&gradients).is_some(),
        };
        assert!(reached, "{path}");
    }
    let report = model.report();
    let kind = |path: &str, place: usize| {
        let weight = report.weights.iter().find(|weight| weight.path == path);
        weight.unwrap().adapters[place].kind
    };
    assert_eq!(kind("norm.gamma", 0), ChangeKind::Copy);
    assert_eq!(kind("embed", 0), ChangeKind::Rows { count: 2 });
    assert!(matches!(
        kind("grouped", 0),
        ChangeKind::Lora { rank: 2, .. }
    ));
    // Of experts there is no other way, so that nothing is amiss.
    assert_eq!(report.composed().count(), 0);
    assert!(report.table().contains("own copy"));
}

/// Sums of at most 360 products, through eight layers, of changes as large as the weights.
const BOUND: f64 = 1e-4;

#[test]
fn both_ways_and_a_merge_compute_the_same() {
    let device = device();
    device.seed(2);
    for dora in [false, true] {
        let mut model = kinds(&device);
        let lora = LoraConfig::new(2).with_dora(dora);
        let config = match dora {
            false => everything(lora),
            // PEFT has no DoRA for a convolution of several groups.
            true => {
                let targets = TargetConfig::list(LAYERS).with_exclude_modules(["grouped"]);
                PeftConfig::new(lora, targets)
            }
        };
        model.add_adapter("one", &config).unwrap();
        moved(&mut model, "one");
        let base = model.disabled().forward(tokens(&device));
        let factored = model.forward_peft(tokens(&device));
        let composed = model.forward(tokens(&device));
        assert!(max_diff(&factored, &base) > 0.1);
        let bound = BOUND as f32;
        assert!(max_diff(&factored, &composed) < bound, "dora {dora}");
        let merged = model.merged().unwrap().0.forward(tokens(&device));
        assert!(max_diff(&merged, &composed) < bound, "dora {dora}");
        // The base is not what was merged into.
        assert_eq!(
            values(&model.unload().unwrap().forward(tokens(&device))),
            values(&base)
        );
    }
}

#[test]
fn a_bias_of_b_is_merged_into_that_of_the_layer() {
    let device = device();
    device.seed(3);
    let mut model = kinds(&device);
    let lora = LoraConfig::new(2).with_alpha(6.0).with_bias(true);
    let targets = TargetConfig::list(["conv1", "grouped", "up", "conv2", "head"]);
    let config = PeftConfig::new(lora.clone(), targets).with_bias(BiasMode::LoraOnly);
    model.add_adapter("one", &config).unwrap();
    moved(&mut model, "one");
    let factored = model.forward_peft(tokens(&device));
    let merged = model.merged().unwrap().0.forward(tokens(&device));
    assert!(max_diff(&factored, &merged) < BOUND as f32);

    model.module().up.bias.as_ref().unwrap();
    let mut module = kinds(&device).into_module();
    module.up.bias = None;
    let mut model = PeftModel::new(module);
    let config = PeftConfig::new(lora, TargetConfig::list(["up"]));
    model.add_adapter("one", &config).unwrap();
    model.forward_peft(tokens(&device));
    let error = model.merged().unwrap_err();
    assert!(error.to_string().contains("bias of B of `up`"), "{error}");
}

#[test]
#[should_panic(expected = "call `forward_peft`")]
fn a_bias_of_b_has_no_composed_weight() {
    let device = device();
    let mut model = kinds(&device);
    let lora = LoraConfig::new(2).with_bias(true);
    let config = PeftConfig::new(lora, TargetConfig::list(["up"]));
    model.add_adapter("one", &config).unwrap();
    model.forward(tokens(&device));
}

#[test]
fn sums_are_weighted_and_rows_have_their_own() {
    let device = device();
    device.seed(4);
    let mut model = kinds(&device);
    let config = PeftConfig::new(LoraConfig::new(2), TargetConfig::list(LAYERS));
    for name in ["one", "two"] {
        model.add_adapter(name, &config).unwrap();
        moved(&mut model, name);
    }
    let pair = model.with_adapters(&[("one", 0.5), ("two", -1.5)]).unwrap();
    let (factored, composed) = (
        pair.forward_peft(tokens(&device)),
        pair.forward(tokens(&device)),
    );
    assert!(max_diff(&factored, &composed) < BOUND as f32);

    let rows = model
        .with_adapter_rows(&[Some("two"), None])
        .unwrap()
        .forward_peft(tokens(&device));
    let two = model.with_adapters(&[("two", 1.0)]).unwrap();
    let two = two.forward_peft(tokens(&device));
    let base = model.disabled().forward_peft(tokens(&device));
    let row = |y: &Tensor<2>, row: usize| y.clone().narrow(0, row, 1);
    assert!(max_diff(&row(&rows, 0), &row(&two, 0)) < BOUND as f32);
    assert!(max_diff(&row(&rows, 1), &row(&base, 1)) < BOUND as f32);

    // A copy is one for all rows.
    let config = everything(LoraConfig::new(2));
    model.add_adapter("whole", &config).unwrap();
    let error = model.with_adapter_rows(&[Some("whole"), None]).unwrap_err();
    assert!(
        error.to_string().contains("rows of adapter `whole`"),
        "{error}"
    );
}

#[test]
fn copies_are_weighted_swapped_recorded_and_taken_back() {
    let device = device();
    device.seed(5);
    let mut model = kinds(&device);
    let config = everything_and(vec![4, 3], LoraConfig::new(2));
    model.add_adapter("one", &config).unwrap();
    let ids = |model: &PeftModel<Kinds>| -> Vec<_> {
        let params = params(&model.clone().adapters_only());
        params.into_iter().map(|(path, id, _)| (path, id)).collect()
    };
    let before = ids(&model);
    moved(&mut model, "one");
    assert_eq!(ids(&model), before, "a swap keeps ids");
    let y = model.forward_peft(tokens(&device));

    // Half of the way from the base's norm to the adapter's.
    let half = model.with_adapters(&[("one", 0.5)]).unwrap();
    let gamma = |model: &PeftModel<Kinds>| model.module().norm.gamma.val();
    let middle = (gamma(&model) + gamma(&model.disabled())).mul_scalar(0.5);
    assert!((gamma(&half) - middle).abs().max().into_scalar::<f32>() < 1e-6);

    // A record of the adapter alone, onto the same base.
    let record = model.clone().adapters_only().into_record();
    let mut restored = kinds(&device);
    restored.add_adapter("one", &config).unwrap();
    let restored = restored.adapters_only().load_record(record).into_inner();
    assert_eq!(values(&restored.forward_peft(tokens(&device))), values(&y));
    assert_eq!(ids(&restored), before);

    let mut model = restored;
    model.delete_adapter("one").unwrap();
    let base = kinds(&device).forward_peft(tokens(&device));
    assert_eq!(values(&model.forward_peft(tokens(&device))), values(&base));
    assert!(ids(&model).is_empty());
}

#[test]
fn a_tied_head_is_changed_with_its_embedding_in_both_ways() {
    let device = device();
    device.seed(6);
    let x = Tensor::<2>::random([3, 8], Distribution::Normal(0.0, 1.0), &device);
    let targets = TargetConfig::list(["embed"]);
    let lora = PeftConfig::new(LoraConfig::new(2), targets.clone());
    let dora = PeftConfig::new(LoraConfig::new(2).with_dora(true), targets);
    let rows = PeftConfig::new(LoraConfig::new(2), TargetConfig::list(["up"]))
        .with_trainable_tokens(TrainableTokens::Input(vec![9, 2, 5]));
    let copy = PeftConfig::new(LoraConfig::new(2), TargetConfig::list(["up"]))
        .with_modules_to_save(["embed"]);
    for config in [lora, dora, rows, copy] {
        let mut model = kinds(&device);
        model.add_adapter("one", &config).unwrap();
        moved(&mut model, "one");
        for weight in [1.0, 0.5] {
            let model = model.with_adapters(&[("one", weight)]).unwrap();
            let embed = &model.module().embed;
            let head = embed.weight.val().transpose();
            let expected = x.clone().matmul(head);
            let found = embed.attend_peft(x.clone());
            assert!(max_diff(&found, &expected) < 1e-4);
            let expected = embed.forward(tokens(&device));
            let found = embed.forward_peft(tokens(&device));
            let error = (found - expected).abs().max().into_scalar::<f32>();
            assert!(error < 1e-5, "{error}");
        }
    }
}

#[test]
fn what_cannot_be_is_an_error_that_names_it_and_changes_nothing() {
    let device = device();
    let mut model = kinds(&device);
    let before = params(&model);
    let lora = || LoraConfig::new(2);
    let on = |names: &[&str]| PeftConfig::new(lora(), TargetConfig::list(names.iter().copied()));
    let named =
        |name: &str| TrainableTokens::Named([(name.to_owned(), vec![1])].into_iter().collect());
    for (config, part) in [
        (
            on(&["up"]).with_modules_to_save(["nrm"]),
            "modules_to_save `nrm`",
        ),
        (
            on(&["up"]).with_target_parameters(["experts.wieght"]),
            "nearest: `experts.weight`",
        ),
        (
            on(&["up"]).with_trainable_tokens(named("embd")),
            "nearest: `embed`",
        ),
        (
            on(&["up"]).with_trainable_tokens(TrainableTokens::Input(vec![11])),
            "trainable_token_indices = 11: expected below 11",
        ),
        (
            on(&["up"]).with_trainable_tokens(TrainableTokens::Input(vec![1, 1])),
            "every token once",
        ),
        (
            PeftConfig::new(lora().with_bias(true), TargetConfig::list(["embed"])),
            "false on an embedding",
        ),
        (
            PeftConfig::new(
                lora().with_bias(true).with_dora(true),
                TargetConfig::list(["up"]),
            ),
            "false with DoRA",
        ),
        (
            PeftConfig::new(lora().with_dropout(0.1), TargetConfig::list(["up"]))
                .with_target_parameters(["experts.gate"]),
            "dropout of `experts.gate`",
        ),
        // A module to save gets no delta, so that this name has no effect.
        (
            on(&["head"]).with_modules_to_save(["head"]),
            "target_modules `head`",
        ),
    ] {
        let error = model.add_adapter("one", &config).unwrap_err().to_string();
        assert!(error.contains(part), "{error}: not {part}");
        assert_eq!(params(&model), before);
        assert_eq!(model.adapters().count(), 0);
    }
    let mut donor = kinds(&device);
    donor.add_adapter("one", &everything(lora())).unwrap();
    for (path, change) in donor.changes("one").unwrap() {
        let wrong = vec![("conv2.weight".to_owned(), change.clone())];
        if path != "conv2.weight" {
            let error = model.insert_changes("one", &everything(lora()), wrong);
            assert!(
                matches!(error, Err(PeftError::Shape { .. })),
                "{path}: {error:?}"
            );
        }
    }
    assert_eq!(params(&model), before);
}
