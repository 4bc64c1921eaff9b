//! Training with Burn's `Learner`: the loss falls, the base stays, checkpoints hold the adapter only and resume.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Batch, Net, Trainee, load_with_adapter, loader, samples};
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::module::Module;
use burn::optim::AdamWConfig;
use burn::store::ModuleRecord;
use burn::tensor::Device;
use burn::train::metric::LossMetric;
use burn::train::{Learner, SupervisedTraining};
use burn_peft::model::PeftModel;

const TRAIN: usize = 512;
const EPOCHS: usize = 6;

/// Trains up to `epochs` of [`EPOCHS`], after those of the checkpoint `resume` in `dir`.
fn train(
    model: PeftModel<Net>,
    dir: &Path,
    epochs: usize,
    resume: Option<usize>,
) -> PeftModel<Net> {
    let steps = EPOCHS * TRAIN / 32;
    let learner = Learner::new(
        Trainee {
            model: model.adapters_only(),
        },
        AdamWConfig::new().init(),
        CosineAnnealingLrSchedulerConfig::new(1e-2, steps)
            .init()
            .unwrap(),
    );
    let training = SupervisedTraining::new(dir, loader(samples(0..TRAIN)), loader(validation()))
        .metrics((LossMetric::new(),))
        .with_application_logger(None)
        .with_default_checkpointers()
        .num_epochs(epochs);
    let training = match resume {
        Some(epoch) => training.checkpoint(epoch),
        None => training,
    };
    let result = training.launch(learner);
    assert!(result.error.is_none() && result.interrupted.is_none());
    result.model.model.into_inner()
}

fn validation() -> Vec<super::Sample> {
    samples(TRAIN..TRAIN + 128)
}

fn loss(model: &PeftModel<Net>) -> f32 {
    let model = model.valid();
    let batch = Batch::new(&validation(), &model.devices()[0]);
    model.regress(batch).loss.into_scalar()
}

/// Every parameter of the base with its id: dense weights, packed ones, biases, norms.
fn base(model: &PeftModel<Net>) -> Vec<u8> {
    let base = model.clone().unload().unwrap();
    base.into_record().into_bytes().unwrap().to_vec()
}

/// The adapter's factors, to the bit.
fn factors(model: &PeftModel<Net>) -> Vec<(String, Vec<f32>)> {
    let factors = model.factors("default").unwrap().into_iter();
    let values = |param: &burn::module::Param<burn::tensor::Tensor<2>>| {
        param.val().try_into_vec_as::<f32>().unwrap()
    };
    factors
        .map(|(path, lora)| (path, [values(&lora.a), values(&lora.b)].concat()))
        .collect()
}

struct Base {
    dir: tempfile::TempDir,
    path: PathBuf,
    device: Device,
}

/// A base model in a file, as if pretrained.
fn pretrained() -> Base {
    let device = Device::default().autodiff();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base.bpk");
    Net::new(&device).save_file(&path).unwrap();
    Base { dir, path, device }
}

#[test]
fn trains_the_adapter_and_checkpoints_nothing_else() {
    let Base { dir, path, device } = pretrained();
    let model = load_with_adapter(&path, &device).unwrap();
    let (start, base_bytes) = (loss(&model), base(&model));

    let trained = train(model.clone(), dir.path(), EPOCHS, None);
    let end = loss(&trained);
    // About a twentieth; the weights of the base differ from run to run.
    assert!(end < 0.2 * start, "the loss falls: {start} to {end}");
    assert_eq!(base(&trained), base_bytes, "the base is what it was");
    assert_eq!(trained.report().composed().count(), 0, "all factored");
    assert!(
        factors(&trained)
            .iter()
            .zip(factors(&model))
            .all(|(trained, fresh)| *trained != fresh)
    );

    let checkpoints = dir.path().join("checkpoint");
    let checkpoint = checkpoints.join(format!("model-{EPOCHS}.bpk"));
    let bytes = fs::read(&checkpoint).unwrap();
    let record = ModuleRecord::load(&checkpoint).unwrap();
    // All entries of the record, by name: two for each linear layer but the head.
    let layers = ["embed", "hidden.0", "hidden.1"];
    assert_eq!(record.len(), 2 * layers.len());
    for layer in layers {
        for factor in ["a", "b"] {
            let name = format!("model.{layer}.weight.peft.default.{factor}");
            assert!(
                bytes
                    .windows(name.len())
                    .any(|window| window == name.as_bytes()),
                "{name}"
            );
        }
    }
    // Values in f32; the format aligns tensors to 256 bytes and adds names, shapes and ids.
    let values: usize = factors(&trained)
        .iter()
        .map(|(_, values)| values.len())
        .sum();
    assert_eq!(values, 4 * (4 + 256) + 2 * 4 * (256 + 256));
    assert!(
        (4 * values..4 * values + 8 * 1024).contains(&bytes.len()),
        "{} bytes",
        bytes.len()
    );
    // The optimiser's state is two moments of the factors.
    let optimizer = fs::metadata(checkpoints.join(format!("optim-{EPOCHS}.bpk")))
        .unwrap()
        .len() as usize;
    assert!(
        (8 * values..8 * values + 16 * 1024).contains(&optimizer),
        "{optimizer} bytes"
    );
    assert!(
        bytes.len() + optimizer < base_bytes.len(),
        "{} bytes of base, packed",
        base_bytes.len()
    );
}

#[test]
fn an_interrupted_training_resumes_from_its_checkpoint() {
    let Base { dir, path, device } = pretrained();
    let model = load_with_adapter(&path, &device).unwrap();
    let uninterrupted = train(model.clone(), &dir.path().join("a"), 4, None);
    let interrupted = train(model, &dir.path().join("b"), 2, None);
    assert_ne!(factors(&interrupted), factors(&uninterrupted));

    // As a new process does: from the base and a fresh, different adapter.
    let fresh = load_with_adapter(&path, &device).unwrap();
    let resumed = train(fresh, &dir.path().join("b"), 4, Some(2));
    // Adapter, moments of the optimiser and learning rate were all restored: equal to the bit.
    assert_eq!(factors(&resumed), factors(&uninterrupted));
    assert_eq!(loss(&resumed), loss(&uninterrupted));
}
