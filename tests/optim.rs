//! Clipping as torch does it (`tests/golden/optim/generate.py`), and the two learning rates of LoRA+.

use burn::module::{Module, Param, ParamId};
use burn::nn::conv::{Conv1d, Conv1dConfig};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{Device, Distribution, Tensor, TensorData, Tolerance};
use burn_peft::PeftError;
use burn_peft::adapter::{Change, LoraConfig, LoraInit};
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig, TrainableTokens};
use burn_peft::optim::{EMBEDDING_LR, LoraPlusGroups, clip_grad_norm, lora_plus};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    max_norm: Option<f64>,
    norm: f32,
    grads: [Values; 3],
    clipped: [Values; 3],
}

#[derive(Deserialize)]
struct Values {
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl Values {
    fn tensor<const D: usize>(&self) -> Tensor<D> {
        let data = TensorData::new(self.values.clone(), self.shape.clone());
        Tensor::from_data(data, &Device::default())
    }
}

/// Parameters of the shapes in the golden file.
#[derive(Module, Debug)]
struct Parameters {
    a: Param<Tensor<2>>,
    b: Param<Tensor<2>>,
    c: Param<Tensor<1>>,
}

impl Parameters {
    fn with(grads: &[Values; 3]) -> (Self, GradientsParams) {
        let [a, b, c] = grads;
        let module = Self {
            a: Param::from_tensor(a.tensor()),
            b: Param::from_tensor(b.tensor()),
            c: Param::from_tensor(c.tensor()),
        };
        let mut grads = GradientsParams::new();
        grads.register::<2>(module.a.id, a.tensor());
        grads.register::<2>(module.b.id, b.tensor());
        grads.register::<1>(module.c.id, c.tensor());
        (module, grads)
    }

