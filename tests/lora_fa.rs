//! LoRA-FA: `A` stays, and gradients of `B` are projected. Golden: `tests/golden/optim/lora_fa.py`.

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::adapter::{Lora, LoraConfig, LoraInit, Slices};
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig};
use burn_peft::optim::LoraFa;
use serde::Deserialize;

type Matrix = Vec<Vec<f32>>;

#[derive(Deserialize)]
struct Case {
    rank: usize,
    alpha: f64,
    rslora: bool,
    lr: f64,
    weight_decay: f32,
    eps: f32,
    weights: [Matrix; 2],
    a: [Matrix; 2],
    x: Matrix,
    target: Matrix,
    b: Vec<[Matrix; 2]>,
}

#[derive(Module, Debug)]
struct Net {
    first: Linear,
    second: Linear,
}

impl Net {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.second.forward_peft(self.first.forward_peft(x).tanh())
    }
}

fn device() -> Device {
    Device::default().autodiff()
}

fn tensor(matrix: &Matrix) -> Tensor<2> {
    let shape = [matrix.len(), matrix[0].len()];
    Tensor::from_data(TensorData::new(matrix.concat(), shape), &device())
}

fn random(dims: [usize; 2]) -> Tensor<2> {
    Tensor::random(dims, Distribution::Normal(0.0, 1.0), &device())
}

fn values(tensor: &Tensor<2>) -> Vec<f32> {
    tensor.to_data().try_into_vec().unwrap()
}

fn largest(tensor: &Tensor<2>) -> f32 {
    values(tensor)
        .iter()
        .fold(0.0, |max, value| max.max(value.abs()))
}

fn net() -> Net {
    Net {
        first: LinearConfig::new(6, 8).init(&device()),
        second: LinearConfig::new(8, 4).init(&device()),
    }
}

fn config(lora: LoraConfig) -> PeftConfig {
    PeftConfig::new(
        lora.with_freeze_a(true),
        TargetConfig::list(["first", "second"]),
    )
}

fn model(lora: LoraConfig) -> PeftModel<Net> {
    let mut model = PeftModel::new(net());
    model.add_adapter("fa", &config(lora)).unwrap();
    model
}

#[test]
fn steps_are_those_of_peft() {
    let cases = std::fs::read(crate::golden("optim/lora_fa.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_slice(&cases).unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let [first, second] = case.weights.each_ref().map(|weight| Linear {
            weight: Param::from_tensor(tensor(weight).transpose()),
            bias: None,
        });
        let lora = LoraConfig::new(case.rank)
            .with_alpha(case.alpha)
            .with_rslora(case.rslora)
            .with_freeze_a(true);
        let factors = case.a.iter().zip(["first", "second"]).zip([5, 4]);
        let factors = factors.map(|((a, path), d_out)| {
            let b = Tensor::zeros([case.rank, d_out], &device());
            let lora = lora.with_factors(tensor(a).transpose(), b).unwrap();
            (path.to_owned(), lora)
        });
        let mut model = PeftModel::new(Net { first, second });
        model
            .insert_adapter("fa", &config(lora.clone()), factors.collect())
            .unwrap();
        let projections = LoraFa::of(&model).unwrap();
        // PEFT's ε is not corrected for the bias: at the first step it stands for this one, and for others later.
        let epsilon = case.eps / (1.0 - 0.999_f32).sqrt();
        let steps = if case.eps > 1e-9 { 1 } else { case.b.len() };
        let mut optimizer = AdamWConfig::new()
            .with_beta_2(0.999)
            .with_epsilon(epsilon)
            .with_weight_decay(case.weight_decay)
            .init();
        let (x, target) = (tensor(&case.x), tensor(&case.target));
        // PEFT decays after the step, and Burn before it: what Burn's factor is then is decayed once less.
        let decay = 1.0 - case.lr * f64::from(case.weight_decay);
        for (step, expected) in case.b.iter().take(steps).enumerate() {
            let loss = (model.forward(x.clone()) - target.clone()).square().sum();
            let mut grads = GradientsParams::from_grads(loss.backward(), &model);
            projections.project(&mut grads);
            model = optimizer.step(case.lr, model, grads);
            for ((path, lora), expected) in model.factors("fa").unwrap().iter().zip(expected) {
                let found = lora.b.val().inner() * decay;
                let difference = largest(&(found - tensor(expected).transpose().inner()));
                let tolerance = match case.weight_decay > 0.0 {
                    // Factors of at most 0.06, sums of quotients that the rounding of sums of 12 terms reaches.
                    false => 1e-6,
                    // The factors that later gradients are of are others by `lr·decay`, 5e-4, of their 0.006; a step of 1e-3 in
                    // a normalised gradient. Not decayed once less, the last factor would be off by 3e-6.
                    true => 1e-7,
                };
                assert!(difference < tolerance, "{path}, step {step}: {difference}");
            }
        }
        for ((_, lora), a) in model.factors("fa").unwrap().iter().zip(&case.a) {
            assert_eq!(values(&lora.a.val()), values(&tensor(a).transpose()));
            assert!(largest(&lora.b.val()) > 0.9 * case.lr as f32, "B has moved");
        }
    }
}

