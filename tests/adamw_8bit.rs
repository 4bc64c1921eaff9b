//! AdamW with 8-bit moments, against bitsandbytes (`tests/golden/optim/adamw_8bit.py`), and training with it.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::activation::relu;
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_pack::{Reader, Scalar, Writer};
use burn_peft::adapter::LoraConfig;
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig};
use burn_peft::optim::AdamW8bitConfig;
use burn_peft::resume::Seed;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    signed: Vec<f32>,
    unsigned: Vec<f32>,
    runs: Vec<Run>,
}

#[derive(Deserialize)]
struct Run {
    name: String,
    lr: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    bf16: bool,
    plain: bool,
    min_8bit_size: usize,
    before: Vec<f32>,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    grad: Vec<f32>,
    after: Vec<f32>,
    codes: Option<[Vec<u8>; 2]>,
    absmax: Option<[Vec<f32>; 2]>,
    moments: Option<[Vec<f32>; 2]>,
}

fn golden() -> Golden {
    let text = std::fs::read(crate::golden("optim/adamw_8bit.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

#[derive(Module, Debug)]
struct One {
    values: Param<Tensor<1>>,
}

const BLOCK: usize = 256;

/// Codes as words of four, in whole blocks.
fn words(codes: &[u8]) -> TensorData {
    let mut codes = codes.to_vec();
    codes.resize(codes.len().next_multiple_of(BLOCK), 0);
    let words = codes.as_chunks::<4>().0.iter();
    let words: Vec<i32> = words.map(|&word| i32::from_le_bytes(word)).collect();
    let len = words.len();
    TensorData::new(words, [len])
}

/// The state of an optimiser of one parameter, by field.
fn state(optimizer: &ModuleOptimizer) -> BTreeMap<String, TensorData> {
    let reader = Reader::from_bytes(optimizer.into_bytes().unwrap()).unwrap();
    let tensors = reader.into_tensors().unwrap().into_iter().map(|tensor| {
        let (name, dtype, shape, _, bytes) = tensor.into_parts().unwrap();
        let (_, field) = name.split_once('.').unwrap();
        let data = TensorData::from_bytes_vec(bytes.to_vec(), shape, dtype);
        (field.to_owned(), data)
    });
    tensors.collect()
}

/// An optimiser with a given state after `time` steps.
fn with_state(
    optimizer: ModuleOptimizer,
    module: &One,
    time: usize,
    fields: Vec<(&str, TensorData)>,
) -> ModuleOptimizer {
    let id = module.values.id.val();
    let tensors = fields.into_iter().map(|(field, data)| {
        let (bytes, shape, dtype) = data.into_parts();
        burn_pack::Tensor::new(format!("{id}.{field}"), dtype, shape, Some(id), bytes)
    });
    let writer = Writer::new(tensors.collect())
        .with_scalar(&format!("{id}.__rank"), Scalar::from(1usize))
        .with_scalar(&format!("{id}.time"), Scalar::from(time));
    let record = OptimizerRecord::from_bytes(writer.into_bytes().unwrap()).unwrap();
    optimizer.load_record(record)
}

fn one(values: &[f32], dtype: FloatDType) -> One {
    let device = Device::default().autodiff();
    let values = Tensor::<1>::from_floats(values, &device).cast(dtype);
    One {
        values: Param::from_tensor(values),
    }
}

fn step(optimizer: &mut ModuleOptimizer, lr: f64, module: One, grad: &[f32]) -> One {
    let dtype = FloatDType::from(module.values.val().dtype());
    let grad = Tensor::<1>::from_floats(grad, &Device::default()).cast(dtype);
    let mut grads = GradientsParams::new();
    grads.register(module.values.id, grad);
    optimizer.step(lr, module, grads)
}

fn values(module: &One) -> Vec<f32> {
    let data = module.values.val().into_data().convert_dtype(DType::F32);
    data.try_into_vec().unwrap()
}

/// Each step of bitsandbytes again, from the state that it had before.
#[test]
fn steps_are_those_of_bitsandbytes() {
    let runs = golden().runs;
    assert_eq!(runs.len(), 5);
    for run in runs {
        let name = &run.name;
        let config = AdamW8bitConfig::new()
            .with_beta_1(run.betas[0])
            .with_beta_2(run.betas[1])
            .with_epsilon(run.eps)
            .with_weight_decay(run.weight_decay)
            .with_min_8bit_size(run.min_8bit_size);
        let dtype = if run.bf16 {
            FloatDType::BF16
        } else {
            FloatDType::F32
        };
        let (mut before, mut fields) = (run.before, Vec::new());
        for (time, expected) in run.steps.iter().enumerate() {
            let module = one(&before, dtype);
            let mut optimizer = config.init();
            if time > 0 {
                optimizer = with_state(optimizer, &module, time, std::mem::take(&mut fields));
            }
            let module = step(&mut optimizer, run.lr, module, &expected.grad);
            let found = values(&module);
            let (mut moved, mut apart) = (0.0f32, 0);
            for ((&x, &y), &w) in found.iter().zip(&expected.after).zip(&before) {
                // Roundings of the value, and of a quotient of sums of two terms.
                let bound =
                    2f32.powi(-23) * y.abs() + 2f32.powi(-20) * ((y - w).abs() + run.lr as f32);
                let ulp = if run.bf16 { y.abs() / 128.0 } else { 0.0 };
                assert!((x - y).abs() <= bound + ulp, "{name} {time}: {x} for {y}");
                apart += usize::from((x - y).abs() > bound);
                moved = moved.max((y - w).abs());
            }
            assert!(moved > run.lr as f32 / 2.0, "{name}");
            // A value so near to a tie of bf16 that the rounding before it decides.
            assert!(apart <= 1, "{name} {time}: {apart} values");

            let state = state(&optimizer);
            if let Some(moments) = &expected.moments {
                for (field, expected) in ["moment_1", "moment_2"].into_iter().zip(moments) {
                    let found: Vec<f32> = state[field].clone().try_into_vec().unwrap();
                    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
                    for (x, y) in found.iter().zip(expected) {
                        assert!(
                            (x - y).abs() <= 2f32.powi(-22) * (y.abs() + largest),
                            "{x}: {y}"
                        );
                    }
                    let data = TensorData::new(expected.clone(), [expected.len()]);
                    fields.push((field, data));
                }
            }
            if let (Some(codes), Some(absmax)) = (&expected.codes, &expected.absmax) {
                let names = [["codes_1", "absmax_1"], ["codes_2", "absmax_2"]];
                let mut neighbours = 0;
                for moment in 0..2 {
                    let [words_of, absmax_of] = names[moment];
                    let found: Vec<f32> = state[absmax_of].clone().try_into_vec().unwrap();
                    for (x, y) in found.iter().zip(&absmax[moment]) {
                        assert!((x - y).abs() <= 2f32.powi(-22) * y, "{name}: {x} for {y}");
                    }
                    let found: Vec<i32> = state[words_of].clone().try_into_vec().unwrap();
                    let found: Vec<u8> = found.into_iter().flat_map(i32::to_le_bytes).collect();
                    for (index, (&x, &y)) in found.iter().zip(&codes[moment]).enumerate() {
                        // A block of zeros has any code.
                        if run.plain && absmax[moment][index / BLOCK] > 0.0 {
                            assert!(x.abs_diff(y) <= 1, "{name} {time}: code {x} for {y}");
                            neighbours += usize::from(x != y);
                        }
                    }
                    fields.push((words_of, words(&codes[moment])));
                    let scales = absmax[moment].clone();
                    let len = scales.len();
                    fields.push((absmax_of, TensorData::new(scales, [len])));
                }
                // Where a quotient is a rounding away from the middle of two values.
                assert!(neighbours <= 1, "{name} {time}: {neighbours} neighbours");
            }
            before.clone_from(&expected.after);
        }
    }
}

/// Every code of both maps: with no gradient, `β = 1/2` and no decay the first step takes `m/(√(2·v) + ε)` off, times a constant.
#[test]
fn codes_mean_what_they_mean_in_bitsandbytes() {
    let Golden {
        signed, unsigned, ..
    } = golden();
    let config = AdamW8bitConfig::new()
        .with_beta_1(0.5)
        .with_beta_2(0.5)
        .with_weight_decay(0.0)
        .with_min_8bit_size(0);
    let all: Vec<u8> = (0..=255).collect();
    let ones = vec![255; BLOCK];
    let scale = || TensorData::from([1.0f32]);
    for (codes_1, codes_2) in [(&all, &ones), (&ones, &all)] {
        let module = one(&[0.0; BLOCK], FloatDType::F32);
        let fields = vec![
            ("codes_1", words(codes_1)),
            ("absmax_1", scale()),
            ("codes_2", words(codes_2)),
            ("absmax_2", scale()),
        ];
        let mut optimizer = with_state(config.init(), &module, 0, fields);
        let module = step(&mut optimizer, 1.0, module, &[0.0; BLOCK]);
        for (code, found) in values(&module).into_iter().enumerate() {
            let m = f64::from(signed[usize::from(codes_1[code])]);
            let v = f64::from(unsigned[usize::from(codes_2[code])]);
            // m̂ = m/2/(1 - 1/2), v̂ likewise.
            let expected = -m / (v.sqrt() + 1e-8);
            let error = (f64::from(found) - expected).abs();
            // Six roundings.
            assert!(
                error <= 6.0 * 2f64.powi(-24) * expected.abs(),
                "{code}: {found} for {expected}"
            );
        }
    }
}

/// Two layers, each with a LoRA, that learn a map which differs from theirs by a change of low rank and by noise.
#[derive(Module, Debug)]
struct Net {
    first: Linear,
    second: Linear,
}

const WIDTH: usize = 96;
const BATCH: usize = 16;
const STEPS: u64 = 300;
const WINDOW: usize = 30;

/// Values of `[-scale, scale)` that are a function of `name`.
fn fixed<const D: usize>(name: u64, dims: [usize; D], scale: f32) -> Tensor<D> {
    let value = |i| scale * (Seed(name).at(i as u64, 0) as i64 as f32 / 2f32.powi(63));
    let values = (0..dims.iter().product()).map(value).collect::<Vec<f32>>();
    let device = Device::default().autodiff();
    Tensor::from_data(TensorData::new(values, dims), &device)
}

fn linear(name: u64) -> Linear {
    Linear {
        weight: Param::from_tensor(fixed(name, [WIDTH, WIDTH], (3.0 / WIDTH as f32).sqrt())),
        bias: None,
    }
}

/// Losses of a run, the mean of each window of steps.
fn curve(seed: u64, optimizer: &mut ModuleOptimizer, lr: f64) -> Vec<f64> {
    let net = Net {
        first: linear(1),
        second: linear(2),
    };
    let [first, second] = [&net.first, &net.second].map(|linear| linear.weight.val().detach());
    let delta = fixed(3, [WIDTH, 4], 0.3).matmul(fixed(4, [4, WIDTH], 0.3));
    let device = Device::default().autodiff();
    device.seed(seed);
    let mut model = PeftModel::new(net);
    let config = PeftConfig::new(LoraConfig::new(8), TargetConfig::all_linear());
    model.add_adapter("default", &config).unwrap();
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let name = 1000 + 2 * (seed * STEPS + step);
        let x = fixed(name, [BATCH, WIDTH], 1.0);
        let hidden = relu(x.clone().matmul(first.clone() + delta.clone()));
        let y = hidden.matmul(second.clone() - delta.clone());
        let y = y + fixed(name + 1, [BATCH, WIDTH], 0.3);
        let hidden = relu(model.module().first.forward_peft(x));
        let loss = (model.module().second.forward_peft(hidden) - y)
            .square()
            .mean();
        losses.push(f64::from(loss.clone().into_scalar::<f32>()));
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(lr, model, grads);
    }
    let windows = losses.chunks(WINDOW);
    windows
        .map(|window| window.iter().sum::<f64>() / window.len() as f64)
        .collect()
}

/// Over seeds, of the data's order and the factors: mean and standard deviation of each window.
fn curves(optimizer: impl Fn() -> ModuleOptimizer, lr: f64) -> Vec<(f64, f64)> {
    const SEEDS: u64 = 6;
    let runs: Vec<_> = (0..SEEDS)
        .map(|seed| curve(seed, &mut optimizer(), lr))
        .collect();
    let windows = (0..runs[0].len()).map(|window| {
        let at = || runs.iter().map(|run| run[window]);
        let mean = at().sum::<f64>() / SEEDS as f64;
        let variance = at().map(|x| (x - mean).powi(2)).sum::<f64>() / (SEEDS - 1) as f64;
        (mean, variance.sqrt())
    });
    windows.collect()
}

/// Both optimisers see the same six runs. What the eight bits change of the mean loss, in every window of 30 steps, is less than
/// one standard deviation of a 32-bit run over seeds: whoever looks at one run cannot tell. Less training can be told, so the
/// bound is one.
#[test]
fn training_is_that_of_32_bits_within_the_noise_of_seeds() {
    const LR: f64 = 2e-3;
    let full = || {
        let config = AdamWConfig::new()
            .with_weight_decay(0.01)
            .with_epsilon(1e-8);
        config.init()
    };
    let eight = || AdamW8bitConfig::new().with_min_8bit_size(0).init();
    let expected = curves(full, LR);
    let found = curves(eight, LR);
    let slower = curves(full, LR / 2.0);
    let apart = |curve: &[(f64, f64)]| {
        let pairs = curve.iter().zip(&expected);
        let apart = pairs.map(|((x, _), (y, deviation))| (x - y).abs() / deviation);
        apart.fold(0.0, f64::max)
    };
    println!("32 bits {expected:.4?}\n8 bits {found:.4?}\nhalf the rate {slower:.4?}");
    println!("{} and {} deviations", apart(&found), apart(&slower));
    let (first, last) = (expected[0].0, expected[expected.len() - 1].0);
    assert!(last < 0.5 * first, "it learns: {first} to {last}");
    assert!(apart(&found) < 1.0, "{}", apart(&found));
    assert!(apart(&slower) > 2.0, "{}", apart(&slower));
}
