//! Training, by a plain loop and by Burn's `Learner`.

use std::marker::PhantomData;
use std::sync::Arc;

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::data::dataset::InMemDataset;
use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor};
use burn::train::metric::LossMetric;
use burn::train::{
    ClassificationOutput, InferenceStep, Learner, SupervisedTraining, TrainOutput, TrainStep,
};
use burn_peft::format::LoadOptions;
use burn_peft::model::{AdaptersOnly, PeftModel};

use crate::adapters::save_options;
use crate::bases::{base, packed};
use crate::golden::{Golden, Output};
use crate::network::Network;

const STEPS: usize = 12;
const LEARNING_RATE: f64 = 1e-2;

/// The inputs of the golden outputs, and a class for each row to learn.
#[derive(Clone, Debug)]
struct Batch<I> {
    input: I,
    labels: Tensor<1, Int>,
}

impl<I> Batch<I> {
    fn of<N: Network<Input = I>>(golden: &Golden, device: &Device) -> Self {
        Self {
            input: N::input(golden, device),
            labels: golden.integers("labels", device),
        }
    }
}

/// The cross entropy of a batch, with what it was computed from.
fn classify<N: Network>(model: &N, batch: Batch<N::Input>) -> ClassificationOutput {
    let output = model.logits(batch.input);
    let targets = batch.labels;
    let loss = CrossEntropyLossConfig::new().init(&output.device());
    let loss = loss.forward(output.clone(), targets.clone());
    ClassificationOutput {
        loss,
        output,
        targets,
    }
}

/// Every parameter of the base, to the bit.
fn bytes<N: Network>(model: &PeftModel<N>) -> Vec<u8> {
    let base = model.clone().unload().unwrap();
    base.into_record().into_bytes().unwrap().to_vec()
}

/// A model with a fresh adapter on a device that trains.
fn fresh<N: Network>(mut model: PeftModel<N>) -> PeftModel<N> {
    model.devices()[0].seed(7);
    model.add_adapter("default", &N::adapter()).unwrap();
    model
}

/// Trains; gives the first and the last loss too.
fn train<N: Network>(model: PeftModel<N>) -> (PeftModel<N>, [f32; 2]) {
    let device = model.devices()[0].clone();
    let batch = Batch::of::<N>(&Golden::of::<N>(), &device);
    let mut model = model.adapters_only();
    let mut optimizer = AdamWConfig::new().init();
    let mut losses = Vec::new();
    for _ in 0..STEPS {
        let loss = classify::<N>(model.module(), batch.clone()).loss;
        losses.push(loss.clone().into_scalar());
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(LEARNING_RATE, model, gradients);
    }
    (model.into_inner(), [losses[0], losses[STEPS - 1]])
}

/// The loss fell, the base is what it was; and what is saved gives a fresh model, and PEFT, the same outputs.
fn check<N: Network>(
    trained: PeftModel<N>,
    [first, last]: [f32; 2],
    base: &[u8],
    reloaded: PeftModel<N>,
    out: Output,
) {
    assert!(last < 0.8 * first, "the loss: {first} to {last}");
    assert!(bytes(&trained) == base, "the base has changed");
    let trained = trained.valid();
    let device = trained.devices()[0].clone();
    let input = N::input(&Golden::of::<N>(), &device);
    let logits = trained.logits(input.clone());
    out.write_logits(logits.clone());

    let dir = trained
        .save_adapter("default", out.path(), &save_options::<N>())
        .unwrap();
    let mut reloaded = reloaded;
    let options = LoadOptions {
        names: N::names(),
        ..Default::default()
    };
    reloaded.load_adapter("default", &dir, &options).unwrap();
    let again = reloaded.logits(input);
    assert_eq!(again.into_data(), logits.into_data());
}

pub fn by_a_plain_loop<N: Network>() {
    let device = Device::default().autodiff();
    let model = fresh(base::<N>(&device));
    let before = bytes(&model);
    let (model, losses) = train(model);
    let out = Output::new::<N>("trained");
    check(model, losses, &before, base(&Device::default()), out);
}

pub fn by_a_plain_loop_over_nf4<N: Network>() {
    let device = Device::default().autodiff();
    let model = fresh(packed::<N>(&device));
    let before = bytes(&model);
    let (model, losses) = train(model);
    let out = Output::new::<N>("trained_nf4");
    check(model, losses, &before, packed(&Device::default()), out);
}

/// What the `Learner` trains and checkpoints: its parameters are the adapter's.
#[derive(Module, Debug)]
struct Trainee<N: Module> {
    model: AdaptersOnly<N>,
}

impl<N: Network> TrainStep for Trainee<N> {
    type Input = Batch<N::Input>;
    type Output = ClassificationOutput;

    fn step(&self, batch: Self::Input) -> TrainOutput<ClassificationOutput> {
        let output = classify::<N>(self.model.module(), batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl<N: Network> InferenceStep for Trainee<N> {
    type Input = Batch<N::Input>;
    type Output = ClassificationOutput;

    fn step(&self, batch: Self::Input) -> ClassificationOutput {
        classify::<N>(self.model.module(), batch)
    }
}

/// The one batch, whatever the items are.
struct Only<N>(Golden, PhantomData<fn() -> N>);

impl<N: Network> Batcher<(), Batch<N::Input>> for Only<N> {
    fn batch(&self, _: Vec<()>, device: &Device) -> Batch<N::Input> {
        Batch::of::<N>(&self.0, device)
    }
}

/// It so many times.
fn loader<N: Network>(times: usize) -> Arc<dyn DataLoader<Batch<N::Input>>> {
    DataLoaderBuilder::new(Only::<N>(Golden::of::<N>(), PhantomData))
        .batch_size(1)
        .build(InMemDataset::new(vec![(); times]))
}

pub fn by_the_learner<N: Network>() {
    let device = Device::default().autodiff();
    let model = fresh(base::<N>(&device));
    let before = bytes(&model);
    let loss = |model: &PeftModel<N>| {
        let model = model.valid();
        let batch = Batch::of::<N>(&Golden::of::<N>(), &model.devices()[0]);
        classify::<N>(model.module(), batch).loss.into_scalar()
    };
    let first = loss(&model);
    let dir = tempfile::tempdir().unwrap();
    let learner = Learner::new(
        Trainee {
            model: model.adapters_only(),
        },
        AdamWConfig::new().init(),
        LEARNING_RATE,
    );
    let result = SupervisedTraining::new(dir.path(), loader::<N>(STEPS), loader::<N>(1))
        .metrics((LossMetric::new(),))
        .with_application_logger(None)
        .with_default_checkpointers()
        .num_epochs(1)
        .launch(learner);
    assert!(result.error.is_none() && result.interrupted.is_none());
    let model = result.model.model.into_inner();
    let losses = [first, loss(&model)];
    let out = Output::new::<N>("learned");
    check(model, losses, &before, base(&Device::default()), out);
}
