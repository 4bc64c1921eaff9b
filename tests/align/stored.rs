//! Log-probabilities of a reference in a file: written, read, and refused where they are of something else.

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::tensor::{Device, Tensor};
use burn_peft::PeftError;
use burn_peft::adapter::LoraConfig;
use burn_peft::dataset::{Example, PaddedBatcher};
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig};
use burn_peft::objective::{Labels, LogProbs, LogProbsConfig, StoredLogProbs, head_log_probs};

#[derive(Module, Debug)]
struct Model {
    embed: Embedding,
    proj: Linear,
    lm_head: Linear,
}

impl Model {
    fn log_probs(&self, examples: &[Example]) -> burn_peft::Result<LogProbs> {
        let device = self.devices()[0].clone();
        let batch = PaddedBatcher::new(0).collate(examples).to_device(&device);
        let hidden = self
            .proj
            .forward_peft(self.embed.forward_peft(batch.tokens));
        let labels = Labels::from_mask(batch.targets, batch.mask)?;
        head_log_probs(hidden, &self.lm_head, &labels, &LogProbsConfig::new())
    }
}

fn model() -> PeftModel<Model> {
    let device = Device::default().autodiff();
    let mut model = PeftModel::new(Model {
        embed: EmbeddingConfig::new(20, 8).init(&device),
        proj: LinearConfig::new(8, 8).init(&device),
        lm_head: LinearConfig::new(8, 20).init(&device),
    });
    let config = PeftConfig::new(LoraConfig::new(2), TargetConfig::list(["proj"]));
    model.add_adapter("default", &config).unwrap();
    model
}

fn examples() -> Vec<Example> {
    let example = |i: u32| {
        let len = 4 + i % 3;
        let tokens = (0..len).map(|t| (i * 7 + t * 3) % 20).collect();
        let supervised = (0..len).map(|t| t > i % 2).collect();
        Example::new(tokens, supervised).unwrap()
    };
    (0..7).map(example).collect()
}

fn stored(model: &PeftModel<Model>, examples: &[Example]) -> StoredLogProbs {
    StoredLogProbs::compute(model, examples, 3, |part| model.log_probs(part)).unwrap()
}

/// Moves every parameter that trains.
struct Move;

impl ModuleMapper for Move {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.is_require_grad() {
            return param;
        }
        let value = param.val().detach() + 0.01;
        Param::initialized(param.id, value.detach().require_grad())
    }
}

#[test]
fn what_is_stored_is_read_and_is_what_a_forward_pass_gives() {
    let (model, examples) = (model().reference(), examples());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("reference.safetensors");
    let stored = stored(&model, &examples);
    stored.save(&path, false).unwrap();
    let read = StoredLogProbs::load(&path, &model, &examples).unwrap();
    assert_eq!(read, stored);

    let places = [5, 0, 5, 2];
    let some: Vec<Example> = places.map(|place| examples[place].clone()).into();
    let found = read.get(&places, &Device::default()).unwrap();
    let expected = model.log_probs(&some).unwrap();
    assert_eq!(found.lens(), expected.lens());
    let [found, expected] = [found, expected].map(|own| own.to_ragged().unwrap());
    for (found, expected) in found.values().iter().zip(expected.values()) {
        // The batches were others, so sums may be rounded otherwise.
        assert!((found - expected).abs() < 1e-5, "{found}, not {expected}");
    }
    let error = read
        .get(&[1, 7], &Device::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains('7'), "{error}");
}

#[test]
fn what_is_of_another_model_or_other_data_is_refused() {
    let (model, examples) = (model(), examples());
    let reference = model.reference();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("reference.safetensors");
    stored(&reference, &examples).save(&path, false).unwrap();
    let refused = |model: &PeftModel<Model>, examples: &[Example]| {
        let error = StoredLogProbs::load(&path, model, examples).unwrap_err();
        assert!(
            matches!(&error, PeftError::Stale { path: at, .. } if *at == path),
            "{error}"
        );
        assert!(error.to_string().contains("StoredLogProbs::compute"));
    };
    // A step of training, adapters off, and the base moved.
    refused(&model.clone().map(&mut Move), &examples);
    refused(&reference.disabled(), &examples);
    refused(
        &model.clone().unfreeze().map(&mut Move).reference(),
        &examples,
    );
    // A row less, rows in another order, another mask.
    refused(&reference, &examples[1..]);
    let mut turned = examples.clone();
    turned.swap(0, 3);
    refused(&reference, &turned);
    let first = &examples[0];
    let mut mask = first.supervised().to_vec();
    mask[1] = !mask[1];
    turned = examples.clone();
    turned[0] = Example::new(first.tokens().to_vec(), mask).unwrap();
    refused(&reference, &turned);
    // A reference that is the same in everything is no other one.
    StoredLogProbs::load(&path, &model.reference(), &examples).unwrap();
}

#[test]
fn damaged_files_and_taken_places_are_errors() {
    let (model, examples) = (model().reference(), examples());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("reference.safetensors");
    let stored = stored(&model, &examples);
    stored.save(&path, false).unwrap();
    assert!(matches!(
        stored.save(&path, false),
        Err(PeftError::Exists { .. })
    ));
    stored.save(&path, true).unwrap();

    let bytes = std::fs::read(&path).unwrap();
    let load = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        StoredLogProbs::load(&path, &model, &examples)
    };
    for len in [0, 4, 8, 100, bytes.len() - 1] {
        let error = load(&bytes[..len]).unwrap_err();
        assert!(
            matches!(error, PeftError::Malformed { .. }),
            "{len}: {error}"
        );
    }
    let mut damaged = bytes.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let error = load(&damaged).unwrap_err().to_string();
    assert!(error.contains("damaged"), "{error}");
    let none = safetensors::serialize(Vec::<(&str, safetensors::tensor::TensorView)>::new(), None);
    let error = load(&none.unwrap()).unwrap_err().to_string();
    assert!(error.contains("burn_peft.reference"), "{error}");
    assert!(load(&bytes).is_ok());
    std::fs::remove_file(&path).unwrap();
    let error = StoredLogProbs::load(&path, &model, &examples).unwrap_err();
    assert!(matches!(error, PeftError::Io { .. }), "{error}");
}

#[test]
fn what_cannot_be_stored_is_refused() {
    let (model, examples) = (model().reference(), examples());
    let compute = |examples: &[Example], batch| {
        StoredLogProbs::compute(&model, examples, batch, |part| model.log_probs(part))
    };
    assert!(compute(&examples, 0).is_err());
    assert!(compute(&[], 4).is_err());
    let short = StoredLogProbs::compute(&model, &examples, 3, |part| model.log_probs(&part[..1]));
    assert!(short.is_err());
    let infinite = StoredLogProbs::compute(&model, &examples, 7, |part| {
        let own = model.log_probs(part)?;
        let lens = own.lens().to_vec();
        LogProbs::new(own.values.mul_scalar(f32::INFINITY), lens)
    });
    let error = infinite.unwrap_err().to_string();
    assert!(error.contains("example 0"), "{error}");
}