/// `s·A·ĝ` is the gradient of the weight without what is orthogonal to `A`, slice by slice.
#[test]
fn the_step_is_the_nearest_to_that_of_the_weight() {
    for slices in [Slices::Whole, Slices::equal([true, false, true, true])] {
        let chosen = slices.chosen();
        let lora = LoraConfig::new(2)
            .with_alpha(5.0)
            .with_slices(slices.clone());
        let model = model(lora);
        let (x, target) = (random([9, 6]), random([9, 8]));
        // B is zero, so the layer's gradient is that of its weight alone.
        let y = model.first.forward_peft(x.clone());
        let dy = (y.clone() - target.clone()).inner() * 2.0;
        let full = x.inner().transpose().matmul(dy);
        let loss = (y - target).square().sum();
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        let (_, lora) = model.factors("fa").unwrap().remove(0);
        let plain = grads.get::<2>(lora.b.id).unwrap();
        LoraFa::of(&model).unwrap().project(&mut grads);
        let projected = grads.get::<2>(lora.b.id).unwrap();
        assert!(largest(&(projected.clone() - plain)) > 0.1);
        let a = lora.a.val().inner();
        let ranges: Vec<_> = match slices {
            Slices::Whole => std::iter::once(0..8).collect(),
            _ => vec![0..2, 4..6, 6..8],
        };
        let mut column = 0;
        for (slice, range) in ranges.into_iter().enumerate() {
            let a = a.clone().narrow(1, 2 * slice, 2);
            let step = projected.clone().narrow(1, column, range.len());
            column += range.len();
            let full = full.clone().narrow(1, range.start, range.len());
            let rest = full.clone() - a.clone().matmul(step) * lora.scale();
            // Rounding of f32, through a Gram matrix whose condition is below 100.
            let overlap = largest(&a.clone().transpose().matmul(rest.clone())) / largest(&full);
            assert!(overlap < 1e-4, "{overlap}");
            assert!(largest(&rest) < largest(&full) * 2.0 && largest(&rest) > 1e-2);
        }
        assert_eq!(column, projected.dims()[1]);
        assert_eq!(lora.a.val().dims()[1], 2 * chosen);
    }
}

#[test]
fn what_a_spans_twice_counts_once() {
    // Two columns that are one: the Gram matrix has no inverse.
    let column = random([6, 1]);
    let a = Tensor::cat(vec![column.clone(), column.clone()], 1);
    let config = config(LoraConfig::new(2).with_alpha(2.0));
    let lora = config
        .lora
        .with_factors(a.clone(), Tensor::zeros([2, 8], &device()))
        .unwrap();
    let mut model = PeftModel::new(net());
    let config = PeftConfig::new(config.lora, TargetConfig::list(["first"]));
    model
        .insert_adapter("fa", &config, vec![("first".into(), lora)])
        .unwrap();
    let x = random([9, 6]);
    let loss = model.first.forward_peft(x).square().sum();
    let mut grads = GradientsParams::from_grads(loss.backward(), &model);
    let (_, lora) = model.factors("fa").unwrap().remove(0);
    let plain = grads.get::<2>(lora.b.id).unwrap();
    LoraFa::of(&model).unwrap().project(&mut grads);
    // With `g = aᵀ·G` in both rows, half of `g / ‖a‖²` in each.
    let square = values(&column.inner().square().sum().unsqueeze())[0];
    let expected = plain / (2.0 * square);
    let found = grads.get::<2>(lora.b.id).unwrap();
    assert!(largest(&(found - expected.clone())) < 1e-4 * largest(&expected));
}

