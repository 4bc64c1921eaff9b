//! Identities that hold for every batch, in f64.

mod pairs;
mod policies;
mod rewards;

use burn::tensor::{DType, Tensor};
use burn_peft::objective::LogProbs;
use proptest::prelude::*;

use super::golden::{self, Rows};

/// Log-probabilities of `sequences` of 1 to 5 tokens.
fn rows(sequences: impl Into<prop::collection::SizeRange>) -> impl Strategy<Value = Rows> {
    prop::collection::vec(prop::collection::vec(-4.0..-0.01, 1..6), sequences)
}

/// Rows of the same lengths, each number changed by up to `by`.
fn near(rows: &Rows, by: f64) -> impl Strategy<Value = Rows> + use<> {
    let changes = rows
        .iter()
        .map(|row| prop::collection::vec(-by..by, row.len()));
    let rows = rows.clone();
    changes.collect::<Vec<_>>().prop_map(move |changes| {
        let pairs = rows.iter().zip(&changes);
        pairs
            .map(|(row, changes)| row.iter().zip(changes).map(|(x, c)| x + c).collect())
            .collect()
    })
}

/// A leaf, and the log-probabilities with its values.
fn tracked(rows: &Rows) -> (Tensor<1>, LogProbs) {
    let leaf = golden::leaf(rows, DType::F64);
    let log_probs = LogProbs::new(leaf.clone(), golden::lens(rows)).unwrap();
    (leaf, log_probs)
}

fn known(rows: &Rows) -> LogProbs {
    golden::log_probs(rows, DType::F64)
}

/// The gradient of `loss` at `leaf`.
fn gradient(loss: &Tensor<1>, leaf: &Tensor<1>) -> Vec<f64> {
    let gradients = loss.backward();
    golden::values(&leaf.grad(&gradients).expect("a gradient"))
}

#[track_caller]
fn assert_near(found: f64, expected: f64, tolerance: f64) {
    let bound = tolerance * expected.abs().max(1.0);
    assert!(
        (found - expected).abs() <= bound,
        "expected {expected}, found {found}"
    );
}

#[track_caller]
fn assert_all_near(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert_near(*found, *expected, tolerance);
    }
}
