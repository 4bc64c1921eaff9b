//! Log-probabilities of a head agree with PyTorch in float64, and their gradients too.

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_peft::objective::{
    HeadChunks, Labels, LogProbsConfig, SupervisedKind, head_log_probs, supervised_loss,
};
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
    smoothed: Vec<Supervised>,
    dynamic: Supervised,
}

#[derive(Deserialize)]
struct Supervised {
    epsilon: Option<f64>,
    loss: f64,
    dx: Matrix,
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

fn read() -> Golden {
    let text = std::fs::read_to_string(golden("log_probs/log_probs.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn values_and_gradients_agree_with_torch() {
    let golden = read();
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

#[test]
fn supervised_losses_agree_with_transformers() {
    let golden = read();
    let labels: Vec<(usize, usize)> = golden.labels.iter().copied().enumerate().collect();
    let labels = Labels::from_sequences(&[labels]).unwrap();
    let head = Linear {
        weight: Param::from_tensor(matrix(&golden.weight, DType::F64)),
        bias: Some(Param::from_tensor(vector(&golden.bias, DType::F64))),
    };
    let dynamic = (SupervisedKind::Dft, &golden.dynamic);
    let smoothed = golden.smoothed.iter().map(|case| {
        let kind = SupervisedKind::LabelSmoothing(case.epsilon.unwrap());
        (kind, case)
    });
    // transformers sums log-probabilities in f32, whatever their dtype is.
    let smoothed = smoothed.map(|(kind, case)| (kind, case, 1e-7));
    let dynamic = (dynamic.0, dynamic.1, 1e-12);
    for (kind, case, bound) in smoothed.chain([dynamic]) {
        let x = matrix(&golden.x, DType::F64).require_grad();
        let config = LogProbsConfig::new().with_statistics(true);
        let policy = head_log_probs(x.clone().unsqueeze(), &head, &labels, &config).unwrap();
        let loss = supervised_loss(&policy, kind).unwrap();
        assert_eq!(loss.count, 9);
        assert_near(loss.mean(), &[case.loss], bound);
        let gradients = loss.mean().backward();
        assert_near(x.grad(&gradients).unwrap(), &case.dx.concat(), bound);

        // The plain loss is the negative sum, and what a smoothing of nothing gives.
        let plain = supervised_loss(&policy, SupervisedKind::Nll).unwrap();
        let none = supervised_loss(&policy, SupervisedKind::LabelSmoothing(0.0)).unwrap();
        let [plain, none] = [plain, none].map(|loss| loss.sum.into_scalar::<f64>());
        assert!((plain - none).abs() < 1e-12);
    }
}

#[test]
fn a_smoothing_without_statistics_is_refused_with_the_way_out() {
    let head = burn::nn::LinearConfig::new(4, 6).init(&Device::default());
    let labels = Labels::from_sequences(&[vec![(0, 1)]]).unwrap();
    let hidden = Tensor::zeros([1, 1, 4], &Device::default());
    let policy = head_log_probs(hidden, &head, &labels, &LogProbsConfig::new()).unwrap();
    let smoothing = |epsilon| supervised_loss(&policy, SupervisedKind::LabelSmoothing(epsilon));
    let error = smoothing(0.1).unwrap_err().to_string();
    assert!(error.contains("with_statistics"), "{error}");
    for epsilon in [-0.1, 1.0, f64::NAN] {
        let error = smoothing(epsilon).unwrap_err().to_string();
        assert!(error.contains("label_smoothing"), "{error}");
    }
}
