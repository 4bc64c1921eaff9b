//! Ragged log-probabilities: sums, means, parts, and their gradients.

use burn::tensor::{DType, Device, Tensor};
use burn_peft::PeftError;
use burn_peft::objective::{LogProbs, Loss, Ragged};

use super::golden;

fn rows() -> golden::Rows {
    vec![vec![-1.0, -2.0, -3.0], vec![-0.5], vec![-4.0, -0.25]]
}

#[test]
fn sums_and_means_of_sequences_and_their_gradients() {
    for dtype in [DType::F64, DType::F32] {
        let leaf = golden::leaf(&rows(), dtype);
        let log_probs = LogProbs::new(leaf.clone(), [3, 1, 2]).unwrap();
        assert_eq!(golden::values(&log_probs.sums()), [-6.0, -0.5, -4.25]);
        assert_eq!(golden::values(&log_probs.means()), [-2.0, -0.5, -2.125]);
        let weights = golden::constant(&vec![vec![1.0, 10.0, 100.0]], dtype).autodiff();
        let gradients = (log_probs.sums() * weights.clone()).sum().backward();
        let gradient = golden::values(&leaf.grad(&gradients).unwrap());
        assert_eq!(gradient, [1.0, 1.0, 1.0, 10.0, 100.0, 100.0]);
        let gradients = (log_probs.means() * weights).sum().backward();
        let gradient = golden::values(&leaf.grad(&gradients).unwrap());
        let third = match dtype {
            DType::F64 => 1.0 / 3.0,
            _ => f64::from(1.0f32 / 3.0),
        };
        assert_eq!(gradient, [third, third, third, 10.0, 50.0, 50.0]);
    }
}

#[test]
fn a_sequence_does_not_read_another_one() {
    let sums = |other: f64| {
        let mut rows = rows();
        rows[0] = vec![other; 3];
        let all = golden::log_probs(&rows, DType::F32);
        [all.sums(), all.means()].map(|x| golden::values(&x)[1..].to_vec())
    };
    assert_eq!(sums(-1.0), sums(-1e30));
    assert_eq!(sums(-1.0), sums(f64::NAN));
}

#[test]
fn parts_and_the_whole() {
    let lens = [3, 1, 2];
    let all = golden::log_probs(&rows(), DType::F32);
    let extra = golden::constant(&vec![vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], DType::F32);
    let all = all
        .with_entropy(extra.clone())
        .and_then(|l| l.with_log_sum_sq(extra.clone()))
        .and_then(|l| l.with_top1(extra))
        .unwrap();
    let (first, rest) = all.clone().split_at(1);
    assert_eq!((first.lens(), rest.lens()), (&lens[..1], &lens[1..]));
    assert_eq!(golden::values(&rest.values), [-0.5, -4.0, -0.25]);
    assert_eq!(
        golden::values(&rest.entropy.clone().unwrap()),
        [4.0, 5.0, 6.0]
    );
    assert_eq!(
        golden::values(&first.is_top1.clone().unwrap()),
        [1.0, 2.0, 3.0]
    );
    let whole = LogProbs::concat(vec![first.clone(), rest.clone()]);
    assert_eq!(whole.lens(), all.lens());
    assert_eq!(whole.to_ragged().unwrap(), all.to_ragged().unwrap());
    assert_eq!(
        golden::values(&whole.log_sum_sq.unwrap()),
        golden::values(&all.log_sum_sq.clone().unwrap())
    );
    // What one part lacks, the whole lacks.
    let bare = LogProbs::new(first.values.clone(), first.lens().to_vec()).unwrap();
    assert!(LogProbs::concat(vec![bare, rest]).entropy.is_none());
}

#[test]
fn detached_values_have_no_graph() {
    let leaf = golden::leaf(&rows(), DType::F32);
    let log_probs = LogProbs::new(leaf, [3, 1, 2]).unwrap();
    assert!(log_probs.sums().is_tracked());
    assert!(!log_probs.detach().sums().is_tracked());
}

#[test]
fn numbers_of_the_host() {
    let ragged = Ragged::from_rows(&[vec![1.0, 2.0], vec![4.0]]).unwrap();
    assert_eq!(ragged.values(), [1.0, 2.0, 4.0]);
    assert_eq!(ragged.rows().collect::<Vec<_>>(), [&[1.0, 2.0][..], &[4.0]]);
    assert_eq!(ragged.sums(), [3.0, 4.0]);
    assert_eq!((ragged.sequences(), ragged.tokens()), (2, 3));
    let spread = Ragged::spread(&[7.0, 8.0], [2, 1]).unwrap();
    assert_eq!(spread.values(), [7.0, 7.0, 8.0]);
    let device = Device::flex();
    let back = ragged.to_log_probs(&device, DType::F64);
    assert_eq!(golden::values(&back.sums()), [3.0, 4.0]);
    assert_eq!(back.to_ragged().unwrap(), ragged);
}

#[test]
fn losses_are_divided_once() {
    let sum = Tensor::<1>::from_data([6.0f32], &Device::flex());
    let loss = Loss { sum, count: 3 };
    assert_eq!(golden::scalar(&loss.mean()), 2.0);
    assert_eq!(golden::scalar(&loss.over(12).unwrap()), 0.5);
    let error = loss.over(2).unwrap_err();
    assert!(matches!(error, PeftError::Config { .. }), "{error}");
}
