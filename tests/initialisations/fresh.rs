//! A fresh adapter changes nothing, trains, and is saved as a plain one.

use burn::module::Module;
use burn_peft::format::{LoadOptions, SaveOptions};
use burn_peft::layer::{LoraLinear, QLoraLinear};
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;

use super::*;

/// The change is a difference of two equal products of order 10 of sums in f32: what remains is their rounding, relative
/// to outputs of the same order.
const CLOSE: f32 = 1e-5;

/// Any module of linear layers that saving can name.
#[derive(Module, Debug)]
pub(super) struct Net {
    up: Linear,
    down: Linear,
}

impl Net {
    pub(super) fn new() -> Self {
        Self {
            up: linear(&random([20, 28])),
            down: linear(&random([28, 12])),
        }
    }

    pub(super) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.down.forward_peft(self.up.forward_peft(x).tanh())
    }
}

fn all_inits() -> impl Iterator<Item = LoraInit> {
    FOLDED.into_iter().chain([LoraInit::Orthogonal])
}

/// A gradient step on the factors, so that they are no longer the initial ones.
fn step(model: &mut PeftModel<Net>, name: &str, config: &PeftConfig, x: &Tensor<2>) {
    let gradients = model.module().forward(x.clone()).square().mean().backward();
    let mut factors = model.factors(name).unwrap();
    for (path, lora) in &mut factors {
        if let Some(initial) = &lora.initial {
            for factor in [&initial.a, &initial.b] {
                assert!(
                    !factor.is_require_grad() && factor.val().grad(&gradients).is_none(),
                    "{path}"
                );
            }
        }
        for factor in [&mut lora.a, &mut lora.b] {
            let gradient = factor.val().grad(&gradients).unwrap();
            assert!(norm(&gradient) > 0.0, "{path}");
            let moved = factor.val().inner() - gradient * 0.05;
            *factor = Param::from_tensor(Tensor::from_inner(moved));
        }
    }
    model.delete_adapter(name).unwrap();
    model.insert_adapter(name, config, factors).unwrap();
}

#[test]
fn a_fresh_adapter_leaves_every_base_as_it_was() {
    let x = random([5, 24]);
    for init in all_inits() {
        for (rslora, dora) in [(false, false), (true, false), (false, true)] {
            let config = config(init, 4).with_rslora(rslora).with_dora(dora);
            let dense = linear(&random([24, 40]));
            let layer = LoraLinear::from_linear(dense.clone(), &config).unwrap();
            assert_eq!(
                values(&layer.base.weight.val()),
                values(&dense.weight.val())
            );
            assert_eq!(layer.delta.initial.is_some(), init.folds());
            assert!(
                norm(&layer.delta.b.val()) > 0.1,
                "B of {init:?} is not zero"
            );
            let expected = dense.forward(x.clone());
            let found = error(&layer.forward(x.clone()), &expected);
            assert!(
                found < CLOSE,
                "{init:?}, rslora {rslora}, dora {dora}: {found}"
            );
            let (merged, _) = layer.merge();
            assert!(
                error(&merged.weight.val(), &dense.weight.val()) < CLOSE,
                "{init:?}"
            );

            let packed = QLoraLinear::from_linear(dense, &Nf4Config::new(), &config).unwrap();
            let found = error(&packed.forward(x.clone()), &packed.base.forward(x.clone()));
            assert!(
                found < CLOSE,
                "{init:?} on NF4, rslora {rslora}, dora {dora}: {found}"
            );
        }
    }
}

#[test]
fn a_trained_adapter_is_saved_as_a_plain_one_on_the_untouched_base() {
    let x = random([5, 20]);
    for init in all_inits() {
        for rslora in [false, true] {
            let base = Net::new();
            let targets = TargetConfig::list(["up", "down"])
                .with_rank_pattern("down", 2)
                .with_alpha_pattern("down", 3.0);
            let config = PeftConfig::new(config(init, 4).with_rslora(rslora), targets);
            let mut model = PeftModel::new(base.clone());
            model.add_adapter("default", &config).unwrap();
            let fresh = model.module().forward(x.clone());
            assert!(error(&fresh, &base.forward(x.clone())) < CLOSE, "{init:?}");
            step(&mut model, "default", &config, &x);
            let trained = model.module().forward(x.clone());
            assert!(
                error(&trained, &fresh) > 1e-3,
                "{init:?}: a step has to be seen"
            );

            let dir = tempfile::tempdir().unwrap();
            model
                .save_adapter("default", dir.path(), &SaveOptions::default())
                .unwrap();
            let mut reloaded = PeftModel::new(base);
            reloaded
                .load_adapter("default", dir.path(), &LoadOptions::default())
                .unwrap();
            // The same factors in the same order: only the layout of the sums may differ.
            assert!(
                error(&reloaded.module().forward(x.clone()), &trained) < CLOSE,
                "{init:?}"
            );
            let grown = if init.folds() { 2 } else { 1 };
            let loaded = reloaded.config("default").unwrap();
            assert_eq!(loaded.lora.rank, 4 * grown);
            assert_eq!(
                loaded.targets.rank_pattern.iter().next().unwrap(),
                ("down", &(2 * grown))
            );
            for (path, lora) in reloaded.factors("default").unwrap() {
                assert!(lora.initial.is_none(), "{path}");
            }
        }
    }
}

#[test]
fn the_initial_factors_are_no_parameters_that_train() {
    let mut model = PeftModel::new(Net::new());
    let config = PeftConfig::new(
        config(LoraInit::Pissa, 4),
        TargetConfig::list(["up", "down"]),
    );
    model.add_adapter("default", &config).unwrap();
    let one_side = 4 * (20 + 28 + 28 + 12);
    assert_eq!(model.report().trainable_params, one_side);
    // A record has both: without the constant ones the factors would mean something else.
    assert_eq!(model.adapters_only().num_params(), 2 * one_side);
}

#[test]
fn no_gradient_reaches_the_initial_factors_even_where_everything_is_unfrozen() {
    let config = config(LoraInit::Pissa, 4);
    let layer = LoraLinear::from_linear(linear(&random([20, 28])), &config).unwrap();
    let layer = layer.unfreeze();
    let gradients = layer.forward(random([3, 20])).square().sum().backward();
    let initial = layer.delta.initial.as_ref().unwrap();
    for (trained, constant) in [(&layer.delta.a, &initial.a), (&layer.delta.b, &initial.b)] {
        assert!(trained.val().grad(&gradients).is_some());
        assert!(constant.is_require_grad() && constant.val().grad(&gradients).is_none());
    }
}
