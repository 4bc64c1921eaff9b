//! Running statistics: state that is no parameter.

use burn::module::Module;
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Distribution, Tensor};
use burn_peft::PeftError;
use burn_peft::adapter::LoraConfig;
use burn_peft::format::WriteOptions;
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig};
use burn_peft::resume::{Checkpoint, Seed};

use super::{device, params, values};

#[derive(Module, Debug)]
struct Normed {
    first: Linear,
    bn: BatchNorm,
    last: Linear,
}

impl Normed {
    fn new(device: &Device) -> Self {
        Self {
            first: LinearConfig::new(6, 8).init(device),
            bn: BatchNormConfig::new(8).init(device),
            last: LinearConfig::new(8, 3).init(device),
        }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let h = self.bn.forward(self.first.forward_peft(x));
        self.last.forward_peft(h)
    }
}

fn config() -> PeftConfig {
    PeftConfig::new(LoraConfig::new(2), TargetConfig::list(["first", "last"]))
}

fn input(device: &Device) -> Tensor<2> {
    Tensor::random([16, 6], Distribution::Normal(1.0, 2.0), device)
}

fn step(
    model: PeftModel<Normed>,
    optimizer: &mut ModuleOptimizer,
    x: &Tensor<2>,
) -> PeftModel<Normed> {
    let loss = model.forward(x.clone()).square().mean();
    let grads = GradientsParams::from_grads(loss.backward(), &model);
    optimizer.step(0.05, model, grads)
}

/// What validation computes with: `valid` reads the statistics as training left them.
fn answers(model: &PeftModel<Normed>, x: &Tensor<2>) -> Vec<f32> {
    values(&model.valid().forward(x.clone().inner()))
}

/// A module of the same values that shares nothing with the first.
fn copy(model: &Normed, device: &Device) -> Normed {
    Normed::new(device).load_record(model.clone().into_record())
}

#[test]
fn a_resumed_run_has_the_running_statistics_of_the_one_that_stopped() {
    let device = device();
    device.seed(5);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let net = Normed::new(&device);
    let other = copy(&net, &device);
    let batches: Vec<_> = (0..6).map(|_| input(&device)).collect();
    let x = input(&device);

    let mut model = PeftModel::new(net);
    model.add_adapter("default", &config()).unwrap();
    let mut resumed = PeftModel::new(other);
    resumed.add_adapter("default", &config()).unwrap();
    let mut optimizer = AdamWConfig::new().init();
    for batch in &batches[..3] {
        model = step(model, &mut optimizer, batch);
    }
    let checkpoint = Checkpoint {
        seed: Seed(1),
        step: 3,
    };
    checkpoint
        .save(&path, &model, &optimizer, &WriteOptions::default())
        .unwrap();
    let mut other = AdamWConfig::new().init();
    let before = answers(&resumed, &x);
    let loaded = Checkpoint::load(&path, &mut resumed, &mut other).unwrap();
    assert_eq!(loaded, checkpoint);
    assert_ne!(answers(&resumed, &x), before);
    assert_eq!(answers(&resumed, &x), answers(&model, &x));
    for batch in &batches[3..] {
        model = step(model, &mut optimizer, batch);
        resumed = step(resumed, &mut other, batch);
    }
    assert_eq!(answers(&resumed, &x), answers(&model, &x));
}

#[test]
fn a_reference_and_a_merged_module_keep_their_statistics_while_the_model_trains() {
    let device = device();
    let x = input(&device);
    let mut model = PeftModel::new(Normed::new(&device));
    model.add_adapter("default", &config()).unwrap();
    let mut optimizer = AdamWConfig::new().init();
    model = step(model, &mut optimizer, &input(&device));
    let now = answers(&model, &x);
    let reference = model.reference();
    let (merged, _) = model.merged().unwrap();
    let of_merged = || values(&merged.valid().forward(x.clone().inner()));
    let plain = of_merged();
    for (one, other) in plain.iter().zip(&now) {
        assert!((one - other).abs() < 1e-5);
    }
    let shared = params(&reference).into_iter().zip(params(&model));
    for ((path, id, _), (other_path, other, _)) in shared {
        assert_eq!((path, id), (other_path, other), "ids are kept");
    }
    for _ in 0..3 {
        model = step(model, &mut optimizer, &input(&device));
    }
    assert_ne!(answers(&model, &x), now);
    assert_eq!(answers(&reference, &x), now);
    assert_eq!(of_merged(), plain);
}

#[test]
fn statistics_are_no_parameters_and_their_module_is_not_saved_with_an_adapter() {
    let device = device();
    let mut model = PeftModel::new(Normed::new(&device));
    let before = model.report();
    assert_eq!(before.total_params, 6 * 8 + 8 + 2 * 8 + 8 * 3 + 3);
    let error = model.add_adapter("default", &config().with_modules_to_save(["bn"]));
    let error = error.unwrap_err();
    assert!(matches!(error, PeftError::Config { .. }), "{error}");
    let text = error.to_string();
    for part in ["modules_to_save", "`bn`", "running statistics"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(model.adapters().count(), 0);
    assert_eq!(model.report(), before);
}
