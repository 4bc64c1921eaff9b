//! LoRA on slices of a fused linear, held to a linear of its own for each slice.

use std::ops::Range;

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Distribution, Tensor};
use burn_peft::PeftError;
use burn_peft::adapter::{Combination, Lora, LoraConfig, LoraInit, Slices};
use burn_peft::format::{LoadOptions, SaveOptions};
use burn_peft::layer::{LoraLinear, QLoraLinear};
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;

use super::{device, max_diff, values};

/// A multiple of NF4's block: the slices of a fused weight are then quantised as they would be alone.
const D_IN: usize = 64;
const RANK: usize = 3;
/// Queries, keys and values of different widths, of which keys have no change.
const QKV: [(usize, bool); 3] = [(24, true), (8, false), (8, true)];
const D_OUT: usize = 40;
/// Outputs of order 1 in f32; the sums are the same, the kernels' order is not.
const CLOSE: f32 = 1e-5;

fn random(dims: [usize; 2]) -> Tensor<2> {
    Tensor::random(dims, Distribution::Normal(0.0, 0.2), &device())
}

/// The same values outside of any graph.
fn constant(x: Tensor<2>) -> Tensor<2> {
    Tensor::from_inner(x.inner())
}

fn linear(weight: Tensor<2>, bias: Tensor<1>) -> Linear {
    Linear {
        weight: Param::from_tensor(weight).no_grad(),
        bias: Some(Param::from_tensor(bias).no_grad()),
    }
}

fn fused() -> Linear {
    LinearConfig::new(D_IN, D_OUT).init(&device()).no_grad()
}

fn config() -> LoraConfig {
    LoraConfig::new(RANK)
        .with_alpha(7.0)
        .with_slices(Slices::widths(QKV))
}

/// Factors that are not zero.
fn lora(config: &LoraConfig) -> Lora {
    let (a, b) = (random([D_IN, 2 * RANK]), random([RANK, 32]));
    config.with_factors(a, b).unwrap()
}

/// The slice's outputs, and where its factors lie in `A` and `B`.
fn chosen() -> [(Range<usize>, usize, usize); 2] {
    [(0..24, 0, 0), (32..40, RANK, 24)]
}

fn part(x: &Tensor<2>, range: &Range<usize>) -> Tensor<2> {
    x.clone().narrow(1, range.start, range.len())
}

/// Outputs and gradients of a fused layer against those of a layer for each slice.
fn check<F, S>(fused: impl Fn(Linear, Lora) -> F, single: impl Fn(Linear, Lora) -> S, rslora: bool)
where
    F: Fn(Tensor<2>) -> Tensor<2>,
    S: Fn(Tensor<2>) -> Tensor<2>,
{
    let base = self::fused();
    let config = config().with_rslora(rslora);
    let delta = lora(&config);
    let (weight, bias) = (base.weight.val(), base.bias.as_ref().unwrap().val());
    let (a, b) = (delta.a.val(), delta.b.val());
    let (x, loss) = (random([20, D_IN]).require_grad(), random([20, D_OUT]));
    let y = fused(base.clone(), delta.clone())(x.clone());
    let grads = (y.clone() * loss.clone()).sum().backward();

    let mut dx = Tensor::zeros([20, D_IN], &device()).inner();
    for (range, row, column) in chosen() {
        let alone = config.clone().with_slices(Slices::Whole);
        let alone = alone
            .with_factors(
                constant(a.clone().narrow(1, row, RANK)),
                constant(b.clone().narrow(1, column, range.len())),
            )
            .unwrap();
        let base = linear(
            part(&weight, &range),
            bias.clone().narrow(0, range.start, range.len()),
        );
        let own = constant(x.clone()).require_grad();
        let expected = single(base, alone.clone())(own.clone());
        assert!(max_diff(&part(&y, &range), &expected) < CLOSE, "{range:?}");
        let expected = (expected * part(&loss, &range)).sum().backward();
        for (found, expected) in [
            (
                a.grad(&grads).unwrap().narrow(1, row, RANK),
                alone.a.val().grad(&expected),
            ),
            (
                b.grad(&grads).unwrap().narrow(1, column, range.len()),
                alone.b.val().grad(&expected),
            ),
        ] {
            let expected = expected.unwrap();
            assert!(max_diff(&found, &expected) < 10.0 * CLOSE, "{range:?}");
            assert!(values(&expected).iter().any(|value| value.abs() > 0.1));
        }
        dx = dx + own.grad(&expected).unwrap();
    }
    // What x gets of the slice without a change.
    let own = constant(x.clone()).require_grad();
    let keys = linear(part(&weight, &(24..32)), bias.narrow(0, 24, 8));
    let none = LoraConfig::new(1)
        .with_factors(random([D_IN, 1]), random([1, 8]).zeros_like())
        .unwrap();
    let keys = single(keys, none)(own.clone());
    let expected = (keys * part(&loss, &(24..32))).sum().backward();
    dx = dx + own.grad(&expected).unwrap();
    assert!(max_diff(&x.grad(&grads).unwrap(), &dx) < CLOSE);

    // The slice without a change is the base's to the bit.
    let none = config.with_factors(constant(a), constant(b).zeros_like());
    let untouched = fused(base, none.unwrap())(x);
    assert_eq!(
        values(&part(&y, &(24..32))),
        values(&part(&untouched, &(24..32)))
    );
    assert!(max_diff(&y, &untouched) > 0.1);
}

