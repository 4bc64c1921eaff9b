//! Adding, choosing, deleting, disabling, merging, unloading; ids and flags throughout.

use burn::module::{
    Lora as BurnLora, Module, Param, ParamGroup, Reparameterization, Reparameterizer,
};
use burn::tensor::Tensor;
use burn_peft::PeftError;
use burn_peft::adapter::LoraConfig;
use burn_peft::model::{ChangeKind, PeftConfig, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;

use crate::model::{Net, adapted, config, device, input, max_diff, params, values};

/// The whole life of a model with a packed base: a second adapter, the first one deleted, all unloaded.
#[test]
fn ids_and_packed_bytes_survive_every_change() {
    let device = device();
    device.seed(1);
    let net = Net::new(&device);
    let ids: Vec<_> = params(&net)
        .into_iter()
        .map(|(path, id, _)| (path, id))
        .collect();
    let x = input(&device);
    let mut model = PeftModel::new(net);
    let targets = TargetConfig::all_linear();
    model
        .quantize_nf4(&TargetConfig::list(["up", "down"]), &Nf4Config::new())
        .unwrap();
    let packed = model.forward_peft(x.clone());
    let base_ids = |model: &PeftModel<Net>| -> Vec<_> {
        let found = params(model)
            .into_iter()
            .filter(|(path, ..)| !path.contains("peft"));
        found.map(|(path, id, _)| (path, id)).collect()
    };
    let adapter_paths = |model: &PeftModel<Net>, name: &str| -> Vec<_> {
        let part = format!(".weight.peft.{name}.");
        params(model)
            .into_iter()
            .filter(|(path, ..)| path.contains(&part))
            .collect()
    };

    adapted(&mut model, "first", targets.clone());
    let first = model.forward_peft(x.clone());
    assert!(max_diff(&first, &packed) > 0.1);
    let first_params = adapter_paths(&model, "first");
    assert_eq!(
        first_params.len(),
        2 * 5,
        "A and B of all linear layers but the head"
    );
    assert_eq!(first_params[0].0, "first.weight.peft.first.a");

    adapted(&mut model, "second", TargetConfig::list(["up", "lm_head"]));
    assert_eq!(model.adapters().collect::<Vec<_>>(), ["first", "second"]);
    assert_eq!(model.active_adapter(), Some("second"));
    let second = model.forward_peft(x.clone());
    assert!(max_diff(&second, &first) > 0.1);

    let report = model.report();
    assert_eq!(report.adapters(), ["first", "second"]);
    assert_eq!(report.requires_grad("first"), Some(false));
    assert_eq!(report.requires_grad("second"), Some(true));
    assert_eq!(report.requires_grad("third"), None);
    let up = report.weights.iter().find(|w| w.path == "blocks.0.up");
    let [one, two] = &up.unwrap().adapters[..] else {
        panic!("{up:?}")
    };
    assert_eq!(
        (one.name.as_str(), one.active, one.requires_grad),
        ("first", false, Some(false))
    );
    assert_eq!(
        (two.name.as_str(), two.active, two.requires_grad),
        ("second", true, Some(true))
    );
    let kind = ChangeKind::Lora {
        rank: 3,
        scale: 5.0 / 3.0,
        dora: false,
    };
    assert_eq!(two.kind, kind);
    let table = report.table();
    assert_eq!(table.lines().count(), 1 + report.weights.len());
    let line = table
        .lines()
        .find(|line| line.starts_with("blocks.0.up "))
        .unwrap();
    let words: Vec<_> = line.split_whitespace().collect();
    assert_eq!(
        words[..6],
        ["blocks.0.up", "32", "x", "48", "NF4", "factored"],
        "{table}"
    );
    assert!(line.contains(
        "first (LoRA r 3, scale 1.667, frozen), second* (LoRA r 3, scale 1.667, trains)"
    ));
    let ids_of = |params: Vec<(String, _, bool)>| -> Vec<_> {
        params.into_iter().map(|(path, id, _)| (path, id)).collect()
    };
    assert_eq!(
        ids_of(adapter_paths(&model, "first")),
        ids_of(first_params),
        "the first keeps its ids"
    );
    assert!(
        adapter_paths(&model, "first")
            .iter()
            .all(|(.., grad)| !grad),
        "inactive ones need no gradient"
    );
    assert!(
        adapter_paths(&model, "second")
            .iter()
            .all(|(.., grad)| *grad)
    );

    let clone = model.clone();
    model.set_adapter("first").unwrap();
    assert_eq!(values(&model.forward_peft(x.clone())), values(&first));
    assert_eq!(
        values(&clone.forward_peft(x.clone())),
        values(&second),
        "clones are independent"
    );

    model.delete_adapter("first").unwrap();
    assert!(adapter_paths(&model, "first").is_empty());
    assert_eq!(
        values(&model.forward_peft(x.clone())),
        values(&packed),
        "none is active"
    );
    model.set_adapter("second").unwrap();
    assert_eq!(values(&model.forward_peft(x.clone())), values(&second));
    assert_eq!(base_ids(&model), ids);

    let unloaded = PeftModel::new(model.unload().unwrap());
    assert_eq!(base_ids(&unloaded), ids);
    assert_eq!(params(&unloaded).len(), ids.len(), "no adapter is left");
    assert_eq!(
        unloaded.report().weights.len(),
        4,
        "the packed ones are packed still"
    );
    assert_eq!(values(&unloaded.forward_peft(x)), values(&packed));
}

#[test]
fn disabled_is_the_base_to_the_bit() {
    let device = device();
    let net = Net::new(&device);
    let x = input(&device);
    let base = net.forward(x.clone());
    let mut model = PeftModel::new(net);
    adapted(&mut model, "default", TargetConfig::all_linear());
    let with = model.forward_peft(x.clone());
    assert!(max_diff(&with, &base) > 0.1);
    let reference = model.disabled();
    assert_eq!(values(&reference.forward_peft(x.clone())), values(&base));
    assert_eq!(
        values(&reference.forward(x.clone())),
        values(&base),
        "the slow way too"
    );
    assert_eq!(
        values(&model.forward_peft(x.clone())),
        values(&with),
        "the other clone is as it was"
    );
    model.disable_adapters();
    assert_eq!(values(&model.forward_peft(x.clone())), values(&base));
    adapted(&mut model, "later", TargetConfig::all_linear());
    assert_eq!(
        values(&model.forward_peft(x.clone())),
        values(&base),
        "what is added later is off too"
    );
    model.set_adapter("default").unwrap();
    model.enable_adapters();
    assert_eq!(values(&model.forward_peft(x)), values(&with));
}

#[test]
fn a_merge_computes_the_same_and_leaves_a_plain_module() {
    let device = device();
    device.seed(3);
    let net = Net::new(&device);
    let ids: Vec<_> = params(&net)
        .into_iter()
        .map(|(path, id, _)| (path, id))
        .collect();
    let x = input(&device);
    for pack in [false, true] {
        let mut model = PeftModel::new(net.clone());
        if pack {
            model
                .quantize_nf4(&TargetConfig::list(["up", "down"]), &Nf4Config::new())
                .unwrap();
        }
        adapted(&mut model, "default", TargetConfig::list(["first", "up"]));
        let expected = model.forward_peft(x.clone());
        let (merged, report) = model.merge_and_unload().unwrap();
        assert_eq!(report.max_cast_error, 0.0, "f32 throughout");
        let found: Vec<_> = params(&merged)
            .into_iter()
            .map(|(path, id, _)| (path, id))
            .collect();
        assert_eq!(found, ids);
        // f32 sums of 48 terms through four layers.
        assert!(max_diff(&merged.forward(x.clone()), &expected) <= 1e-4);
        let merged = PeftModel::new(merged);
        let still: Vec<_> = merged
            .report()
            .weights
            .iter()
            .map(|weight| weight.path.clone())
            .collect();
        // Packed weights without an adapter stay packed.
        assert_eq!(
            still,
            if pack {
                vec!["blocks.0.down", "blocks.1.down"]
            } else {
                vec![]
            }
        );
    }
}

#[test]
fn only_factors_require_a_gradient_through_every_walk() {
    let device = device();
    let mut model = PeftModel::new(Net::new(&device));
    model
        .quantize_nf4(&TargetConfig::list(["up"]), &Nf4Config::new())
        .unwrap();
    adapted(&mut model, "default", TargetConfig::all_linear());
    let check = |model: &PeftModel<Net>, what: &str| {
        for (path, _, grad) in params(model) {
            assert_eq!(grad, path.contains(".peft.default."), "{path} after {what}");
        }
    };
    check(&model, "attaching");
    check(&model.valid().train(), "valid and train");
    check(&model.clone().fork(&device), "fork");
    let record = model.clone().into_record();
    // Burn 0.22 loads a record of its column layout into uninitialised parameters only.
    let mut fresh = PeftModel::new(Net::new(&device));
    fresh
        .quantize_nf4(&TargetConfig::list(["up"]), &Nf4Config::new())
        .unwrap();
    fresh
        .add_adapter("default", &config(TargetConfig::all_linear()))
        .unwrap();
    let loaded = fresh.load_record(record.clone());
    check(&loaded, "a record");
    let x = input(&device);
    assert_eq!(
        values(&loaded.forward_peft(x.clone())),
        values(&model.forward_peft(x))
    );

    let mut dense = PeftModel::new(Net::new(&device));
    adapted(&mut dense, "default", TargetConfig::list(["up"]));
    let plain = Net::new(&device);
    let error = plain
        .try_load_record(dense.into_record())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("weight.peft.default.a"),
        "a model without adapters refuses it: {error}"
    );
}

