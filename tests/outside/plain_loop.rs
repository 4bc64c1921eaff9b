//! A plain training loop: the adapter to PEFT's directory and back, and a pause with the optimiser's state.

use std::path::{Path, PathBuf};

use super::{Batch, Net, load_quantized, load_with_adapter, samples};
use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::store::ModuleRecord;
use burn::tensor::Device;
use burn_peft::format::{LoadOptions, SaveOptions};
use burn_peft::model::{AdaptersOnly, PeftModel};

/// Trains for `count` steps; gives the losses too.
fn train(
    mut model: AdaptersOnly<Net>,
    optimizer: &mut ModuleOptimizer,
    batch: &Batch,
    count: usize,
) -> (AdaptersOnly<Net>, Vec<f32>) {
    let mut losses = Vec::with_capacity(count);
    for _ in 0..count {
        let loss = model.regress(batch.clone()).loss;
        losses.push(loss.clone().into_scalar());
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-2, model, gradients);
    }
    (model, losses)
}

fn outputs(model: &PeftModel<Net>, batch: &Batch) -> Vec<f32> {
    model.forward(batch.x.clone()).try_into_vec_as().unwrap()
}

/// A base model in a file, as if pretrained.
fn pretrained(dir: &Path, device: &Device) -> PathBuf {
    let path = dir.join("base.bpk");
    Net::new(device).save_file(&path).unwrap();
    path
}

#[test]
fn a_trained_adapter_reloads_from_pefts_directory_to_the_bit() {
    let device = Device::default().autodiff();
    let dir = tempfile::tempdir().unwrap();
    let base = pretrained(dir.path(), &device);
    let batch = Batch::new(&samples(0..64), &device);

    let model = load_with_adapter(&base, &device).unwrap().adapters_only();
    let mut optimizer = AdamWConfig::new().init();
    let (model, losses) = train(model, &mut optimizer, &batch, 30);
    // About a tenth; the weights of the base differ from run to run.
    assert!(losses[29] < 0.3 * losses[0], "the loss falls: {losses:?}");
    let adapter = dir.path().join("adapter");
    model
        .save_adapter("default", &adapter, &SaveOptions::default())
        .unwrap();

    let mut reloaded = load_quantized(&base, &device).unwrap();
    let plain = outputs(&reloaded, &batch);
    let report = reloaded
        .load_adapter("default", &adapter, &LoadOptions::default())
        .unwrap();
    assert_eq!(report.loaded.len(), 2 * 3);
    let expected = outputs(&model, &batch);
    assert_ne!(plain, expected);
    assert_eq!(outputs(&reloaded, &batch), expected);
}

#[test]
fn training_goes_on_from_records_of_adapter_and_optimizer() {
    let device = Device::default().autodiff();
    let dir = tempfile::tempdir().unwrap();
    let base = pretrained(dir.path(), &device);
    let batch = Batch::new(&samples(0..64), &device);
    let [model_file, optimizer_file] =
        ["model.bpk", "optimizer.bpk"].map(|name| dir.path().join(name));

    let model = load_with_adapter(&base, &device).unwrap().adapters_only();
    let mut optimizer = AdamWConfig::new().init();
    let (model, _) = train(model, &mut optimizer, &batch, 5);
    model.clone().save_file(&model_file).unwrap();
    optimizer.save(&optimizer_file).unwrap();
    let (model, losses) = train(model, &mut optimizer, &batch, 5);

    let record = ModuleRecord::load(&model_file).unwrap();
    assert_eq!(record.len(), 2 * 3, "the factors only");
    let resumed = load_with_adapter(&base, &device).unwrap().adapters_only();
    let resumed = resumed.try_load_record(record).unwrap();
    // Without the optimiser's state the next steps differ; with it they are the same to the bit.
    let (_, forgetful) = train(resumed.clone(), &mut AdamWConfig::new().init(), &batch, 5);
    assert_ne!(forgetful, losses);
    let mut optimizer = AdamWConfig::new().init().load(&optimizer_file).unwrap();
    let (resumed, again) = train(resumed, &mut optimizer, &batch, 5);
    assert_eq!(again, losses);
    assert_eq!(outputs(&resumed, &batch), outputs(&model, &batch));
}