#[test]
fn a_slice_computes_and_learns_as_a_linear_of_its_own() {
    for rslora in [false, true] {
        let dense = |base: Linear, delta| {
            let layer = LoraLinear {
                base: base.no_grad(),
                delta,
            };
            move |x| layer.forward(x)
        };
        check(dense, dense, rslora);
        let packed = |base: Linear, delta| {
            let mut layer =
                QLoraLinear::from_linear(base, &Nf4Config::new(), &LoraConfig::new(1)).unwrap();
            layer.delta = delta;
            move |x| layer.forward(x)
        };
        check(packed, packed, rslora);
    }
}

#[derive(Module, Debug)]
struct Attention {
    qkv: Linear,
    out: Linear,
}

impl Attention {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.run(x, |linear, x| linear.forward(x))
    }

    fn forward_peft(&self, x: Tensor<2>) -> Tensor<2> {
        self.run(x, |linear, x| linear.forward_peft(x))
    }

    fn run(&self, x: Tensor<2>, linear: impl Fn(&Linear, Tensor<2>) -> Tensor<2>) -> Tensor<2> {
        linear(&self.out, linear(&self.qkv, x).tanh())
    }
}

fn attention() -> Attention {
    Attention {
        qkv: fused(),
        out: LinearConfig::new(D_OUT, 8).init(&device()),
    }
}

fn targets() -> TargetConfig {
    TargetConfig::list(["qkv"])
}

/// A trained adapter of this configuration under a name, on a model that is packed or not.
fn trained(model: &mut PeftModel<Attention>, name: &str, lora: LoraConfig) {
    let config = PeftConfig::new(lora, targets());
    model.add_adapter(name, &config).unwrap();
    let mut factors = model.factors(name).unwrap();
    for (_, lora) in &mut factors {
        let b = lora.b.val().inner();
        let b = b.clone() + b.random_like(Distribution::Normal(0.0, 0.2));
        lora.b = Param::from_tensor(Tensor::from_inner(b));
        if let Some(magnitude) = &mut lora.magnitude {
            let value = magnitude.val().inner();
            let gain = value.random_like(Distribution::Uniform(0.8, 1.2));
            *magnitude = Param::from_tensor(Tensor::from_inner(value * gain));
        }
    }
    model.swap_adapter(name, &config, factors).unwrap();
}

fn model(packed: bool) -> PeftModel<Attention> {
    let mut model = PeftModel::new(attention());
    if packed {
        model.quantize_nf4(&targets(), &Nf4Config::new()).unwrap();
    }
    model
}

#[test]
fn a_fresh_adapter_has_factors_for_chosen_slices_only_and_changes_nothing() {
    for packed in [false, true] {
        let mut model = model(packed);
        let x = random([20, D_IN]);
        let base = model.forward_peft(x.clone());
        let lora = PeftConfig::new(config(), targets());
        model.add_adapter("fresh", &lora).unwrap();
        let (_, lora) = model.factors("fresh").unwrap().remove(0);
        assert_eq!(lora.a.val().dims(), [D_IN, 2 * RANK]);
        assert_eq!(lora.b.val().dims(), [RANK, 32]);
        assert_eq!((lora.rank(), lora.dims()), (RANK, [D_IN, D_OUT]));
        assert_eq!(lora.scale(), 7.0 / RANK as f64);
        assert_eq!(lora.config(), config());
        assert_eq!(model.report().trainable_params, D_IN * 2 * RANK + RANK * 32);
        assert_eq!(values(&model.forward_peft(x)), values(&base));
    }
}

#[test]
fn every_way_and_a_saved_file_give_the_same_outputs() {
    let x = random([20, D_IN]);
    for packed in [false, true] {
        for (rslora, dora) in [(false, false), (true, false), (false, true)] {
            let case = format!("packed {packed}, rslora {rslora}, dora {dora}");
            let mut model = model(packed);
            let bare = model.clone();
            let lora = config().with_rslora(rslora).with_dora(dora);
            trained(&mut model, "default", lora);
            let y = model.forward_peft(x.clone());
            assert!(max_diff(&y, &bare.forward_peft(x.clone())) > 0.01, "{case}");
            assert!(max_diff(&model.forward(x.clone()), &y) < CLOSE, "{case}");
            let (merged, _) = model.merged().unwrap();
            assert!(max_diff(&merged.forward(x.clone()), &y) < CLOSE, "{case}");

            let dir = tempfile::tempdir().unwrap();
            let saved = model
                .save_adapter("default", dir.path(), &SaveOptions::default())
                .unwrap();
            let mut loaded = bare;
            loaded
                .load_adapter("default", &saved, &LoadOptions::default())
                .unwrap();
            assert!(
                max_diff(&loaded.forward_peft(x.clone()), &y) < CLOSE,
                "{case}"
            );
            // A plain adapter of twice the rank and the same scale.
            let plain = &loaded.config("default").unwrap().lora;
            assert_eq!(
                (plain.rank, &plain.slices),
                (2 * RANK, &Slices::Whole),
                "{case}"
            );
            let grown = if rslora { 2f64.sqrt() } else { 2.0 };
            assert!((plain.alpha - 7.0 * grown).abs() < 1e-12, "{case}");
            assert!(
                loaded
                    .config("default")
                    .unwrap()
                    .targets
                    .rank_pattern
                    .is_empty(),
                "{case}"
            );
        }
    }
}

