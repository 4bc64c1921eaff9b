//! The supervised fine-tuning loss and its gradient agree with PyTorch's `cross_entropy(reduction="sum",
//! ignore_index=-100)` on `tests/golden/sft/sft.json` (made by `generate.py` beside it), and accumulate as one batch.

use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData};
use burn_peft::objective::{SftLoss, sft_loss};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    name: String,
    shape: [usize; 3],
    logits: Vec<f64>,
    targets: Vec<i64>,
    mask: Vec<bool>,
    sum: f64,
    gradient: Vec<f64>,
}

fn golden() -> Vec<Case> {
    serde_json::from_str(include_str!("golden/sft/sft.json")).unwrap()
}

fn golden_case(name: &str) -> Case {
    golden().into_iter().find(|case| case.name == name).unwrap()
}

impl Case {
    fn logits(&self, dtype: DType) -> Tensor<3> {
        let device = Device::flex().autodiff();
        let data = TensorData::new(self.logits.clone(), self.shape);
        Tensor::from_data(data, (&device, dtype)).require_grad()
    }

    fn targets(&self) -> Tensor<2, Int> {
        let data = TensorData::new(self.targets.clone(), [self.shape[0], self.shape[1]]);
        Tensor::from_data(data, &Device::flex())
    }

    fn mask(&self) -> Tensor<2, Bool> {
        let data = TensorData::new(self.mask.clone(), [self.shape[0], self.shape[1]]);
        Tensor::from_data(data, &Device::flex())
    }

    fn loss(&self, logits: &Tensor<3>) -> SftLoss {
        sft_loss(logits.clone(), self.targets(), self.mask()).unwrap()
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.try_into_vec_as::<f64>().unwrap()
}

#[track_caller]
fn assert_close(name: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let bound = tolerance * expected.abs().max(1.0);
        assert!(
            (found - expected).abs() <= bound,
            "{name}[{i}]: expected {expected}, found {found}"
        );
    }
}

#[test]
fn sum_and_gradient_are_pytorchs() {
    for case in golden() {
        for (dtype, tolerance) in [
            // A handful of roundings of f32 (2^-24 each), relative to the loss or to a probability of one. "huge" and
            // "shifted" subtract logits of size 1e4 that were rounded to f32 on both sides alike: exact.
            (DType::F32, 1e-6),
            // As above with 2^-53.
            (DType::F64, 1e-14),
        ] {
            let logits = case.logits(dtype);
            let loss = case.loss(&logits);
            assert_eq!(loss.count, case.mask.iter().filter(|&&m| m).count());
            assert_close(
                &case.name,
                &values(loss.sum.clone()),
                &[case.sum],
                tolerance,
            );
            let gradient = logits.grad(&loss.sum.backward()).unwrap();
            assert_close(&case.name, &values(gradient), &case.gradient, tolerance);
        }
    }
}

#[test]
fn narrow_logits_are_summed_in_f32_and_get_a_gradient_of_their_own_type() {
    let case = golden_case("bf16");
    let logits = case.logits(DType::BF16);
    let loss = case.loss(&logits);
    assert_eq!(loss.sum.dtype(), DType::F32);
    // Computed in f32 from exact values; in bf16 the error would be 2^-9, a thousand times this.
    assert_close("sum", &values(loss.sum.clone()), &[case.sum], 1e-6);
    let gradient = logits.grad(&loss.sum.backward()).unwrap();
    assert_eq!(gradient.dtype(), DType::BF16);
    // Probabilities, rounded once to 8 bits: half an ulp below one is 2^-9.
    assert_close("gradient", &values(gradient), &case.gradient, 2f64.powi(-9));
}

#[test]
fn gradient_is_the_finite_difference() {
    let case = golden_case("some");
    let logits = case.logits(DType::F64);
    let gradient = values(logits.grad(&case.loss(&logits).sum.backward()).unwrap());
    // Central differences in f64: truncation is about step² = 1e-10 times a third derivative below 0.1, rounding
    // 2^-53 · loss / step, 1e-10 for a loss near 10.
    let step = 1e-5;
    for (i, &found) in gradient.iter().enumerate() {
        let at = |offset: f64| {
            let mut case = golden_case("some");
            case.logits[i] += offset;
            values(case.loss(&case.logits(DType::F64)).sum)[0]
        };
        let expected = (at(step) - at(-step)) / (2.0 * step);
        assert!(
            (found - expected).abs() < 1e-9,
            "[{i}]: expected {expected}, found {found}"
        );
    }
}

#[test]
fn what_is_not_supervised_has_no_influence() {
    let case = golden_case("some");
    let mut spoilt = golden_case("some");
    for (position, supervised) in case.mask.iter().enumerate() {
        if !supervised {
            spoilt.logits[position * case.shape[2]] = f64::NAN;
            spoilt.targets[position] = -100;
        }
    }
    let logits = spoilt.logits(DType::F32);
    let loss = spoilt.loss(&logits);
    assert_close("sum", &values(loss.sum.clone()), &[case.sum], 1e-6);
    let gradient = values(logits.grad(&loss.sum.backward()).unwrap());
    assert_close("gradient", &gradient, &case.gradient, 1e-6);
}

/// Two micro-batches with three and one supervised tokens give the loss and the gradient of the batch of both.
#[test]
fn micro_batches_of_unequal_counts_accumulate_as_one_batch() {
    let case = golden_case("some");
    let [_, seq, vocab] = case.shape;
    let split = |mut mask: Vec<bool>| {
        // Leave a single supervised token in the second row.
        mask[seq..].fill(false);
        mask[seq + 1] = true;
        mask
    };
    let whole = Case {
        mask: split(case.mask.clone()),
        ..golden_case("some")
    };
    let row = |row: usize| Case {
        name: format!("row {row}"),
        shape: [1, seq, vocab],
        logits: whole.logits[row * seq * vocab..][..seq * vocab].to_vec(),
        targets: whole.targets[row * seq..][..seq].to_vec(),
        mask: whole.mask[row * seq..][..seq].to_vec(),
        sum: 0.0,
        gradient: vec![],
    };

    let logits = whole.logits(DType::F32);
    let loss = whole.loss(&logits).mean();
    let gradient = values(logits.grad(&loss.backward()).unwrap());

    let rows = [row(0), row(1)];
    let logits = rows.each_ref().map(|row| row.logits(DType::F32));
    let losses = [rows[0].loss(&logits[0]), rows[1].loss(&logits[1])];
    assert_eq!(losses.each_ref().map(|loss| loss.count), [3, 1]);
    let total = losses.iter().map(|loss| loss.count).sum();
    let parts = losses.each_ref().map(|loss| loss.over(total).unwrap());

    let sum: f64 = parts.iter().map(|part| values(part.clone())[0]).sum();
    assert_close("loss", &[sum], &values(loss), 1e-6);
    let accumulated: Vec<f64> = logits
        .iter()
        .zip(&parts)
        .flat_map(|(logits, part)| values(logits.grad(&part.backward()).unwrap()))
        .collect();
    // The same sums in the same order but for one division: an ulp of f32.
    assert_close("gradient", &accumulated, &gradient, 1e-7);

    // The mean of means is another number: that is what normalising once is for.
    let naive = losses
        .iter()
        .map(|loss| values(loss.mean())[0])
        .sum::<f64>()
        / 2.0;
    assert!((naive - sum).abs() > 1e-3, "{naive} {sum}");
}
