//! Log-probabilities of a head agree with PyTorch in float64, and their gradients too.

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_peft::objective::{HeadChunks, Labels, LogProbsConfig, head_log_probs};
use serde::Deserialize;

use crate::golden;

type Matrix = Vec<Vec<f64>>;

#[derive(Deserialize)]
struct Golden {
    x: Matrix,
    weight: Matrix,
    bias: Vec<f64>,
    labels: Vec<usize>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    temperature: f64,
    upstream: Matrix,
    log_prob: Vec<f64>,
    entropy: Vec<f64>,
    mean: Vec<f64>,
    log_sum_sq: Vec<f64>,
    is_top: Vec<f64>,
    gradients: (Matrix, Matrix, Vec<f64>),
}

fn matrix(rows: &Matrix, dtype: DType) -> Tensor<2> {
    let data = TensorData::new(rows.concat(), [rows.len(), rows[0].len()]);
    Tensor::from_data(data, (&Device::default().autodiff(), dtype))
}

fn vector(values: &[f64], dtype: DType) -> Tensor<1> {
    let data = TensorData::new(values.to_vec(), [values.len()]);
    Tensor::from_data(data, (&Device::default().autodiff(), dtype))
}

#[track_caller]
fn assert_near<const D: usize>(found: Tensor<D>, expected: &[f64], bound: f64) {
    let found: Vec<f64> = found.try_into_vec_as().unwrap();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= bound, "{found}, not {expected}");
    }
}

#[test]
fn values_and_gradients_agree_with_torch() {
    let text = std::fs::read_to_string(golden("log_probs/log_probs.json")).unwrap();
    let golden: Golden = serde_json::from_str(&text).unwrap();
    let labels: Vec<(usize, usize)> = golden.labels.iter().copied().enumerate().collect();
    let labels = Labels::from_sequences(&[labels[..4].to_vec(), labels[4..].to_vec()]).unwrap();
    // In f64 of Burn's operations, to roundings of f64; in f32 by the kernels.
    for (dtype, bound) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
        for (case, chunks) in golden.cases.iter().zip([[4, 8], [2, 100], [100, 6]]) {
            let x = matrix(&golden.x, dtype).require_grad();
            let head = Linear {
                weight: Param::from_tensor(matrix(&golden.weight, dtype)),
                bias: Some(Param::from_tensor(vector(&golden.bias, dtype))),
            };
            let config = LogProbsConfig::new()
                .with_chunks(HeadChunks::new(chunks[0], chunks[1]).unwrap())
                .with_temperature(case.temperature)
                .with_statistics(true);
            let hidden = x.clone().unsqueeze();
            let found = head_log_probs(hidden, &head, &labels, &config).unwrap();
            assert_eq!(found.lens(), [4, 5]);
            let values = found.values.clone();
            let [entropy, mean] = [&found.entropy, &found.mean].map(|x| x.clone().unwrap());
            assert_near(values.clone(), &case.log_prob, bound);
            assert_near(entropy.clone(), &case.entropy, bound);
            assert_near(mean.clone(), &case.mean, bound);
            assert_near(found.log_sum_sq.clone().unwrap(), &case.log_sum_sq, bound);
            assert_near(found.is_top1.clone().unwrap(), &case.is_top, 0.0);
            let sums = [0..4, 4..9].map(|range| case.log_prob[range].iter().sum::<f64>());
            assert_near(found.sums(), &sums, 9.0 * bound);

            let [a, b, c] = [0, 1, 2].map(|line| vector(&case.upstream[line], dtype));
            let gradients = (values * a + entropy * b + mean * c).sum().backward();
            let (dx, dw, db) = &case.gradients;
            assert_near(x.grad(&gradients).unwrap(), &dx.concat(), bound);
            let weight = head.weight.val().grad(&gradients).unwrap();
            assert_near(weight, &dw.concat(), 4.0 * bound);
            let bias = head.bias.as_ref().unwrap().val().grad(&gradients).unwrap();
            assert_near(bias, db, 4.0 * bound);
        }
    }
}