#[test]
fn several_sliced_ones_are_summed_and_combined() {
    let x = random([20, D_IN]);
    let mut model = model(true);
    trained(&mut model, "qv", config());
    let halves = LoraConfig::new(2).with_slices(Slices::equal([false, true]));
    trained(&mut model, "half", halves);
    let adapters = [("qv", 0.5), ("half", -2.0)];
    let sum = model.with_adapters(&adapters).unwrap();
    let base = model.disabled().qkv.forward_peft(x.clone());
    let alone = |name: &str| {
        let one = model.with_adapters(&[(name, 1.0)]).unwrap();
        one.qkv.forward_peft(x.clone()) - base.clone()
    };
    let expected = base.clone() + alone("qv") * 0.5 - alone("half") * 2.0;
    let found = sum.qkv.forward_peft(x.clone());
    assert!(max_diff(&found, &expected) < CLOSE);
    model
        .add_weighted_adapter("cat", &adapters, Combination::Cat)
        .unwrap();
    model.set_adapter("cat").unwrap();
    assert!(max_diff(&model.qkv.forward_peft(x.clone()), &found) < CLOSE);
    let (_, cat) = model.factors("cat").unwrap().remove(0);
    assert_eq!(cat.rank(), 2 * RANK + 2);
}

#[test]
fn dropout_is_on_the_input_of_every_slice() {
    let layer = LoraLinear {
        base: fused(),
        delta: lora(&config().with_dropout(0.5)),
    };
    let x = random([20, D_IN]);
    let dropped = layer.forward(x.clone());
    let y = layer.valid().forward(x.inner());
    assert!(max_diff(&dropped.clone().inner(), &y) > 0.01);
    let keys = |y: &Tensor<2>| values(&part(y, &(24..32)));
    assert_eq!(keys(&dropped.inner()), keys(&y));
}

#[test]
fn slices_that_do_not_fit_are_an_error_that_names_them() {
    let mut model = model(false);
    let x = random([20, D_IN]);
    let before = values(&model.forward_peft(x.clone()));
    for slices in [
        Slices::equal([true, false, true]),
        Slices::widths([(24, true), (8, false)]),
        Slices::equal([false, false]),
        Slices::equal([]),
        Slices::widths([(40, true), (0, true)]),
    ] {
        let lora = LoraConfig::new(2).with_slices(slices);
        let error = model
            .add_adapter("new", &PeftConfig::new(lora, targets()))
            .unwrap_err();
        assert!(
            matches!(&error, PeftError::Config { name, .. } if name == "slices"),
            "{error}"
        );
    }
    assert_eq!(model.adapters().count(), 0);
    assert_eq!(values(&model.forward_peft(x)), before);

    let shape =
        |a: [usize; 2], b: [usize; 2]| config().with_factors(random(a), random(b)).unwrap_err();
    for (a, b, name) in [
        ([D_IN, RANK], [RANK, 32], "A"),
        ([D_IN, 2 * RANK], [RANK, D_OUT], "B"),
        ([D_IN, 2 * RANK], [2 * RANK, 32], "B"),
    ] {
        let error = shape(a, b);
        assert!(
            matches!(&error, PeftError::Shape { tensor, .. } if tensor == name),
            "{error}"
        );
    }
    // Of another map.
    let thin = LoraConfig::new(2).with_slices(Slices::widths([(4, true), (4, false)]));
    let thin = thin
        .with_factors(random([D_IN, 2]), random([2, 4]))
        .unwrap();
    let error = model
        .insert_adapter(
            "new",
            &PeftConfig::new(thin.config(), targets()),
            vec![("qkv".into(), thin)],
        )
        .unwrap_err();
    assert!(matches!(error, PeftError::Shape { found, .. } if found == [D_IN, 8]));
}

#[test]
fn a_configuration_with_slices_is_read_back() {
    for slices in [
        Slices::Whole,
        Slices::equal([true, false]),
        Slices::widths(QKV),
    ] {
        let config = LoraConfig::new(2)
            .with_slices(slices)
            .with_init(LoraInit::Gaussian);
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<LoraConfig>(&text).unwrap(), config);
    }
}
