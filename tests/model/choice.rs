//! Which adapters are active and which train, as in PEFT 0.21.2: `add_adapter`, `load_adapter`, `set_adapter`, `set_requires_grad`.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn_peft::PeftError;
use burn_peft::adapter::LoraConfig;
use burn_peft::checkpointing::Checkpointing;
use burn_peft::format::{LoadOptions, SaveOptions};
use burn_peft::model::{BiasMode, PeftConfig, PeftModel, TargetConfig};
use burn_peft::optim::clip_grad_norm;

use super::{Net, adapted, config, device, input, max_diff, params, values};

/// Whether the parameters of an adapter require a gradient: all of them, none, or `None` for some.
fn grad(model: &PeftModel<Net>, name: &str) -> Option<bool> {
    let part = format!(".peft.{name}.");
    let found = params(model).into_iter();
    let mut found = found.filter(|(path, ..)| path.contains(&part));
    let (.., first) = found.next().unwrap();
    found.all(|(.., grad)| grad == first).then_some(first)
}

fn state(model: &PeftModel<Net>, names: &[&str]) -> (String, Vec<Option<bool>>) {
    let grads = names.iter().map(|name| grad(model, name));
    (model.active().to_string(), grads.collect())
}

#[test]
fn adapters_are_active_and_trainable_when_they_are_in_peft() {
    let device = device();
    let dir = tempfile::tempdir().unwrap();
    let up = || config(TargetConfig::list(["up"]));
    let mut model = PeftModel::new(Net::new(&device));
    // Each line is what PEFT answers to the same call.
    model.add_adapter("one", &up()).unwrap();
    assert_eq!(state(&model, &["one"]), ("one".into(), vec![Some(true)]));
    model.add_adapter("two", &up()).unwrap();
    let both = ["one", "two"];
    let of = |active: &str, grads: &[bool]| {
        let grads = grads.iter().copied().map(Some).collect::<Vec<_>>();
        (active.to_owned(), grads)
    };
    assert_eq!(state(&model, &both), of("one", &[true, false]));
    model.set_adapter("two").unwrap();
    assert_eq!(state(&model, &both), of("two", &[false, true]));
    model.set_adapter("one").unwrap();
    let saved = model
        .save_adapter("one", dir.path(), &SaveOptions::default())
        .unwrap();
    let report = model
        .load_adapter("three", &saved, &LoadOptions::new())
        .unwrap();
    assert_eq!(
        (report.active, report.trainable),
        (Some(false), Some(false))
    );
    let text = report.to_string();
    assert!(
        text.contains("frozen") && text.contains("not active"),
        "{text}"
    );
    let three = ["one", "two", "three"];
    assert_eq!(state(&model, &three), of("one", &[true, false, false]));
    model.set_adapter("three").unwrap();
    assert_eq!(state(&model, &three), of("three", &[false, false, true]));

    let mut fresh = PeftModel::new(Net::new(&device));
    let report = fresh
        .load_adapter("one", &saved, &LoadOptions::new())
        .unwrap();
    assert_eq!((report.active, report.trainable), (Some(true), Some(false)));
    assert_eq!(state(&fresh, &["one"]), of("one", &[false]));
    let mut fresh = PeftModel::new(Net::new(&device));
    let options = LoadOptions::new().with_trainable(true);
    fresh.load_adapter("one", &saved, &options).unwrap();
    assert_eq!(state(&fresh, &["one"]), of("one", &[true]));
    let options = options.with_activate(Some(true));
    fresh.load_adapter("two", &saved, &options).unwrap();
    assert_eq!(state(&fresh, &both), of("two", &[false, true]));
    let options = LoadOptions::new().with_activate(Some(false));
    let mut fresh = PeftModel::new(Net::new(&device));
    fresh.load_adapter("one", &saved, &options).unwrap();
    assert_eq!(state(&fresh, &["one"]), of("none", &[false]));
}

