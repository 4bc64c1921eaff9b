//! Several adapters at once: sums, rows of a batch, snapshots, swaps, combinations. Golden: `tests/golden/combine/generate.py`.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::adapter::{Combination, Lora, LoraConfig, MajoritySign};
use burn_peft::model::{Active, PeftConfig, PeftForward, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use serde::Deserialize;

use super::{Net, adapted, adapted_as, config, device, input, max_diff, params, values};

pub(super) type Matrix = Vec<Vec<f32>>;

#[derive(Deserialize)]
pub(super) struct Golden {
    adapters: Vec<Adapter>,
    weight: Matrix,
    x: Matrix,
    active: Matrix,
    rows: Vec<String>,
    mixed: Matrix,
    pub cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Adapter {
    name: String,
    r: usize,
    lora_alpha: f64,
    use_rslora: bool,
    a: Matrix,
    b: Matrix,
}

#[derive(Deserialize)]
pub(super) struct Case {
    pub kind: String,
    density: Option<f64>,
    sign: Option<String>,
    pub rank: Option<usize>,
    adapters: Vec<String>,
    weights: Vec<f64>,
    scale: f64,
    pub a: Matrix,
    pub b: Matrix,
}

impl Case {
    pub fn combination(&self) -> Combination {
        let density = self.density.unwrap_or(1.0);
        let sign = match self.sign.as_deref() {
            Some("frequency") => MajoritySign::Frequency,
            _ => MajoritySign::Total,
        };
        match self.kind.trim_end_matches("_svd") {
            "cat" => Combination::Cat,
            "linear" | "svd" => Combination::Linear,
            "ties" => Combination::Ties { density, sign },
            "magnitude_prune" => Combination::MagnitudePrune { density },
            "dare_linear" => Combination::DareLinear { density },
            "dare_ties" => Combination::DareTies { density, sign },
            other => panic!("{other}"),
        }
    }

    pub fn adapters(&self) -> Vec<(&str, f64)> {
        let names = self.adapters.iter().map(String::as_str);
        names.zip(self.weights.iter().copied()).collect()
    }

    pub fn by_svd(&self) -> bool {
        self.kind.ends_with("svd")
    }
}

#[derive(Module, Debug)]
pub(super) struct Layer {
    linear: Linear,
}

pub(super) fn tensor(matrix: &Matrix, device: &Device) -> Tensor<2> {
    let shape = [matrix.len(), matrix[0].len()];
    Tensor::from_data(TensorData::new(matrix.concat(), shape), device)
}

pub(super) fn golden(device: &Device) -> (Golden, PeftModel<Layer>) {
    let text = std::fs::read(crate::golden("combine/combine.json")).unwrap();
    let golden: Golden = serde_json::from_slice(&text).unwrap();
    let linear = Linear {
        weight: Param::from_tensor(tensor(&golden.weight, device).transpose()),
        bias: None,
    };
    let mut model = PeftModel::new(Layer { linear });
    for adapter in &golden.adapters {
        let config = LoraConfig::new(adapter.r)
            .with_alpha(adapter.lora_alpha)
            .with_rslora(adapter.use_rslora);
        let lora = config
            .with_factors(
                tensor(&adapter.a, device).transpose(),
                tensor(&adapter.b, device).transpose(),
            )
            .unwrap();
        let config = PeftConfig::new(config, TargetConfig::list(["linear"]));
        let factors = vec![("linear".to_owned(), lora)];
        model
            .insert_adapter(&adapter.name, &config, factors)
            .unwrap();
    }
    (golden, model)
}

/// Sums of at most 11 products of values below 3, in another order than torch's: 1e-5 is 30 roundings of the largest.
const GOLDEN_TOLERANCE: f32 = 1e-5;

#[test]
fn sums_and_rows_are_those_of_peft() {
    let device = device();
    let (golden, model) = golden(&device);
    let x = tensor(&golden.x, &device);
    let sum = model.with_adapters(&[("one", 1.0), ("wide", 1.0)]).unwrap();
    let difference = |model: &PeftModel<Layer>, expected: &Matrix| {
        let y = model.linear.forward_peft(x.clone());
        max_diff(&y, &tensor(expected, &device))
    };
    assert!(difference(&sum, &golden.active) < GOLDEN_TOLERANCE);
    assert!(
        difference(&model, &golden.active) > 0.1,
        "the model's own choice has not changed"
    );

    let rows: Vec<_> = golden.rows.iter().map(String::as_str).collect();
    let rows: Vec<_> = rows
        .iter()
        .map(|&row| (row != "__base__").then_some(row))
        .collect();
    let mixed = model.with_adapter_rows(&rows).unwrap();
    assert!(difference(&mixed, &golden.mixed) < GOLDEN_TOLERANCE);
}

#[test]
fn combinations_are_those_of_peft() {
    let device = device();
    let (golden, mut model) = golden(&device);
    let cases: Vec<_> = golden.cases.iter().filter(|case| !case.by_svd()).collect();
    assert_eq!(cases.len(), 9);
    for (place, case) in cases.into_iter().enumerate() {
        let (combination, adapters) = (case.combination(), case.adapters());
        let name = format!("case{place}");
        model
            .add_weighted_adapter(&name, &adapters, combination)
            .unwrap();
        // As in PEFT, what was active stays active, and the new adapter is frozen.
        assert_eq!(
            model.active_adapter(),
            Some(golden.adapters[0].name.as_str())
        );
        assert!(!model.is_trainable(&name).unwrap());
        let factors = model.factors(&name).unwrap();
        let [(path, lora)] = &factors[..] else {
            panic!("{factors:?}")
        };
        assert_eq!((path.as_str(), lora.scale()), ("linear", case.scale));
        // PEFT puts the weights of `cat` on the side of A.
        if combination == Combination::Cat {
            let expected = tensor(&case.b, &device)
                .matmul(tensor(&case.a, &device))
                .transpose();
            assert!(max_diff(&lora.delta_weight(), &expected) < GOLDEN_TOLERANCE);
            assert_eq!(lora.rank(), 8);
            continue;
        }
        for (found, expected) in [(&lora.a, &case.a), (&lora.b, &case.b)] {
            let expected = tensor(expected, &device).transpose();
            let difference = max_diff(&found.val(), &expected);
            assert!(
                difference < GOLDEN_TOLERANCE,
                "{name} {}: {difference}",
                case.kind
            );
        }
    }
}

/// Two packed and three dense layers, two adapters of which one is DoRA, on other modules.
pub(super) fn model(device: &Device) -> PeftModel<Net> {
    let mut model = PeftModel::new(Net::new(device));
    model
        .quantize_nf4(&TargetConfig::list(["up"]), &Nf4Config::new())
        .unwrap();
    adapted(&mut model, "plain", TargetConfig::all_linear());
    let dora = PeftConfig::new(
        LoraConfig::new(2).with_dora(true),
        TargetConfig::list(["up", "first"]),
    );
    adapted_as(&mut model, "dora", &dora);
    adapted(&mut model, "other", TargetConfig::list(["up", "down"]));
    model
}

/// Outputs of one layer, whose change is linear in the adapters.
fn layer(model: &PeftModel<Net>, x: &Tensor<2>) -> Tensor<2> {
    model.first.forward_peft(x.clone())
}

#[test]
fn a_sum_adds_the_changes_that_each_makes_alone_in_both_ways_and_merged() {
    let device = device();
    let model = model(&device);
    let x = input(&device);
    let base = layer(&model.disabled(), &x);
    let alone =
        |name: &str| layer(&model.with_adapters(&[(name, 1.0)]).unwrap(), &x) - base.clone();
    let expected = base.clone() + alone("plain").mul_scalar(0.5) - alone("dora").mul_scalar(2.0);
    let both = model
        .with_adapters(&[("plain", 0.5), ("dora", -2.0)])
        .unwrap();
    let found = layer(&both, &x);
    assert!(max_diff(&found, &base) > 0.1);
    // Outputs of about 10 in f32, through weights that the composed way sums in another order.
    let tolerance = 1e-4;
    assert!(max_diff(&found, &expected) < tolerance);
    assert!(max_diff(&both.forward(x.clone()), &both.forward_peft(x.clone())) < tolerance * 10.0);

    let (merged, _) = both.merged().unwrap();
    assert!(max_diff(&merged.forward(x.clone()), &both.forward_peft(x.clone())) < tolerance * 10.0);

    // Low-rank ones go through one product.
    let low_rank = model
        .with_adapters(&[("plain", 0.5), ("other", 1.5)])
        .unwrap();
    let up = |model: &PeftModel<Net>, h: &Tensor<2>| model.blocks[0].up.forward_peft(h.clone());
    let h = Tensor::random([5, 32], Distribution::Normal(0.0, 1.0), &device);
    let alone = |name: &str| up(&model.with_adapters(&[(name, 1.0)]).unwrap(), &h);
    let base = up(&model.disabled(), &h);
    let expected = base.clone()
        + (alone("plain") - base.clone()).mul_scalar(0.5)
        + (alone("other") - base).mul_scalar(1.5);
    assert!(max_diff(&up(&low_rank, &h), &expected) < tolerance);

    // One of weight 1 is the adapter itself, to the bit; none is the base.
    let mut one = model.clone();
    one.set_adapter("dora").unwrap();
    let same = model.with_adapters(&[("dora", 1.0)]).unwrap();
    assert_eq!(
        values(&one.forward_peft(x.clone())),
        values(&same.forward_peft(x.clone()))
    );
    let none = model.with_adapters(&[]).unwrap();
    let disabled = model.disabled();
    assert_eq!(
        values(&none.forward_peft(x.clone())),
        values(&disabled.forward_peft(x.clone()))
    );
}

#[test]
fn all_that_are_summed_train_and_get_gradients_and_no_other() {
    let device = device();
    let model = model(&device);
    let both = model
        .with_adapters(&[("plain", 0.5), ("dora", 1.0)])
        .unwrap();
    for (path, _, grad) in params(&both) {
        let active = path.contains(".peft.plain.") || path.contains(".peft.dora.");
        assert_eq!(grad, active, "{path}");
    }
    let grads = both.forward_peft(input(&device)).sum().backward();
    for name in ["plain", "dora"] {
        for (path, lora) in both.factors(name).unwrap() {
            assert!(lora.a.val().grad(&grads).is_some(), "{name} of {path}");
            assert!(lora.b.val().grad(&grads).is_some(), "{name} of {path}");
        }
    }
    let report = both.report();
    assert_eq!(report.active.to_string(), "0.5·plain + dora");
    assert_eq!(report.active.names(), ["plain", "dora"]);
    assert_eq!(report.requires_grad("other"), Some(false));
    let rows = model.with_adapter_rows(&[Some("plain"), None]).unwrap();
    assert!(params(&rows).iter().all(|(.., grad)| !grad));
    assert_eq!(rows.active().to_string(), "rows: plain, -");
    assert_eq!(
        model.with_adapters(&[]).unwrap().active().to_string(),
        "none"
    );
}

#[test]
fn rows_have_the_outputs_of_their_own_adapters() {
    let device = device();
    let model = model(&device);
    let x = input(&device);
    let rows = [
        Some("dora"),
        None,
        Some("other"),
        Some("plain"),
        Some("dora"),
    ];
    let mixed = model
        .with_adapter_rows(&rows)
        .unwrap()
        .forward_peft(x.clone());
    for (row, name) in rows.iter().enumerate() {
        let alone: Vec<_> = name.iter().map(|name| (*name, 1.0)).collect();
        let alone = model.with_adapters(&alone).unwrap().forward_peft(x.clone());
        let difference = max_diff(&mixed.clone().narrow(0, row, 1), &alone.narrow(0, row, 1));
        // Outputs of about 10 in f32, sums in another order.
        assert!(difference < 1e-4, "row {row}: {difference}");
    }
    // More axes behind the batch.
    let deep = x.clone().unsqueeze_dim::<3>(1);
    let clone = model.with_adapter_rows(&rows).unwrap();
    let first = clone.first.forward_peft(deep).squeeze_dim::<2>(1);
    assert!(max_diff(&first, &clone.first.forward_peft(x)) < 1e-4);
}

#[test]
#[should_panic(expected = "the first axis of an input must be the batch")]
fn another_number_of_rows_panics() {
    let device = device();
    let model = model(&device).with_adapter_rows(&[Some("plain")]).unwrap();
    model.forward_peft(input(&device));
}

#[test]
#[should_panic(expected = "call `forward_peft`")]
fn rows_have_no_composed_weight() {
    let device = device();
    let model = model(&device)
        .with_adapter_rows(&[Some("plain"); 5])
        .unwrap();
    model.forward(input(&device));
}

#[test]
fn bad_choices_are_errors_that_name_them_and_change_nothing() {
    let device = device();
    let mut model = model(&device);
    let before = model.active().clone();
    let error = model
        .set_adapters(&[("plain", 1.0), ("none", 1.0)])
        .unwrap_err();
    assert!(matches!(error, PeftError::UnknownAdapter { name, .. } if name == "none"));
    let error = model.set_adapters(&[("plain", f64::NAN)]).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("weight of adapter `plain` = NaN"),
        "{error}"
    );
    let error = model
        .set_adapters(&[("plain", 1.0), ("plain", 2.0)])
        .unwrap_err();
    assert!(matches!(error, PeftError::AdapterName { name, .. } if name == "plain"));
    assert!(model.with_adapter_rows(&[Some("none")]).is_err());
    assert_eq!(*model.active(), before);

    let error =
        model.add_weighted_adapter("new", &[("plain", 1.0), ("dora", 1.0)], Combination::Cat);
    let error = error.unwrap_err();
    assert!(
        matches!(&error, PeftError::InModule { path, .. } if path == "first"),
        "{error}"
    );
    for density in [0.0, 1.5, f64::NAN] {
        let combination = Combination::MagnitudePrune { density };
        let error = model
            .add_weighted_adapter("new", &[("plain", 1.0)], combination)
            .unwrap_err();
        assert!(error.to_string().contains("density"), "{error}");
    }
    let error = model
        .add_weighted_adapter("new", &[], Combination::Cat)
        .unwrap_err();
    assert!(matches!(error, PeftError::NoTargets { .. }));
    let error = model
        .add_weighted_adapter("other", &[("plain", 1.0)], Combination::Cat)
        .unwrap_err();
    assert!(matches!(error, PeftError::AdapterName { name, .. } if name == "other"));
    assert_eq!(
        model.adapters().collect::<Vec<_>>(),
        ["plain", "dora", "other"]
    );
    assert_eq!(*model.active(), before);

    let rows = model.with_adapter_rows(&[Some("plain")]).unwrap();
    assert!(
        rows.merged()
            .unwrap_err()
            .to_string()
            .contains("1 rows of a batch")
    );
    assert!(rows.base_reference().is_err());
}

#[test]
fn concatenation_is_the_sum_and_ranks_other_than_the_most_stand_in_a_pattern() {
    let device = device();
    let mut model = model(&device);
    let wide = PeftConfig::new(LoraConfig::new(4), TargetConfig::list(["up"]));
    adapted_as(&mut model, "wide", &wide);
    let adapters = [("plain", 0.5), ("wide", -1.5)];
    let x = input(&device);
    let sum = model
        .with_adapters(&adapters)
        .unwrap()
        .forward_peft(x.clone());
    model
        .add_weighted_adapter("cat", &adapters, Combination::Cat)
        .unwrap();
    model.set_adapter("cat").unwrap();
    // Outputs of about 10 in f32, the same products in one or two.
    assert!(max_diff(&model.forward_peft(x), &sum) < 1e-4);
    let config = model.config("cat").unwrap();
    assert_eq!((config.lora.rank, config.lora.alpha), (7, 7.0));
    let ranks: Vec<_> = model.factors("cat").unwrap();
    let ranks: Vec<_> = ranks
        .iter()
        .map(|(path, lora)| (path.as_str(), lora.rank()))
        .collect();
    assert_eq!(
        ranks,
        [
            ("first", 3),
            ("blocks.0.up", 7),
            ("blocks.0.down", 3),
            ("blocks.1.up", 7),
            ("blocks.1.down", 3)
        ]
    );
    assert_eq!(
        config
            .targets
            .rank_pattern
            .iter()
            .next()
            .map(|(_, &rank)| rank),
        Some(3)
    );
}

#[test]
fn random_pruning_keeps_about_its_density_and_the_mean() {
    let device = device();
    let n = 64;
    let ones = |dims| Tensor::<2>::ones(dims, &device);
    let lora = LoraConfig::new(n).with_alpha(n as f64);
    let lora = lora.with_factors(ones([n, n]), ones([n, n])).unwrap();
    let combined = Combination::DareLinear { density: 0.25 }
        .combine(&[(&lora, 1.0)])
        .unwrap();
    let kept = values(&combined.a.val());
    assert!(kept.iter().all(|&value| value == 0.0 || value == 4.0));
    let share = kept.iter().filter(|&&value| value != 0.0).count() as f64 / kept.len() as f64;
    // 4096 draws of a quarter: ten standard deviations of 0.0068.
    assert!((share - 0.25).abs() < 0.068, "{share}");
}

#[test]
fn a_reference_is_a_snapshot_and_the_base_only_before_training() {
    let device = device();
    let x = input(&device);
    let mut model = PeftModel::new(Net::new(&device));
    model
        .quantize_nf4(&TargetConfig::list(["up"]), &Nf4Config::new())
        .unwrap();
    let lora = LoraConfig::new(2).with_dora(true).with_dropout(0.5);
    model
        .add_adapter("fresh", &PeftConfig::new(lora, TargetConfig::all_linear()))
        .unwrap();
    let base = model.base_reference().unwrap();
    assert!(!base.is_enabled());
    assert_eq!(
        values(&base.forward_peft(x.clone())),
        values(&model.disabled().forward_peft(x.clone()))
    );

    adapted(&mut model, "trained", TargetConfig::list(["down"]));
    let error = model.base_reference().unwrap_err();
    assert!(
        matches!(&error, PeftError::NotTheBase { path, change } if path == "blocks.0.down.weight" && *change > 0.01),
        "{error}"
    );
    // Inactive, it changes nothing.
    model.set_adapter("fresh").unwrap();
    assert!(model.base_reference().is_ok());

    model.set_adapter("trained").unwrap();
    let reference = model.reference();
    let before = values(&reference.forward_peft(x.clone()));
    assert!(params(&reference).iter().all(|(.., grad)| !grad));
    assert!(params(&model).iter().any(|(.., grad)| *grad));
    let zero = |lora: &Lora| {
        lora.config()
            .with_factors(lora.a.val(), lora.b.val().zeros_like())
    };
    let factors = model.factors("trained").unwrap();
    let factors = factors
        .into_iter()
        .map(|(path, lora)| (path, zero(&lora).unwrap()));
    let trained = model.config("trained").unwrap().clone();
    model
        .swap_adapter("trained", &trained, factors.collect())
        .unwrap();
    assert_ne!(values(&model.forward_peft(x.clone())), before);
    assert_eq!(values(&reference.forward_peft(x.clone())), before);
}

#[test]
fn a_swap_keeps_ids_and_the_choice_and_takes_what_has_no_new_factors() {
    let device = device();
    let mut model = model(&device);
    model
        .set_adapters(&[("plain", 0.5), ("other", 2.0)])
        .unwrap();
    let ids = |model: &PeftModel<Net>| -> Vec<_> {
        let found = params(model).into_iter();
        found
            .filter(|(path, ..)| path.contains(".peft.other."))
            .collect()
    };
    let before = ids(&model);
    let x = input(&device);
    let y = model.forward_peft(x.clone());

    let halved = |lora: &Lora| {
        let b = lora.b.val().detach().div_scalar(2.0);
        lora.config()
            .with_factors(lora.a.val().detach(), b)
            .unwrap()
    };
    let factors = model.factors("other").unwrap();
    let factors = factors
        .into_iter()
        .map(|(path, lora)| (path, halved(&lora)));
    let config = config(TargetConfig::list(["up", "down"]));
    model
        .swap_adapter("other", &config, factors.collect())
        .unwrap();
    assert_eq!(ids(&model), before, "paths, ids and gradients");
    let expected = Active::Sum(vec![("plain".into(), 0.5), ("other".into(), 2.0)]);
    assert_eq!(*model.active(), expected);
    assert!(max_diff(&model.forward_peft(x.clone()), &y) > 0.01);

    // Another rank and fewer modules.
    let narrow = PeftConfig::new(LoraConfig::new(1), TargetConfig::list(["down"]));
    let factors = vec![(
        "blocks.1.down".to_owned(),
        narrow.lora.init(48, 32, &device).unwrap(),
    )];
    model.swap_adapter("other", &narrow, factors).unwrap();
    let paths: Vec<_> = ids(&model).into_iter().map(|(path, ..)| path).collect();
    assert_eq!(
        paths,
        [
            "blocks.1.down.weight.peft.other.a",
            "blocks.1.down.weight.peft.other.b"
        ]
    );
    assert_eq!(model.config("other").unwrap(), &narrow);
    assert_eq!(
        model.adapters().collect::<Vec<_>>(),
        ["plain", "dora", "other"]
    );

    // What does not fit changes nothing.
    let y = values(&model.forward_peft(x.clone()));
    let wrong = vec![(
        "blocks.1.down".to_owned(),
        narrow.lora.init(48, 31, &device).unwrap(),
    )];
    let error = model.swap_adapter("other", &narrow, wrong).unwrap_err();
    assert!(matches!(error, PeftError::Shape { .. }), "{error}");
    let error = model.swap_adapter("none", &narrow, Vec::new()).unwrap_err();
    assert!(matches!(error, PeftError::UnknownAdapter { .. }), "{error}");
    assert_eq!(values(&model.forward_peft(x)), y);
}

#[test]
fn merging_beside_the_model_is_undone_by_going_on_and_refuses_what_is_not_finite() {
    let device = device();
    let mut model = model(&device);
    let x = input(&device);
    let before = values(&model.forward_peft(x.clone()));
    let (merged, _) = model.merged().unwrap();
    assert!(
        params(&merged)
            .iter()
            .all(|(path, ..)| !path.contains("peft.other"))
    );
    assert_eq!(values(&model.forward_peft(x.clone())), before);

    let infinite = |lora: &Lora| {
        let b = lora.b.val().detach().mul_scalar(f32::INFINITY);
        lora.config()
            .with_factors(lora.a.val().detach(), b)
            .unwrap()
    };
    let factors = model.factors("other").unwrap();
    let factors = factors
        .into_iter()
        .map(|(path, lora)| (path, infinite(&lora)));
    let config = model.config("other").unwrap().clone();
    model
        .swap_adapter("other", &config, factors.collect())
        .unwrap();
    model.set_adapter("other").unwrap();
    let error = model.merged().unwrap_err();
    let first = "blocks.0.up.weight";
    assert!(
        matches!(&error, PeftError::NotFinite { tensor, .. } if tensor == first),
        "{error}"
    );
    assert!(model.clone().merge_into_nf4(&Nf4Config::new()).is_err());
    model.set_adapter("dora").unwrap();
    assert!(model.merged().is_ok());
}

#[test]
fn a_merge_into_nf4_keeps_weights_packed_and_says_what_survived() {
    let device = device();
    let mut model = model(&device);
    model.set_adapter("plain").unwrap();
    let x = input(&device);
    let adapted = model.forward_peft(x.clone());
    let (merged, reports) = model.clone().merge_into_nf4(&Nf4Config::new()).unwrap();
    let paths: Vec<_> = reports.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, ["blocks.0.up", "blocks.1.up"]);
    for (path, report) in &reports {
        // The change is about as large as the weight.
        assert!((0.8..1.2).contains(&report.survived), "{path}: {report:?}");
        assert!(
            (0.0..0.5).contains(&report.relative_error),
            "{path}: {report:?}"
        );
    }
    let merged = PeftModel::new(merged);
    assert_eq!(merged.report().nf4_bytes, model.report().nf4_bytes);
    assert_eq!(merged.adapters().count(), 0);
    let base = model.disabled().forward_peft(x.clone());
    let difference = max_diff(&merged.forward_peft(x.clone()), &adapted);
    assert!(difference > 0.0, "requantised");
    assert!(difference < max_diff(&base, &adapted) / 2.0, "{difference}");
}
