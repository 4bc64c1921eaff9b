//! Parameters in bf16: clipping, accumulation, f32 states, and updates that rounding loses.

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsAccumulator, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_peft::adapter::LoraConfig;
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig};
use burn_peft::optim::{AdamW8bitConfig, F32State, clip_grad_norm, grads_to_f32};
use burn_peft::resume::Seed;

const BF16: FloatDType = FloatDType::BF16;
const F32: FloatDType = FloatDType::F32;

/// Values of `[-1, 1)` that are a function of `name`, to `dtype`.
fn fixed<const D: usize>(name: u64, dims: [usize; D], dtype: FloatDType) -> Tensor<D> {
    let value = |i| Seed(name).at(i as u64, 0) as i64 as f32 / 2f32.powi(63);
    let values = (0..dims.iter().product()).map(value).collect::<Vec<f32>>();
    let tensor = Tensor::<D>::from_data(TensorData::new(values, dims), &Device::default());
    tensor.cast(dtype)
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = tensor.into_data().convert_dtype(DType::F32);
    data.try_into_vec().unwrap()
}

#[derive(Module, Debug)]
struct Two {
    half: Param<Tensor<2>>,
    full: Param<Tensor<1>>,
}

impl Two {
    fn new(half: Tensor<2>, full: Tensor<1>) -> Self {
        let track = |x| Tensor::from_inner(x);
        Self {
            half: Param::from_tensor(Tensor::from_inner(half)),
            full: Param::from_tensor(track(full)),
        }
    }

    fn with(&self, half: Tensor<2>, full: Tensor<1>) -> GradientsParams {
        let mut grads = GradientsParams::new();
        grads.register(self.half.id, half);
        grads.register(self.full.id, full);
        grads
    }
}

/// The norm of gradients in two dtypes is that of their values; scaling rounds each once.
#[test]
fn gradients_in_bf16_are_clipped_in_f32() {
    let (half, full) = (fixed(1, [60, 70], BF16), fixed(2, [300], F32));
    let module = Two::new(half.clone(), full.clone());
    let squares = |values: Vec<f32>| {
        values
            .into_iter()
            .map(|x| f64::from(x).powi(2))
            .sum::<f64>()
    };
    let exact = (squares(host(half.clone())) + squares(host(full.clone()))).sqrt();
    // Nearly halfway between two values of bf16: a factor rounded to bf16 would be off by 1/350.
    let max_norm = exact * 158.45 / 256.0;
    let mut grads = module.with(half.clone(), full.clone());
    let norm = f64::from(clip_grad_norm(&module, &mut grads, max_norm).unwrap());
    // Sums of 4500 squares in f32, in parts.
    assert!((norm / exact - 1.0).abs() < 1e-6, "{norm}: {exact}");

    let factor = (max_norm / (norm + 1e-6)) as f32;
    let clipped = grads.get::<2>(module.half.id).unwrap();
    assert_eq!(clipped.dtype(), DType::BF16);
    let expected = half.clone().cast(F32).mul_scalar(factor).cast(BF16);
    assert_eq!(host(clipped.clone()), host(expected));
    let full_clipped = grads.get::<1>(module.full.id).unwrap();
    assert_eq!(host(full_clipped.clone()), host(full.mul_scalar(factor)));
    let after = (squares(host(clipped)) + squares(host(full_clipped))).sqrt();
    // 4200 roundings of 1/512 at most, of either sign.
    assert!((after / max_norm - 1.0).abs() < 1e-4, "{after}: {max_norm}");

    // Sums far beyond the integers of bf16, and beyond where it tells 16384 ones from one more.
    let ones = Tensor::<2>::ones([1 << 10, 1 << 10], (&Device::default(), DType::BF16));
    let module = Two::new(ones.clone(), fixed(3, [1], F32));
    let mut grads = module.with(ones, Tensor::zeros([1], &Device::default()));
    assert_eq!(clip_grad_norm(&module, &mut grads, 1e9).unwrap(), 1024.0);
}

