//! A change as a LoRA, and a packed weight with one.

use burn_peft::PeftError;
use burn_peft::layer::{FrozenLinear, LoftqReport, QLoraLinear};
use burn_peft::nf4::Nf4Config;
use burn_peft::resume::Seed;

use super::*;

const SIGMA: [f32; 5] = [8.0, 4.0, 2.0, 1.0, 0.5];

/// `‖Δ‖` of these singular values, from the one of rank `r` on.
fn rest(r: usize) -> f64 {
    let squares = SIGMA[r..].iter().map(|&s| f64::from(s * s));
    squares.sum::<f64>().sqrt()
}

#[test]
fn a_change_is_met_as_nearly_as_its_rank_allows() {
    for (d_in, d_out) in [(30, 18), (18, 30)] {
        let [_, _, delta] = with_singular_values(d_in, d_out, &SIGMA);
        for rslora in [false, true] {
            for rank in 1..=6 {
                let config = LoraConfig::new(rank).with_alpha(7.0).with_rslora(rslora);
                let (lora, report) = config.from_delta(&delta).unwrap();
                let expected = rest(rank.min(5)) / rest(0);
                // Rounding of f32 sums, relative to the largest singular value.
                assert!(
                    (report.relative_error - expected).abs() < 1e-6,
                    "{report:?}"
                );
                let found = f64::from(norm(&(delta.clone() - lora.delta_weight()))) / rest(0);
                assert!((found - expected).abs() < 2e-6, "{found}, not {expected}");
                assert_eq!((lora.rank(), report.rank), (rank, rank));
            }
        }
    }
}

#[test]
fn the_smallest_rank_within_a_bound_is_found() {
    let [_, _, delta] = with_singular_values(20, 16, &SIGMA);
    let config = LoraConfig::new(1).with_alpha(3.0);
    for rank in 1..=4 {
        // Between what this rank misses and what the one below does.
        let bound = (rest(rank) + rest(rank - 1)) / 2.0 / rest(0);
        let (lora, report) = config.from_delta_within(&delta, bound).unwrap();
        assert_eq!((lora.rank(), report.rank), (rank, rank));
        assert!(report.relative_error <= bound);
        let found = f64::from(norm(&(delta.clone() - lora.delta_weight()))) / rest(0);
        assert!((found - report.relative_error).abs() < 2e-6);
    }
    let zero = Tensor::zeros([20, 16], &device());
    let (lora, report) = config.from_delta_within(&zero, 0.0).unwrap();
    assert_eq!((lora.rank(), report.relative_error), (1, 0.0));
    assert_eq!(norm(&lora.delta_weight()), 0.0);
}

#[test]
fn a_rank_a_scale_or_a_bound_that_cannot_be_is_named() {
    let delta = random([6, 4]);
    let config = LoraConfig::new(5);
    let name = |error| match error {
        PeftError::Config { name, .. } => name,
        other => panic!("{other}"),
    };
    assert_eq!(name(config.from_delta(&delta).unwrap_err()), "rank");
    let negative = config.clone().with_alpha(-2.0);
    assert_eq!(name(negative.from_delta(&delta).unwrap_err()), "alpha");
    for bound in [-0.1, 1.1, f64::NAN] {
        assert_eq!(
            name(config.from_delta_within(&delta, bound).unwrap_err()),
            "bound"
        );
    }
}

#[test]
fn loftq_nears_the_weight_with_every_iteration_whatever_the_scale() {
    // The same weight every time: that each iteration comes nearer is usual, not sure.
    // Sums of twelve even values in [-1/2, 1/2), which are near normal of variance 1.
    let even = |i, j| Seed(3).at(i, j) as i64 as f32 / 2f32.powi(64);
    let value = |i| (0..12).map(|j| even(i, j)).sum();
    let values_of = |n: u64| (0..n).map(value).collect::<Vec<f32>>();
    let weight = Tensor::<1>::from_floats(values_of(64 * 96).as_slice(), &device());
    let weight = weight.reshape([64, 96]);
    let x = random([7, 64]);
    for (rslora, dora) in [(false, false), (true, false), (false, true)] {
        // Scales of 0.4 and 1.1: where the scale is forgotten, the pair misses the weight by more than NF4 alone.
        let config = LoraConfig::new(8)
            .with_alpha(3.2)
            .with_rslora(rslora)
            .with_dora(dora);
        let pair = |iterations| -> (QLoraLinear, LoftqReport) {
            let linear = linear(&weight);
            QLoraLinear::from_linear_loftq(linear, &Nf4Config::new(), &config, iterations).unwrap()
        };
        let (layer, report) = pair(5);
        let LoftqReport { quantized, errors } = &report;
        assert!(errors[0] < *quantized, "{report:?}");
        assert!(
            errors.windows(2).all(|pair| pair[1] < pair[0]),
            "{report:?}"
        );
        // The report is true of the layer's weight, and its outputs are those of that weight.
        let (merged, _) = layer.merge();
        let merged = merged.weight.val();
        let found = norm(&(weight.clone() - merged.clone())) / norm(&weight);
        assert!((found - errors[4]).abs() < 1e-5, "{found}, {report:?}");
        let bias = layer.base.bias.as_ref().unwrap().val();
        let expected = x.clone().matmul(merged) + bias.unsqueeze();
        assert!(error(&layer.forward(x.clone()), &expected) < 1e-5);

        // After one iteration the base is the weight quantised as usual.
        let usual = QLoraLinear::from_linear(linear(&weight), &Nf4Config::new(), &config).unwrap();
        let (first, _) = pair(1);
        assert_eq!(
            values(&first.base.dense_weight()),
            values(&usual.base.dense_weight())
        );
        let none = QLoraLinear::from_linear_loftq(linear(&weight), &Nf4Config::new(), &config, 0);
        assert!(matches!(none, Err(PeftError::Config { name, .. }) if name == "iterations"));
    }
}
