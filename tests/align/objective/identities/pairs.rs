//! Losses of preferences.

use std::f64::consts::LN_2;

use burn::tensor::{DType, Tensor};
use burn_peft::objective::preference::{
    DpoConfig, DpoLoss, FDivergence, KlBatch, KtoConfig, OrpoConfig, Pairs, dpo_loss, kto_loss,
    orpo_loss,
};
use burn_peft::objective::{LogProbs, bradley_terry_loss};
use proptest::prelude::*;

use super::{assert_all_near, assert_near, golden, gradient, known, near, rows, tracked};
use crate::objective::golden::Rows;

/// Two sides of as many sequences, and references near them.
fn pairs() -> impl Strategy<Value = [Rows; 4]> {
    (1usize..5)
        .prop_flat_map(|n| (rows(n), rows(n)))
        .prop_flat_map(|(c, r)| {
            let references = (near(&c, 0.5), near(&r, 0.5));
            (Just(c), Just(r), references)
        })
        .prop_map(|(c, r, (rc, rr))| [c, r, rc, rr])
}

fn dpo(sides: &[Rows; 4], config: &DpoConfig) -> (f64, Vec<f64>, Vec<f64>) {
    let (chosen_leaf, chosen) = tracked(&sides[0]);
    let (rejected_leaf, rejected) = tracked(&sides[1]);
    let policy = Pairs::new(chosen, rejected).unwrap();
    let reference = Pairs::new(known(&sides[2]), known(&sides[3])).unwrap();
    let loss = dpo_loss(&policy, &reference, config).unwrap().mean();
    let gradients = loss.backward();
    let [c, r] =
        [chosen_leaf, rejected_leaf].map(|leaf| golden::values(&leaf.grad(&gradients).unwrap()));
    (golden::scalar(&loss), c, r)
}