/// What many small micro-batches add up to is there in f32, and lost in bf16.
#[test]
fn gradients_are_accumulated_in_f32() {
    let device = Device::default();
    let module = Two::new(fixed(1, [1, 2], BF16), fixed(2, [2], F32));
    let sum = |widen: bool| {
        let mut accumulator = GradientsAccumulator::new();
        for micro_step in 0..257 {
            // One, and then 256 times 2⁻⁸/2, a tie that bf16 rounds back to one.
            let value = if micro_step == 0 { 1.0 } else { 2f32.powi(-8) };
            let half = Tensor::<2>::full([1, 2], value, (&device, DType::BF16));
            let mut grads = module.with(half, Tensor::full([2], value, &device));
            if widen {
                grads_to_f32(&module, &mut grads);
            }
            accumulator.accumulate(&module, grads);
        }
        let mut grads = accumulator.grads();
        let full = host(grads.get::<1>(module.full.id).unwrap());
        assert_eq!(full, [2.0, 2.0]);
        let half = grads.remove::<2>(module.half.id).unwrap();
        (half.dtype(), host(half))
    };
    assert_eq!(sum(true), (DType::F32, vec![2.0, 2.0]));
    assert_eq!(sum(false), (DType::BF16, vec![1.0, 1.0]));
}

#[derive(Module, Debug)]
struct Net {
    first: Linear,
    second: Linear,
}

/// Gradients of a sum of losses over micro-batches, each divided by the number of all examples, and those of one batch.
#[test]
fn micro_batches_are_one_large_batch() {
    const EXAMPLES: usize = 32;
    let device = Device::default().autodiff();
    for dtype in [F32, BF16] {
        let net = Net {
            first: LinearConfig::new(24, 40).init(&device),
            second: LinearConfig::new(40, 8).init(&device),
        };
        let mut model = PeftModel::new(net);
        let lora = LoraConfig::new(4)
            .with_init(burn_peft::adapter::LoraInit::Random)
            .with_dtype(dtype);
        let config = PeftConfig::new(lora, TargetConfig::all_linear());
        model.add_adapter("default", &config).unwrap();
        let x = Tensor::from_inner(fixed::<2>(5, [EXAMPLES, 24], F32));
        let grads_of = |size: usize| {
            let mut accumulator = GradientsAccumulator::new();
            for first in (0..EXAMPLES).step_by(size) {
                let x = x.clone().slice([first..first + size]);
                let y = model
                    .second
                    .forward_peft(model.first.forward_peft(x).tanh());
                let loss = y.square().sum().div_scalar(EXAMPLES as f64);
                let mut grads = GradientsParams::from_grads(loss.backward(), &model);
                grads_to_f32(&model, &mut grads);
                accumulator.accumulate(&model, grads);
            }
            let mut grads = accumulator.grads();
            let factors = model.factors("default").unwrap();
            let all: Vec<f32> = factors
                .iter()
                .flat_map(|(_, lora)| [lora.a.id, lora.b.id])
                .flat_map(|id| host(grads.get::<2>(id).unwrap()))
                .collect();
            let norm = clip_grad_norm(&model, &mut grads, 1e-3).unwrap();
            (all, norm)
        };
        let (whole, whole_norm) = grads_of(EXAMPLES);
        let length = whole.iter().map(|x| x * x).sum::<f32>().sqrt();
        for size in [1, 4, 8] {
            let (parts, norm) = grads_of(size);
            let squares = parts.iter().zip(&whole).map(|(x, y)| (x - y).powi(2));
            let error = squares.sum::<f32>().sqrt() / length;
            // In f32 sums of 32 in another order. In bf16 the backward pass rounds every gradient, of either sign, to 1/512 of
            // itself, a few times over; accumulating adds nothing to that.
            let bound = if dtype == F32 { 1e-5 } else { 2e-2 };
            assert!(error < bound, "{dtype:?}, {size} at a time: {error}");
            assert!(
                (norm / whole_norm - 1.0).abs() < bound,
                "{norm}: {whole_norm}"
            );
        }
    }
}

#[derive(Module, Debug)]
struct One {
    values: Param<Tensor<2>>,
}

fn one(values: Tensor<2>) -> One {
    One {
        values: Param::from_tensor(Tensor::from_inner(values)),
    }
}