    fn grads(&self, grads: &GradientsParams) -> [Vec<f32>; 3] {
        [
            values(grads.get::<2>(self.a.id).unwrap()),
            values(grads.get::<2>(self.b.id).unwrap()),
            values(grads.get::<1>(self.c.id).unwrap()),
        ]
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

fn cases() -> Vec<Case> {
    serde_json::from_slice(&std::fs::read(crate::golden("optim/clip.json")).unwrap()).unwrap()
}

#[test]
fn gradients_are_clipped_as_torch_clips_them() {
    let cases = cases();
    assert_eq!(cases.len(), 5);
    for case in cases {
        let (module, mut grads) = Parameters::with(&case.grads);
        let max_norm = case.max_norm.unwrap_or(f64::INFINITY);
        let norm = clip_grad_norm(&module, &mut grads, max_norm).unwrap();
        // Sums of 25 squares in another order, and one factor.
        assert!(
            (norm / case.norm - 1.0).abs() < 1e-6,
            "{norm}: {}",
            case.norm
        );
        for (found, expected) in module.grads(&grads).into_iter().zip(&case.clipped) {
            let shape = [found.len()];
            TensorData::new(found, shape).assert_approx_eq::<f32>(
                &TensorData::new(expected.values.clone(), shape),
                Tolerance::relative(1e-6),
            );
        }
    }
}

/// A parameter in two places of a module has one gradient, which counts, and is scaled, once.
#[test]
fn a_shared_parameter_counts_once() {
    #[derive(Module, Debug)]
    struct Tied {
        first: Param<Tensor<1>>,
        second: Param<Tensor<1>>,
    }
    let device = Device::default();
    let shared = Param::from_tensor(Tensor::<1>::zeros([2], &device));
    let module = Tied {
        first: shared.clone(),
        second: shared,
    };
    assert_eq!(module.first.id, module.second.id);
    let mut grads = GradientsParams::new();
    grads.register::<1>(module.first.id, Tensor::from_floats([3.0, 4.0], &device));
    assert_eq!(clip_grad_norm(&module, &mut grads, 2.5).unwrap(), 5.0);
    let clipped = values(grads.get::<1>(module.first.id).unwrap());
    assert!(
        (clipped[0] - 1.5).abs() < 1e-6 && (clipped[1] - 2.0).abs() < 1e-6,
        "{clipped:?}"
    );
}

#[test]
fn what_cannot_be_clipped_is_an_error_and_left_as_it_was() {
    let mut case = cases().remove(0);
    case.grads[1].values[3] = f32::NAN;
    let (module, mut grads) = Parameters::with(&case.grads);
    let bits = |grads: [Vec<f32>; 3]| {
        grads.map(|grad| grad.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let before = bits(module.grads(&grads));
    match clip_grad_norm(&module, &mut grads, 1.0) {
        Err(PeftError::NotFinite { tensor, index, .. }) => {
            assert_eq!((tensor.as_str(), index), ("gradient of b", 3));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(bits(module.grads(&grads)), before);

    case.grads[1].values[3] = 1e30;
    let (module, mut grads) = Parameters::with(&case.grads);
    let error = clip_grad_norm(&module, &mut grads, 1.0).unwrap_err();
    assert!(
        error.to_string().contains("norm of all gradients"),
        "{error}"
    );

    for max_norm in [0.0, -1.0, f64::NAN] {
        let error = clip_grad_norm(&module, &mut grads, max_norm).unwrap_err();
        assert!(error.to_string().contains("max_norm"), "{error}");
    }
    let none = clip_grad_norm(&module, &mut GradientsParams::new(), 1.0).unwrap();
    assert_eq!(none, 0.0);
}

#[derive(Module, Debug)]
struct Net {
    first: Linear,
    second: Linear,
}

#[test]
fn lora_plus_moves_b_and_magnitudes_faster_by_the_ratio() {
    const LR: f64 = 0.125;
    const RATIO: f64 = 4.0;
    let device = Device::default().autodiff();
    let net = Net {
        first: LinearConfig::new(6, 5).init(&device),
        second: LinearConfig::new(5, 3).init(&device),
    };
    let mut model = PeftModel::new(net);
    let lora = LoraConfig::new(2)
        .with_dora(true)
        .with_init(LoraInit::Random);
    let config = PeftConfig::new(lora, TargetConfig::all_linear());
    model.add_adapter("default", &config).unwrap();
    let before = model.factors("default").unwrap();
    let group = model.adapter_params();
    for (_, lora) in &before {
        let magnitude = lora.magnitude.as_ref().unwrap().id;
        assert!(
            [lora.a.id, lora.b.id, magnitude]
                .iter()
                .all(|id| group.matches(id, None))
        );
    }

    let x = Tensor::<2>::random([7, 6], Distribution::Normal(0.0, 1.0), &device);
    let y = model.second.forward_peft(model.first.forward_peft(x));
    let gradients = y.square().mean().backward();
    let expected: Vec<_> = before
        .iter()
        .map(|(_, lora)| {
            let magnitude = lora.magnitude.as_ref().unwrap().val();
            [
                values(lora.a.val().inner() - lora.a.val().grad(&gradients).unwrap() * LR),
                values(
                    lora.b.val().inner() - lora.b.val().grad(&gradients).unwrap() * (LR * RATIO),
                ),
                values(
                    magnitude.clone().inner() - magnitude.grad(&gradients).unwrap() * (LR * RATIO),
                ),
            ]
        })
        .collect();

    let mut rates = lora_plus(&model, LR, RATIO).unwrap();
    let grads = GradientsParams::from_grads(gradients, &model);
    let model = SgdConfig::new().init().step(rates.step(), model, grads);
    let found: Vec<_> = model
        .factors("default")
        .unwrap()
        .into_iter()
        .map(|(_, lora)| {
            [
                values(lora.a.val().inner()),
                values(lora.b.val().inner()),
                values(lora.magnitude.unwrap().val().inner()),
            ]
        })
        .collect();
    // Powers of two: the same products.
    assert_eq!(found, expected);

    for (lr, ratio) in [
        (0.0, 2.0),
        (1e-3, -1.0),
        (f64::NAN, 1.0),
        (1e-3, f64::INFINITY),
    ] {
        assert!(lora_plus(&model, lr, ratio).is_err());
    }
}

#[derive(Deserialize)]
struct Rates {
    lr: f64,
    ratio: f64,
    parameters: std::collections::BTreeMap<String, f64>,
}

#[derive(Module, Debug)]
struct Kinds {
    embed: Embedding,
    other: Embedding,
    first: Linear,
    conv: Conv1d,
    norm: LayerNorm,
    head: Linear,
}

/// Golden: `tests/golden/optim/lora_plus.py`.
#[test]
fn every_parameter_has_the_rate_that_peft_gives_it() {
    let golden = std::fs::read(crate::golden("optim/lora_plus.json")).unwrap();
    let golden: Rates = serde_json::from_slice(&golden).unwrap();
    let device = Device::default().autodiff();
    let mut model = PeftModel::new(Kinds {
        embed: EmbeddingConfig::new(7, 4).init(&device),
        other: EmbeddingConfig::new(5, 4).init(&device),
        first: LinearConfig::new(4, 6).init(&device),
        conv: Conv1dConfig::new(4, 3, 2).init(&device),
        norm: LayerNormConfig::new(6).init(&device),
        head: LinearConfig::new(6, 2).init(&device),
    });
    let tokens = [("other".to_owned(), vec![1, 3])].into();
    let config = PeftConfig::new(
        LoraConfig::new(2).with_dora(true),
        TargetConfig::list(["embed", "first", "conv"]),
    )
    .with_modules_to_save(["norm", "head"])
    .with_trainable_tokens(TrainableTokens::Named(tokens));
    model.add_adapter("default", &config).unwrap();
    let groups = LoraPlusGroups::of(&model);
    let rate = |id: &ParamId| {
        if groups.b.matches(id, None) {
            golden.lr * golden.ratio
        } else if groups.embedding.matches(id, None) {
            EMBEDDING_LR
        } else {
            assert!(groups.a.matches(id, None));
            golden.lr
        }
    };
    let mut found = std::collections::BTreeMap::new();
    for (path, change) in model.changes("default").unwrap() {
        let (module, name) = path.rsplit_once('.').unwrap();
        match change {
            Change::Lora(lora) => {
                let factors = match module {
                    "embed" => ["lora_embedding_A.default", "lora_embedding_B.default"],
                    _ => ["lora_A.default.weight", "lora_B.default.weight"],
                };
                for (factor, name) in [lora.a.id, lora.b.id].iter().zip(factors) {
                    found.insert(format!("{module}.{name}"), rate(factor));
                }
                let magnitude = format!("{module}.lora_magnitude_vector.default.weight");
                found.insert(magnitude, rate(&lora.magnitude.unwrap().id));
            }
            Change::Copy(copy) => {
                let name = match name {
                    "gamma" => "weight",
                    "beta" => "bias",
                    name => name,
                };
                let name = format!("{module}.modules_to_save.default.{name}");
                found.insert(name, rate(&copy.values.id));
            }
            Change::Rows(rows) => {
                let name = format!("{module}.token_adapter.trainable_tokens_delta.default");
                found.insert(name, rate(&rows.rows.id));
            }
        }
    }
    assert_eq!(found, golden.parameters);
    // The scheduler has the same groups.
    let mut rates = lora_plus(&model, golden.lr, golden.ratio).unwrap();
    rates.step();
}