const SMOOTHED: DpoLoss = DpoLoss::Sigmoid {
    label_smoothing: 0.1,
};
const EXO: DpoLoss = DpoLoss::ExoPair {
    label_smoothing: 1e-3,
};
const DISCOPOP: DpoLoss = DpoLoss::DiscoPop { temperature: 0.05 };

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Where policy and reference are equal, every loss has its known value, and no pair counts as won.
    #[test]
    fn values_at_the_reference(sides in pairs(), beta in 0.05f64..2.0) {
        let same = [&sides[0], &sides[1], &sides[0], &sides[1]].map(Clone::clone);
        let half = 0.5 / beta;
        let expected = [
            (DpoLoss::SIGMOID, LN_2),
            (SMOOTHED, LN_2),
            (DpoLoss::Robust { flip: 0.2 }, LN_2),
            (DpoLoss::Hinge, 1.0),
            (DpoLoss::Ipo, half * half),
            (DpoLoss::SigmoidNorm, LN_2),
            (EXO, -LN_2 - 0.5 * (1e-3f64 * (1.0 - 1e-3)).ln()),
            (DpoLoss::NcaPair, 2.0 * LN_2),
            (DpoLoss::BcoPair, 2.0 * LN_2),
            (DpoLoss::SppoHard, 2.0 * half * half),
            (DpoLoss::ApoZero, 1.0),
            (DpoLoss::ApoDown, 1.0),
            (DpoLoss::Aot { label_smoothing: 0.1 }, LN_2),
            (DpoLoss::AotUnpaired { label_smoothing: 0.1 }, LN_2),
            (DISCOPOP, 0.5 * LN_2 + 0.5),
        ];
        for (loss, expected) in expected {
            let config = DpoConfig::new().with_beta(beta).with_loss(loss);
            assert_near(dpo(&same, &config).0, expected, 1e-12);
            // With weights for the tail on both sides, too.
            assert_near(dpo(&same, &config.with_ld_alpha(0.3)).0, expected, 1e-12);
        }
        for divergence in [FDivergence::ForwardKl, FDivergence::JensenShannon, FDivergence::Alpha(0.5)] {
            let config = DpoConfig::new().with_beta(beta).with_divergence(divergence);
            assert_near(dpo(&same, &config).0, LN_2, 1e-12);
        }
        let policy = Pairs::new(known(&same[0]), known(&same[1])).unwrap();
        let loss = dpo_loss(&policy, &policy, &DpoConfig::new()).unwrap();
        let metrics = loss.metrics().unwrap();
        prop_assert_eq!((metrics.accuracy, metrics.margin), (0.0, 0.0));
    }

    /// What is added to the log-ratios of both completions alike has no influence on a loss of their difference.
    #[test]
    fn a_common_shift_of_both_log_ratios(sides in pairs(), shift in -3.0f64..3.0) {
        let mut shifted = sides.clone();
        for row in shifted[..2].iter_mut().flatten() {
            row[0] += shift;
        }
        for loss in [DpoLoss::SIGMOID, SMOOTHED, DpoLoss::Hinge, EXO, DpoLoss::Robust { flip: 0.1 }, DISCOPOP] {
            let config = DpoConfig::new().with_loss(loss);
            let (value, chosen, rejected) = dpo(&sides, &config);
            let (moved, moved_chosen, moved_rejected) = dpo(&shifted, &config);
            assert_near(moved, value, 1e-9);
            assert_all_near(&moved_chosen, &chosen, 1e-9);
            assert_all_near(&moved_rejected, &rejected, 1e-9);
        }
    }

    /// `∂/∂ℓ_c = −βσ(−x)/pairs` and `∂/∂ℓ_r = +βσ(−x)/pairs` for every token.
    #[test]
    fn gradients_of_tokens(sides in pairs(), beta in 0.05f64..2.0) {
        let (_, chosen, rejected) = dpo(&sides, &DpoConfig::new().with_beta(beta));
        let [c, r, rc, rr] = &sides;
        let pairs = c.len() as f64;
        let (mut chosen, mut rejected) = (chosen.into_iter(), rejected.into_iter());
        for i in 0..c.len() {
            let u = |p: &[f64], q: &[f64]| p.iter().sum::<f64>() - q.iter().sum::<f64>();
            let x = beta * (u(&c[i], &rc[i]) - u(&r[i], &rr[i]));
            let size = beta / (1.0 + x.exp()) / pairs;
            for _ in 0..c[i].len() {
                assert_near(chosen.next().unwrap(), -size, 1e-12);
            }
            for _ in 0..r[i].len() {
                assert_near(rejected.next().unwrap(), size, 1e-12);
            }
        }
    }

    /// Without noise the robust and the conservative loss are the plain one, and that is Bradley and Terry's with the score β·u.
    #[test]
    fn losses_that_are_one(sides in pairs(), beta in 0.05f64..2.0) {
        let config = DpoConfig::new().with_beta(beta);
        let plain = dpo(&sides, &config);
        let robust = dpo(&sides, &config.clone().with_loss(DpoLoss::Robust { flip: 0.0 }));
        prop_assert_eq!(&plain, &robust);
        let scores = |side: usize| {
            let ratios = known(&sides[side]).sums() - known(&sides[side + 2]).sums();
            ratios * beta
        };
        let bradley_terry = bradley_terry_loss(scores(0), scores(1), None, 0.0).unwrap();
        assert_near(golden::scalar(&bradley_terry.loss.mean()), plain.0, 1e-12);
    }

    /// Any split into micro-batches has the gradient of the whole.
    #[test]
    fn splits_of_a_batch_of_pairs(sides in pairs(), cut in 1usize..4) {
        let config = DpoConfig::new().with_losses([(DpoLoss::SIGMOID, 0.7), (DpoLoss::Sft, 1.3)]);
        let (value, chosen, rejected) = dpo(&sides, &config);
        let pairs = sides[0].len();
        let tokens = sides[0].iter().map(Vec::len).sum();
        let cut = cut.min(pairs);
        let mut sum = 0.0;
        let mut parts = [Vec::new(), Vec::new()];
        for range in [0..cut, cut..pairs] {
            if range.is_empty() {
                continue;
            }
            let part = sides.clone().map(|side| side[range.clone()].to_vec());
            let (chosen_leaf, chosen) = tracked(&part[0]);
            let (rejected_leaf, rejected) = tracked(&part[1]);
            let policy = Pairs::new(chosen, rejected).unwrap();
            let reference = Pairs::new(known(&part[2]), known(&part[3])).unwrap();
            let loss = dpo_loss(&policy, &reference, &config).unwrap().over(pairs, tokens).unwrap();
            let gradients = loss.backward();
            sum += golden::scalar(&loss);
            for (part, leaf) in parts.iter_mut().zip([chosen_leaf, rejected_leaf]) {
                part.extend(golden::values(&leaf.grad(&gradients).unwrap()));
            }
        }
        assert_near(sum, value, 1e-12);
        assert_all_near(&parts[0], &chosen, 1e-12);
        assert_all_near(&parts[1], &rejected, 1e-12);
    }

    /// Where a completion's log-ratio is the estimated divergence, its loss is half of its weight.
    #[test]
    fn kto_at_its_reference_point(policy in rows(2..5), u in 0.0f64..2.0, weights in (0.1f64..2.0, 0.1f64..2.0)) {
        let moved: Rows = policy
            .iter()
            .map(|row| row.iter().map(|x| x - u / row.len() as f64).collect())
            .collect();
        let [policy, reference] = [known(&policy), known(&moved)];
        let kl = KlBatch { policy: policy.clone(), reference: reference.clone() };
        let config = KtoConfig::new().with_weights(weights.0, weights.1);
        let labels: Vec<bool> = (0..policy.sequences()).map(|row| row % 2 == 0).collect();
        let loss = kto_loss(&policy, &reference, &labels, Some(&kl), &config).unwrap();
        let expected: f64 = labels.iter().map(|d| 0.5 * if *d { weights.0 } else { weights.1 }).sum();
        assert_near(golden::scalar(&loss.loss.sum), expected, 1e-9);
        assert_near(golden::scalar(&loss.kl), u, 1e-9);
    }

    /// The log odds of a mean log-probability, by the functions of the host.
    #[test]
    fn odds(chosen in -20.0f64..-1e-5, rejected in -20.0f64..-1e-5) {
        let single = |x: f64| known(&vec![vec![x]]);
        let policy = Pairs::new(single(chosen), single(rejected)).unwrap();
        let loss = orpo_loss(&policy, None, &OrpoConfig::new()).unwrap();
        let log_odds = |x: f64| x - (-x.exp_m1()).ln();
        let expected = log_odds(chosen) - log_odds(rejected);
        assert_near(golden::scalar(&loss.log_odds.unwrap()), expected, 1e-12);
    }
}