#[test]
fn adapters_record_alone() {
    let device = device();
    device.seed(4);
    let net = Net::new(&device);
    let x = input(&device);
    let mut trained = PeftModel::new(net.clone());
    adapted(&mut trained, "default", TargetConfig::all_linear());
    let group = trained.adapter_params();
    let record = trained.clone().into_record_group(group);
    assert_eq!(record.len(), 2 * 5, "no base");
    let mut fresh = PeftModel::new(net);
    fresh
        .add_adapter("default", &config(TargetConfig::all_linear()))
        .unwrap();
    let loaded = fresh.load_record(record.allow_partial(true));
    assert_eq!(
        values(&loaded.forward_peft(x.clone())),
        values(&trained.forward_peft(x))
    );
}

#[test]
fn errors_name_what_is_wrong_and_change_nothing() {
    let device = device();
    let mut model = PeftModel::new(Net::new(&device));
    adapted(&mut model, "default", TargetConfig::list(["up"]));
    let before = model.report();
    let up = config(TargetConfig::list(["up"]));

    for name in ["", "a.b", "a/b", "..", "nf4", "default", "a\0b"] {
        let error = model.add_adapter(name, &up).unwrap_err();
        assert!(
            matches!(error, PeftError::AdapterName { .. }),
            "{name:?}: {error}"
        );
    }
    let error = model
        .add_adapter("new", &config(TargetConfig::list(["up", "dwn"])))
        .unwrap_err()
        .to_string();
    assert!(error.contains("dwn") && error.contains("down"), "{error}");
    let zero = PeftConfig::new(LoraConfig::new(0), TargetConfig::list(["up"]));
    assert!(matches!(
        model.add_adapter("new", &zero),
        Err(PeftError::Config { .. })
    ));
    match model.set_adapter("defalt") {
        Err(PeftError::UnknownAdapter { name, adapters }) => {
            assert_eq!(
                (name.as_str(), adapters),
                ("defalt", vec!["default".to_string()])
            );
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        model.delete_adapter("x"),
        Err(PeftError::UnknownAdapter { .. })
    ));
    let lora = LoraConfig::new(2).init(3, 5, &device).unwrap();
    match model.insert_adapter("new", &up, vec![("blocks.0.up".into(), lora.clone())]) {
        Err(PeftError::Shape {
            tensor,
            expected,
            found,
        }) => {
            assert!(tensor.contains("blocks.0.up"));
            assert_eq!((expected, found), (vec![32, 48], vec![3, 5]));
        }
        other => panic!("{other:?}"),
    }
    let error = model
        .insert_adapter("new", &up, vec![("blocks.9.up".into(), lora)])
        .unwrap_err();
    assert!(matches!(error, PeftError::UnknownModule { .. }), "{error}");
    assert_eq!(model.report(), before);
}