#[test]
fn a_frozen_adapter_can_stand_beside_one_that_trains() {
    let device = device();
    let mut model = PeftModel::new(Net::new(&device));
    adapted(&mut model, "old", TargetConfig::list(["up", "first"]));
    adapted(&mut model, "new", TargetConfig::list(["up"]));
    model.set_adapters(&[("old", 1.0), ("new", 1.0)]).unwrap();
    let x = input(&device);
    let y = values(&model.forward_peft(x.clone()));
    model.set_trainable("old", false).unwrap();
    assert!(!model.is_trainable("old").unwrap());
    assert_eq!(values(&model.forward_peft(x.clone())), y);
    assert_eq!(grad(&model, "old"), Some(false));
    assert_eq!(grad(&model, "new"), Some(true));
    assert_eq!(
        model.report().trainable_params,
        2 * (3 * 32 + 3 * 48),
        "the new one alone"
    );
    let check = |model: &PeftModel<Net>, what: &str| {
        assert_eq!(grad(model, "old"), Some(false), "{what}");
        assert_eq!(grad(model, "new"), Some(true), "{what}");
        for forward in [Net::forward, Net::forward_peft] {
            let grads = forward(model, x.clone()).sum().backward();
            for (name, expected) in [("old", false), ("new", true)] {
                for (path, lora) in model.factors(name).unwrap() {
                    let found = lora.b.val().grad(&grads).is_some();
                    assert_eq!(found, expected, "{what}: {name} of {path}");
                }
            }
        }
    };
    check(&model, "set_trainable");
    check(&model.valid().train(), "valid and train");
    check(&model.clone().fork(&device), "fork");
    let choice = [("old", 0.5), ("new", 1.0)];
    check(
        &model.with_adapters(&choice).unwrap(),
        "a choice for one call",
    );
    // A choice by `activate` leaves it frozen; `set_adapter` lets it train, as PEFT does.
    model.activate(&[("old", 1.0)]).unwrap();
    assert_eq!(grad(&model, "old"), Some(false));
    model.set_adapter("old").unwrap();
    assert_eq!(grad(&model, "old"), Some(true));
    let error = model.set_trainable("none", true).unwrap_err();
    assert!(matches!(error, PeftError::UnknownAdapter { .. }), "{error}");
}