/// A completion of probability 1 has infinite odds, and no NaN.
#[test]
fn orpo_of_a_certain_completion_is_finite() {
    for dtype in [DType::F64, DType::F32] {
        let leaf = golden::leaf(&vec![vec![0.0, 0.0]], dtype);
        let chosen = LogProbs::new(leaf.clone(), [2]).unwrap();
        let rejected = golden::log_probs(&vec![vec![-1.0]], dtype);
        let policy = Pairs::new(chosen, rejected).unwrap();
        let loss = orpo_loss(&policy, None, &OrpoConfig::new()).unwrap().mean();
        assert!(golden::scalar(&loss).is_finite());
        let gradient = gradient(&loss, &leaf);
        assert!(gradient.iter().all(|g| g.is_finite()), "{gradient:?}");
    }
}

/// Far from the reference no loss is infinite in f32, but those that are meant to be.
#[test]
fn far_from_the_reference_losses_are_finite() {
    let side = |x: f32| {
        let leaf = Tensor::<1>::from_data([x; 4], &burn::tensor::Device::flex().autodiff());
        leaf.require_grad()
    };
    for scale in [-400.0, 400.0] {
        for loss in [
            DpoLoss::SIGMOID,
            SMOOTHED,
            DpoLoss::Hinge,
            EXO,
            DpoLoss::NcaPair,
            DpoLoss::BcoPair,
            DpoLoss::ApoZero,
            DpoLoss::ApoDown,
        ] {
            let leaf = side(-1.0);
            let policy = Pairs::new(
                LogProbs::new(leaf.clone(), [4]).unwrap(),
                golden::log_probs(&vec![vec![-1.0]], DType::F32),
            )
            .unwrap();
            let reference = Pairs::new(
                LogProbs::new(side(-1.0 - scale), [4]).unwrap(),
                golden::log_probs(&vec![vec![-1.0]], DType::F32),
            )
            .unwrap();
            let config = DpoConfig::new().with_beta(1.0).with_loss(loss);
            let value = dpo_loss(&policy, &reference, &config).unwrap().mean();
            assert!(golden::scalar(&value).is_finite(), "{loss:?}");
            let gradient = gradient(&value, &leaf);
            assert!(
                gradient.iter().all(|g| g.is_finite()),
                "{loss:?}: {gradient:?}"
            );
        }
    }
}
