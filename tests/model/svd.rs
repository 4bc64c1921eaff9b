//! Combinations by SVD, and adapters of any kind as plain LoRA. Golden: `tests/golden/combine/generate.py`.

use burn::tensor::Tensor;
use burn_peft::PeftError;
use burn_peft::adapter::{
    Combination, Delta, DeltaReport, Lora, LoraConfig, MajoritySign, Truncation,
};
use burn_peft::format::{LoadOptions, SaveOptions};
use burn_peft::model::{PeftConfig, PeftModel, TargetConfig};

use super::several::{golden, model, tensor};
use super::{Net, adapted_as, device, input, max_diff, values};

fn norm(tensor: &Tensor<2>) -> f64 {
    let squares = values(tensor)
        .into_iter()
        .map(|value| f64::from(value).powi(2));
    squares.sum::<f64>().sqrt()
}

fn factors_of(model: &PeftModel<Net>, name: &str) -> Vec<(String, Lora)> {
    model.factors(name).unwrap()
}

#[test]
fn products_are_those_of_peft() {
    let device = device();
    let (golden, mut model) = golden(&device);
    let cases: Vec<_> = golden.cases.iter().filter(|case| case.by_svd()).collect();
    assert_eq!(cases.len(), 8);
    for (place, case) in cases.into_iter().enumerate() {
        let name = format!("case{place}");
        let truncation = case.rank.map_or(Truncation::LargestRank, Truncation::Rank);
        let report = model
            .add_weighted_adapter_svd(&name, &case.adapters(), case.combination(), truncation)
            .unwrap();
        let factors = model.factors(&name).unwrap();
        let [(path, lora)] = &factors[..] else {
            panic!("{factors:?}")
        };
        let [(reported, DeltaReport { rank, .. })] = &report[..] else {
            panic!("{report:?}")
        };
        assert_eq!((path, lora.scale(), lora.rank()), (reported, 1.0, *rank));
        assert_eq!(*rank, case.a.len(), "{}", case.kind);
        let expected = tensor(&case.b, &device).matmul(tensor(&case.a, &device));
        let difference = max_diff(&lora.delta_weight(), &expected.transpose());
        // Rounding of values below 10 in f32, times the largest singular value over the gap behind those kept: below 20.
        assert!(difference < 1e-4, "{name} {}: {difference}", case.kind);
    }
}

#[test]
fn a_sum_of_different_ranks_is_exact_at_full_rank_and_the_best_of_a_smaller_one() {
    let device = device();
    let mut model = model(&device);
    let wide = PeftConfig::new(
        LoraConfig::new(5).with_rslora(true),
        TargetConfig::list(["up"]),
    );
    adapted_as(&mut model, "wide", &wide);
    let adapters = [("plain", 0.5), ("wide", -1.5), ("other", 1.0)];
    let x = input(&device);
    let sum = model
        .with_adapters(&adapters)
        .unwrap()
        .forward_peft(x.clone());
    // 3 + 5 + 3 in the blocks, 3 in the others.
    let full = model
        .add_lora_of("full", &adapters, Truncation::Rank(11))
        .unwrap();
    model.set_adapter("full").unwrap();
    // Outputs of about 10 in f32, through factors that an SVD has turned.
    assert!(max_diff(&model.forward_peft(x.clone()), &sum) < 1e-3);
    for (path, report) in &full {
        assert!(report.relative_error < 1e-6, "{path}: {report:?}");
        let most = if path.ends_with("up") {
            11
        } else if path.ends_with("down") {
            6
        } else {
            3
        };
        assert_eq!(report.rank, most, "{path}");
    }
    let config = model.config("full").unwrap();
    assert_eq!((config.lora.rank, config.lora.alpha), (11, 11.0));
    assert!(!config.lora.rslora);

    let best = model
        .add_lora_of("best", &adapters, Truncation::LargestRank)
        .unwrap();
    let parts = factors_of(&model, "full")
        .into_iter()
        .zip(factors_of(&model, "best"));
    for (((path, whole), (_, part)), (_, report)) in parts.zip(&best) {
        let whole = whole.delta_weight();
        let missed = norm(&(whole.clone() - part.delta_weight())) / norm(&whole);
        // A quotient of norms in f32.
        assert!(
            (missed - report.relative_error).abs() < 1e-5,
            "{path}: {missed}, {report:?}"
        );
        let rank = if path.ends_with("up") { 5 } else { 3 };
        assert_eq!(report.rank, rank, "{path}");
        // What is left out is orthogonal to what is kept, in its columns: no other product of this rank is nearer.
        let rest = whole.clone() - part.delta_weight();
        let overlap = part.a.val().transpose().matmul(rest);
        assert!(
            norm(&overlap) < 1e-5 * norm(&part.a.val()) * norm(&whole),
            "{path}"
        );
    }
    let most = best
        .iter()
        .map(|(_, report)| report.relative_error)
        .fold(0.0, f64::max);
    assert!(most > 0.01, "something is left out");
}