fn run(
    mut optimizer: ModuleOptimizer,
    start: Tensor<2>,
    lr: f64,
    steps: u64,
    grad: impl Fn(u64) -> Tensor<2>,
) -> Tensor<2> {
    let mut module = one(start);
    for step in 0..steps {
        let mut grads = GradientsParams::new();
        grads.register(module.values.id, grad(step));
        module = optimizer.step(lr, module, grads);
    }
    module.values.val().inner()
}

fn adamw() -> AdamWConfig {
    AdamWConfig::new()
        .with_weight_decay(0.01)
        .with_epsilon(1e-8)
}

/// On f32 it is the optimiser that it is around; on bf16 every step is that of f32, rounded once.
#[test]
fn f32_states_step_as_f32_and_round_once() {
    let start = || fixed::<2>(7, [40, 50], F32);
    let grad = |step: u64| fixed::<2>(100 + step, [40, 50], F32);
    for compensation in [false, true] {
        let wrapped = F32State::new(adamw().build()).with_compensation(compensation);
        let found = run(wrapped.init(), start(), 0.01, 5, grad);
        let expected = run(adamw().init(), start(), 0.01, 5, grad);
        assert_eq!(host(found), host(expected));
    }
    // One step from bf16, with gradients in either dtype.
    let half = || start().cast(BF16);
    for dtype in [F32, BF16] {
        let grad = |step| grad(step).cast(dtype);
        let found = run(F32State::new(adamw().build()).init(), half(), 0.01, 1, grad);
        assert_eq!(found.dtype(), DType::BF16);
        let expected = run(adamw().init(), half().cast(F32), 0.01, 1, |s| {
            grad(s).cast(F32)
        });
        assert_eq!(host(found), host(expected.cast(BF16)));
    }
    // Optimisers without a state, too.
    let sgd = || SgdConfig::new();
    let found = run(F32State::new(sgd().build()).init(), start(), 0.01, 3, grad);
    assert_eq!(host(found), host(run(sgd().init(), start(), 0.01, 3, grad)));
    // The optimiser in eight bits computes in f32 by itself.
    let eight = || AdamW8bitConfig::new().with_min_8bit_size(0);
    for dtype in [F32, BF16] {
        let grad = |step| grad(step).cast(dtype);
        let found = run(eight().init(), half(), 0.01, 5, grad);
        assert_eq!(found.dtype(), DType::BF16);
        let expected = run(F32State::new(eight().build()).init(), half(), 0.01, 5, grad);
        assert_eq!(host(found), host(expected));
    }
}

/// AdamW takes about the learning rate off where gradients do not change: 0.001 of a value of 1, where the next bf16 is 0.996.
/// Each step is rounded back, for ever; the residual keeps it until it counts.
#[test]
fn updates_that_rounding_loses_add_up_in_the_residual() {
    let start = |dtype: FloatDType| Tensor::<2>::ones([64, 80], (&Device::default(), dtype.into()));
    let grad = |_| Tensor::<2>::ones([64, 80], (&Device::default(), DType::BF16));
    let full = run(adamw().init(), start(F32), 1e-3, 200, |s| grad(s).cast(F32));
    let full = host(full)[0];
    assert!((0.79..0.81).contains(&full), "{full}");

    let eight = || AdamW8bitConfig::new();
    let lost = [
        F32State::new(adamw().build()).init(),
        F32State::new(eight().build()).init(),
        eight().init(),
    ];
    for optimizer in lost {
        let found = run(optimizer, start(BF16), 1e-3, 200, grad);
        assert!(
            host(found).iter().all(|&x| x == 1.0),
            "every update is lost"
        );
    }
    let kept = [
        F32State::new(adamw().build())
            .with_compensation(true)
            .init(),
        F32State::new(eight().build())
            .with_compensation(true)
            .init(),
    ];
    for optimizer in kept {
        let found = run(optimizer, start(BF16), 1e-3, 200, grad);
        for x in host(found) {
            // Half a unit in the last place of bf16, and 200 roundings of the residual, 2⁻¹⁸ each.
            let bound = 2f32.powi(-9) + 200.0 * 2f32.powi(-18);
            assert!((x - full).abs() <= bound, "{x}: {full}");
        }
    }
}