#[test]
fn a_step_in_which_nothing_trains_is_an_error_that_names_the_adapters() {
    let device = device();
    let mut model = PeftModel::new(Net::new(&device));
    adapted(&mut model, "served", TargetConfig::list(["up"]));
    model.set_trainable("served", false).unwrap();
    let error = clip_grad_norm(&model, &mut GradientsParams::new(), 1.0).unwrap_err();
    let text = error.to_string();
    for part in ["served", "frozen", "set_trainable", "LoadOptions"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // What trains and got no gradient in this step is not at fault.
    model.set_trainable("served", true).unwrap();
    let norm = clip_grad_norm(&model, &mut GradientsParams::new(), 1.0).unwrap();
    assert_eq!(norm, 0.0);
}

#[test]
#[should_panic(expected = "the adapters [\"served\"] are frozen")]
fn a_backward_in_which_nothing_trains_panics_with_the_adapters() {
    let device = device();
    let mut model = PeftModel::new(Net::new(&device));
    adapted(&mut model, "served", TargetConfig::list(["up"]));
    model.set_trainable("served", false).unwrap();
    let run = Checkpointing::by_block(1);
    let (y, tape) = run
        .forward(
            &model.blocks,
            input(&device).repeat_dim(1, 4),
            |block, x| x.clone() + super::run_block(block, x),
        )
        .unwrap();
    tape.backward(&y.sum(), &model);
}

#[test]
fn a_renamed_adapter_is_the_same_under_another_name() {
    let device = device();
    let mut model = PeftModel::new(Net::new(&device));
    adapted(&mut model, "one", TargetConfig::list(["up"]));
    adapted(&mut model, "two", TargetConfig::list(["up", "down"]));
    model.set_adapters(&[("one", 0.5), ("two", 1.0)]).unwrap();
    let x = input(&device);
    let y = values(&model.forward_peft(x.clone()));
    let ids = |model: &PeftModel<Net>, name: &str| -> Vec<_> {
        let part = format!(".peft.{name}.");
        let found = params(model).into_iter();
        let found = found.filter(|(path, ..)| path.contains(&part));
        found.map(|(_, id, grad)| (id, grad)).collect()
    };
    let before = ids(&model, "one");
    for (name, taken) in [("one", "two"), ("one", ""), ("one", "a.b")] {
        let error = model.rename_adapter(name, taken).unwrap_err();
        assert!(matches!(error, PeftError::AdapterName { .. }), "{error}");
    }
    assert!(model.rename_adapter("none", "three").is_err());
    model.rename_adapter("one", "first").unwrap();
    model.rename_adapter("two", "two").unwrap();
    assert_eq!(model.adapters().collect::<Vec<_>>(), ["first", "two"]);
    assert_eq!(model.active().to_string(), "0.5·first + two");
    assert_eq!(ids(&model, "first"), before);
    assert!(ids(&model, "one").is_empty());
    assert_eq!(values(&model.forward_peft(x)), y);
    model.config("first").unwrap();
}

/// Norms, biases or tokens alone: PEFT's LN tuning and BitFit, and a head alone.
#[test]
fn an_adapter_may_have_no_low_rank_change() {
    let device = device();
    let none = || TargetConfig::list::<String>([]);
    let lora = || LoraConfig::new(2);
    let x = input(&device);
    for (config, count) in [
        (
            PeftConfig::new(lora(), none()).with_modules_to_save(["lm_head"]),
            2,
        ),
        (PeftConfig::new(lora(), none()).with_bias(BiasMode::All), 6),
    ] {
        let net = Net::new(&device);
        let base = values(&net.forward(x.clone()));
        let mut model = PeftModel::new(net.clone());
        let report = model.add_adapter("default", &config).unwrap();
        assert_eq!(report.targets.matched.len(), 0);
        assert_eq!(
            params(&model).iter().filter(|(.., grad)| *grad).count(),
            count
        );
        assert_eq!(values(&model.forward_peft(x.clone())), base);
        let changes = model.changes("default").unwrap().into_iter();
        let moved = changes.map(|(path, change)| (path, super::moved(change)));
        model
            .swap_changes("default", &config, moved.collect())
            .unwrap();
        let y = model.forward_peft(x.clone());
        let dir = tempfile::tempdir().unwrap();
        let dir = model
            .save_adapter("default", dir.path(), &SaveOptions::default())
            .map(|at| (at, dir))
            .unwrap();
        let mut read = PeftModel::new(net);
        read.load_adapter("default", &dir.0, &LoadOptions::new())
            .unwrap();
        assert_eq!(values(&read.forward_peft(x.clone())), values(&y));
        assert!(values(&y) != base);
        let (merged, _) = read.merge_and_unload().unwrap();
        assert!(max_diff(&merged.forward(x.clone()), &y) < 1e-4);
    }
    // Nothing at all is still an error.
    let mut model = PeftModel::new(Net::new(&device));
    let error = model.add_adapter("default", &PeftConfig::new(lora(), none()));
    assert!(error.is_err());
}

#[test]
fn a_weight_is_not_packed_under_values_that_were_computed_from_it() {
    let device = device();
    for lora in [
        LoraConfig::new(2).with_dora(true),
        LoraConfig::new(2).with_init(burn_peft::adapter::LoraInit::Pissa),
    ] {
        let mut model = PeftModel::new(Net::new(&device));
        let config = PeftConfig::new(lora, TargetConfig::list(["up"]));
        model.add_adapter("early", &config).unwrap();
        let nf4 = burn_peft::nf4::Nf4Config::new();
        let error = model.quantize_nf4(&TargetConfig::all_linear(), &nf4);
        let text = error.unwrap_err().to_string();
        for part in ["blocks.0.up", "early", "pack the weight first"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(model.report().nf4_bytes, 0);
        model
            .quantize_nf4(&TargetConfig::list(["down"]), &nf4)
            .unwrap();
        model.delete_adapter("early").unwrap();
        model
            .quantize_nf4(&TargetConfig::list(["up"]), &nf4)
            .unwrap();
        model.add_adapter("late", &config).unwrap();
    }
}