#[test]
fn pruning_is_of_the_changes_and_not_of_their_factors() {
    let device = device();
    let n = 32;
    let ones = |dims| Tensor::<2>::ones(dims, &device);
    let lora = LoraConfig::new(1).with_alpha(1.0);
    let lora = lora.with_factors(ones([n, 1]), ones([1, n])).unwrap();
    for combination in [
        Combination::DareLinear { density: 0.25 },
        Combination::DareTies {
            density: 0.25,
            sign: MajoritySign::Total,
        },
    ] {
        let (combined, report) = combination
            .combine_svd(&[(&lora, 1.0)], Truncation::Within(0.0))
            .unwrap();
        let kept = values(&combined.delta_weight());
        // A rank of `n` and values of 4 through an f32 SVD.
        let near = |value: f32, whole: f32| (value - whole).abs() < 1e-4;
        assert!(
            kept.iter()
                .all(|&value| near(value, 0.0) || near(value, 4.0))
        );
        let share =
            kept.iter().filter(|&&value| near(value, 4.0)).count() as f64 / kept.len() as f64;
        // 1024 draws of a quarter: eight standard deviations of 0.0135.
        assert!((share - 0.25).abs() < 0.11, "{share}");
        assert!(report.rank > n / 2, "{report:?}");
        // The best of rank 1 of a random matrix with this mean is near the mean.
        let (one, report) = combination
            .combine_svd(&[(&lora, 1.0)], Truncation::LargestRank)
            .unwrap();
        assert_eq!((one.rank(), report.rank), (1, 1));
        assert!(report.relative_error > 0.3, "{report:?}");
    }
}

#[test]
fn a_dora_becomes_a_lora_of_the_same_outputs() {
    let device = device();
    let x = input(&device);
    // Dense in one module, packed in two.
    let mut model = model(&device);
    model.set_adapter("dora").unwrap();
    let dora = model.forward_peft(x.clone());
    let report = model
        .add_lora_of("full", &[("dora", 1.0)], Truncation::Rank(1000))
        .unwrap();
    let ranks: Vec<_> = report
        .iter()
        .map(|(path, report)| (path.as_str(), report.rank))
        .collect();
    assert_eq!(
        ranks,
        [("first", 8), ("blocks.0.up", 32), ("blocks.1.up", 32)]
    );
    assert!(
        report
            .iter()
            .all(|(_, report)| report.relative_error == 0.0)
    );
    assert_eq!(model.active_adapter(), Some("dora"));
    model.set_adapter("full").unwrap();
    // Outputs of about 10 in f32, through a decomposition of every change.
    assert!(max_diff(&model.forward_peft(x.clone()), &dora) < 1e-3);
    assert!(max_diff(&model.disabled().forward_peft(x.clone()), &dora) > 0.1);

    // The sum of a DoRA and a plain one, with weights.
    let adapters = [("dora", 0.5), ("plain", -2.0)];
    let sum = model
        .with_adapters(&adapters)
        .unwrap()
        .forward_peft(x.clone());
    model
        .add_lora_of("sum", &adapters, Truncation::Rank(1000))
        .unwrap();
    model.set_adapter("sum").unwrap();
    assert!(max_diff(&model.forward_peft(x), &sum) < 1e-3);
}