#[derive(Module, Debug)]
struct Doubled {
    factor: Param<Tensor<1>>,
}

impl Reparameterization for Doubled {
    const NAME: &'static str = "doubled";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base.clone() + base
    }
}

/// Attaches [`Doubled`] to one weight.
struct Double;

impl Reparameterizer for Double {
    type Reparam = Doubled;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Doubled>) {
        let factor = Param::from_tensor(Tensor::<1>::ones([1], &param.lazy_device()));
        (
            param,
            (path == "first.weight").then_some(Doubled { factor }),
        )
    }
}

#[test]
fn foreign_reparameterizations_are_refused_never_folded() {
    let device = device();
    let net = Net::new(&device).apply_reparameterization(Double);
    let x = input(&device);
    let base = net.forward(x.clone());
    let mut model = PeftModel::new(net);
    let foreign = |error: PeftError| match error {
        PeftError::ForeignReparameterization { path, name } => {
            assert_eq!((path.as_str(), name.as_str()), ("first.weight", "doubled"));
        }
        other => panic!("{other}"),
    };
    foreign(
        model
            .add_adapter("a", &config(TargetConfig::list(["first"])))
            .unwrap_err(),
    );
    foreign(
        model
            .quantize_nf4(&TargetConfig::list(["first"]), &Nf4Config::new())
            .unwrap_err(),
    );
    assert_eq!(values(&model.forward_peft(x.clone())), values(&base));
    adapted(&mut model, "a", TargetConfig::list(["up"]));
    assert!(
        model.first.weight.reparameterization::<Doubled>().is_some(),
        "others may have adapters"
    );
    foreign(model.clone().unload().unwrap_err());
    foreign(model.clone().merge_and_unload().unwrap_err());
    model.disable_adapters();
    assert_eq!(values(&model.forward_peft(x)), values(&base));
}