fn trained(lora: &Lora) -> [bool; 2] {
    [
        lora.a.val().is_require_grad(),
        lora.b.val().is_require_grad(),
    ]
}

#[test]
fn a_stays_frozen_through_the_life_of_a_model() {
    let inits = [LoraInit::Kaiming, LoraInit::Pissa];
    for init in inits {
        let mut model = model(LoraConfig::new(2).with_init(init));
        // B alone: [2, 8] and [2, 4].
        assert_eq!(model.report().trainable_params, 2 * 8 + 2 * 4, "{init:?}");
        assert_eq!(model.report().requires_grad("fa"), None, "in part");
        let check = |model: &PeftModel<Net>, expected| {
            for (path, lora) in model.factors("fa").unwrap() {
                assert_eq!(trained(&lora), expected, "{path}");
                assert!(lora.config().freeze_a);
            }
        };
        check(&model, [false, true]);
        let other = LoraConfig::new(3);
        let other = PeftConfig::new(other, TargetConfig::list(["first"]));
        model.add_adapter("other", &other).unwrap();
        check(&model, [false, true]);
        model.set_adapter("other").unwrap();
        check(&model, [false, false]);
        model.set_adapters(&[("fa", 0.5), ("other", 1.0)]).unwrap();
        check(&model, [false, true]);
        for (_, lora) in model.factors("other").unwrap() {
            assert_eq!(trained(&lora), [true, true]);
        }
        model.set_adapter("fa").unwrap();
        let model = model.valid().train();
        check(&model, [false, true]);
        // Converted, it trains what trained before.
        let (_, lora) = model.factors("fa").unwrap().remove(0);
        assert_eq!(trained(&lora.converted()), [false, true]);

        let grads = model.forward(random([3, 6])).sum().backward();
        for (_, lora) in model.factors("fa").unwrap() {
            assert!(lora.a.val().grad(&grads).is_none() && lora.b.val().grad(&grads).is_some());
        }
    }
}

#[test]
fn an_adapter_that_is_there_can_be_frozen_and_trained_again() {
    let mut model = model(LoraConfig::new(2).with_dora(true));
    for frozen in [false, true] {
        let before = model.factors("fa").unwrap();
        let factors = before
            .iter()
            .map(|(path, lora)| (path.clone(), lora.clone().with_frozen_a(frozen)));
        let lora = LoraConfig::new(2).with_dora(true).with_freeze_a(frozen);
        let config = PeftConfig::new(lora, TargetConfig::list(["first", "second"]));
        model
            .swap_adapter("fa", &config, factors.collect())
            .unwrap();
        assert_eq!(LoraFa::of(&model).is_ok(), frozen);
        for ((_, before), (_, now)) in before.iter().zip(model.factors("fa").unwrap()) {
            assert_eq!(trained(&now), [!frozen, true]);
            assert_eq!((now.a.id, now.b.id), (before.a.id, before.b.id));
            assert!(now.magnitude.is_some());
            assert_eq!(values(&now.a.val()), values(&before.a.val()));
        }
    }
}

#[test]
fn what_cannot_be_projected_is_an_error() {
    let mut plain = PeftModel::new(net());
    let config = PeftConfig::new(LoraConfig::new(2), TargetConfig::list(["first"]));
    plain.add_adapter("default", &config).unwrap();
    let error = LoraFa::of(&plain).unwrap_err();
    assert!(matches!(error, PeftError::Config { name, .. } if name == "freeze_a"));

    let error = LoraFa::of(&model(LoraConfig::new(2).with_alpha(0.0))).unwrap_err();
    assert!(error.to_string().contains("`first`: alpha = 0"), "{error}");

    // Adapters that train both factors are left alone.
    let mut both = model(LoraConfig::new(2));
    both.add_adapter("plain", &config).unwrap();
    both.set_adapter("plain").unwrap();
    let loss = both.first.forward_peft(random([3, 6])).square().sum();
    let mut grads = GradientsParams::from_grads(loss.backward(), &both);
    let (_, lora) = both.factors("plain").unwrap().remove(0);
    let before = grads.get::<2>(lora.b.id).unwrap();
    LoraFa::of(&both).unwrap().project(&mut grads);
    assert_eq!(values(&grads.get::<2>(lora.b.id).unwrap()), values(&before));
}
