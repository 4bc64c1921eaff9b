//! Clipping as torch does it (`tests/golden/optim/generate.py`), and the two learning rates of LoRA+.

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{Device, Distribution, Tensor, TensorData, Tolerance};
use burn_peft::PeftError;
use burn_peft::adapter::{LoraConfig, LoraInit};
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig};
use burn_peft::optim::{clip_grad_norm, lora_plus};
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