#[test]
fn a_bound_is_held_module_by_module_and_the_result_is_saved() {
    const BOUND: f64 = 0.2;
    let device = device();
    let base = Net::new(&device);
    let mut model = PeftModel::new(base.clone());
    let config = PeftConfig::new(
        LoraConfig::new(3).with_dora(true),
        TargetConfig::list(["first", "down", "lm_head"]),
    );
    adapted_as(&mut model, "dora", &config);
    let report = model
        .add_lora_of("lora", &[("dora", 1.0)], Truncation::Within(BOUND))
        .unwrap();
    model.set_adapter("lora").unwrap();
    let made = factors_of(&model, "lora");
    let doras = factors_of(&model, "dora");
    let weights = [
        &base.first,
        &base.blocks[0].down,
        &base.blocks[1].down,
        &base.lm_head,
    ];
    assert_eq!(report.len(), 4);
    for (place, (path, report)) in report.iter().enumerate() {
        let weight = weights[place].weight.val().inner();
        let weight = Tensor::from_inner(weight);
        let change = doras[place].1.merge(weight.clone()) - weight;
        let (made_path, lora) = &made[place];
        assert_eq!((made_path, lora.rank()), (path, report.rank));
        let missed = norm(&(change.clone() - lora.delta_weight())) / norm(&change);
        // A quotient of norms in f32.
        assert!(
            (missed - report.relative_error).abs() < 1e-5,
            "{path}: {missed}"
        );
        assert!(report.relative_error <= BOUND, "{path}: {report:?}");
        // One less would not do.
        if report.rank > 1 {
            let config = LoraConfig::new(report.rank - 1);
            let (_, less) = config.from_delta(&change).unwrap();
            assert!(less.relative_error > BOUND, "{path}");
        }
    }
    let mut ranks: Vec<_> = report.iter().map(|(_, report)| report.rank).collect();
    let most = *ranks.iter().max().unwrap();
    ranks.retain(|&rank| rank != most);
    assert!(!ranks.is_empty(), "modules of one rank show nothing");
    let config = model.config("lora").unwrap();
    assert_eq!(config.lora.rank, most);
    let pattern: Vec<_> = config
        .targets
        .rank_pattern
        .iter()
        .map(|(_, &rank)| rank)
        .collect();
    assert!(
        ranks.iter().all(|rank| pattern.contains(rank)),
        "{pattern:?}"
    );

    let dir = tempfile::tempdir().unwrap();
    let saved = model
        .save_adapter("lora", dir.path(), &SaveOptions::default())
        .unwrap();
    let mut loaded = PeftModel::new(base);
    loaded
        .load_adapter("lora", &saved, &LoadOptions::default())
        .unwrap();
    let x = input(&device);
    assert_eq!(
        values(&loaded.forward_peft(x.clone())),
        values(&model.forward_peft(x))
    );
    assert!(!loaded.config("lora").unwrap().lora.dora);
}

#[test]
fn what_cannot_be_converted_is_named_and_changes_nothing() {
    let device = device();
    let mut model = model(&device);
    let before = model.active().clone();
    let mut refused = |name: &str, adapters: &[(&str, f64)], combination, truncation| {
        let error = model.add_weighted_adapter_svd(name, adapters, combination, truncation);
        assert_eq!(
            model.adapters().collect::<Vec<_>>(),
            ["plain", "dora", "other"]
        );
        assert_eq!(*model.active(), before);
        error.unwrap_err()
    };
    let linear = Combination::Linear;
    let whole = Truncation::LargestRank;
    let error = refused("new", &[("none", 1.0)], linear, whole);
    assert!(matches!(error, PeftError::UnknownAdapter { name, .. } if name == "none"));
    for name in ["plain", "a.b", ""] {
        let error = refused(name, &[("dora", 1.0)], linear, whole);
        assert!(matches!(error, PeftError::AdapterName { .. }), "{error}");
    }
    let error = refused("new", &[], linear, whole);
    assert!(matches!(error, PeftError::NoTargets { .. }), "{error}");
    for adapter in ["plain", "dora"] {
        let error = refused("new", &[(adapter, 1.0)], linear, Truncation::Rank(0));
        assert!(error.to_string().contains("rank = 0"), "{error}");
        assert!(matches!(&error, PeftError::InModule { path, .. } if path == "first"));
        for bound in [-0.1, 1.1, f64::NAN] {
            let error = refused("new", &[(adapter, 1.0)], linear, Truncation::Within(bound));
            assert!(error.to_string().contains("bound"), "{error}");
        }
        let none = Combination::MagnitudePrune { density: 0.0 };
        let error = refused("new", &[(adapter, 1.0)], none, whole);
        assert!(error.to_string().contains("density"), "{error}");
    }
    // Of a DoRA without its weight nobody knows the change.
    let (_, dora) = factors_of(&model, "dora").remove(0);
    let error = linear.combine_svd(&[(&dora, 1.0)], whole).unwrap_err();
    assert!(matches!(error, PeftError::Config { name, .. } if name == "dora"));
    assert!(linear.combine_svd(&[], whole).is_err());
}