#[test]
fn adapters_of_burns_own_apply_lora_run_factored() {
    let device = device();
    device.seed(5);
    let group = ParamGroup::from_paths(vec!["first.weight", "blocks.0.down.weight"]);
    let net = Net::new(&device).apply_lora(BurnLora::new(3, 7.0).set_param_group(group));
    // Burn's B is zero at first: move it.
    struct Move;
    impl burn::module::ModuleMapper for Move {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            match param.val().is_require_grad() {
                true => param.map(|b| {
                    let b = b.detach();
                    let noise = b.random_like(burn::tensor::Distribution::Normal(0.0, 0.3));
                    (b + noise).detach().require_grad()
                }),
                false => param,
            }
        }
    }
    let net = net.map(&mut Move);
    let x = input(&device);
    let adapter = net.first.weight.adapter().unwrap();
    assert!(values(&adapter.b.val()).iter().any(|b| *b != 0.0));
    let (slow, fast) = (net.forward(x.clone()), net.forward_peft(x));
    // f32 sums of 48 terms through four layers.
    assert!(max_diff(&slow, &fast) <= 1e-4);
    let (slow, fast) = (
        slow.powi_scalar(2).sum().backward(),
        fast.powi_scalar(2).sum().backward(),
    );
    for factor in [&adapter.a, &adapter.b] {
        let (slow, fast) = (
            factor.val().grad(&slow).unwrap(),
            factor.val().grad(&fast).unwrap(),
        );
        let size = values(&slow)
            .iter()
            .fold(1.0, |max: f32, value| max.max(value.abs()));
        assert!(max_diff(&slow, &fast) <= 1e-4 * size);
    }
}
