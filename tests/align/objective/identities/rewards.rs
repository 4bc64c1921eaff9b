//! Advantages, rewards and corrections: numbers of the host.

use burn_peft::objective::Ragged;
use burn_peft::objective::policy::{
    Correction, KlEstimator, Level, OutOfRange, RewardShaping, Scale, gae, group_advantages,
    importance_weights, leave_one_out, reward_to_go, token_rewards, whiten,
};
use proptest::prelude::*;

use super::{assert_near, golden, near, rows};

fn ragged(rows: &super::Rows) -> Ragged {
    golden::ragged(rows)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// λ = 1: the return is the reward to go. λ = 0: the advantage is the one-step error.
    #[test]
    fn ends_of_lambda(
        (rewards, values) in rows(1..4).prop_flat_map(|r| (Just(r.clone()), near(&r, 2.0))),
        gamma in 0.5f64..1.0,
    ) {
        let [rewards, values] = [&rewards, &values].map(ragged);
        let to_go = reward_to_go(&rewards, gamma).unwrap();
        let all = gae(&rewards, &values, gamma, 1.0).unwrap();
        let triples = to_go.values().iter().zip(values.values()).zip(all.advantages.values());
        for (((to_go, value), advantage), returned) in triples.zip(all.returns.values()) {
            assert_near(f64::from(*returned), f64::from(*to_go), 1e-5);
            assert_near(f64::from(*advantage), f64::from(to_go - value), 1e-5);
        }
        let one = gae(&rewards, &values, gamma, 0.0).unwrap();
        for ((r, v), a) in rewards.rows().zip(values.rows()).zip(one.advantages.rows()) {
            for t in 0..r.len() {
                let next = v.get(t + 1).copied().unwrap_or(0.0);
                let expected = f64::from(r[t]) + gamma * f64::from(next) - f64::from(v[t]);
                assert_near(f64::from(a[t]), expected, 1e-6);
            }
        }
    }

    /// Whitened values have mean 0 and variance 1.
    #[test]
    fn whitened(values in rows(2..5)) {
        let values = ragged(&values);
        let white = whiten(&values, false).unwrap();
        let n = white.tokens() as f64;
        let all = || white.values().iter().map(|x| f64::from(*x));
        assert_near(all().sum::<f64>() / n, 0.0, 1e-5);
        // Unless all values are nearly equal, where 1e-8 in the square root counts.
        let spread = values.values().iter().any(|x| (x - values.values()[0]).abs() > 0.1);
        if spread {
            assert_near(all().map(|x| x * x).sum::<f64>() / (n - 1.0), 1.0, 1e-4);
        }
        let kept = whiten(&values, true).unwrap();
        let mean = |r: &Ragged| r.values().iter().map(|x| f64::from(*x)).sum::<f64>() / n;
        assert_near(mean(&kept), mean(&values), 1e-5);
    }

    /// The advantages of a group sum to zero, and do not change with the scale and the origin of the rewards.
    #[test]
    fn advantages_of_a_group(rewards in prop::collection::vec(-2.0f32..2.0, 8), scale in 0.5f32..4.0, shift in -3.0f32..3.0) {
        let spread = rewards.chunks(4).all(|g| g.iter().any(|r| (r - g[0]).abs() > 0.2));
        prop_assume!(spread);
        let found = group_advantages(&rewards, 4, Scale::Group).unwrap();
        for group in found.values.chunks(4) {
            assert_near(group.iter().map(|a| f64::from(*a)).sum(), 0.0, 1e-5);
        }
        let moved: Vec<f32> = rewards.iter().map(|r| r * scale + shift).collect();
        let moved = group_advantages(&moved, 4, Scale::Group).unwrap();
        for (a, b) in found.values.iter().zip(&moved.values) {
            // Up to the 1e-4 beside the standard deviation.
            assert_near(f64::from(*a), f64::from(*b), 5e-3);
        }
        // RLOO is G/(G − 1) of the difference to the mean; of two completions it is their difference.
        let others = leave_one_out(&rewards, 4).unwrap();
        let centred = group_advantages(&rewards, 4, Scale::None).unwrap();
        for (a, b) in others.values.iter().zip(&centred.values) {
            assert_near(f64::from(*a), f64::from(*b) * 4.0 / 3.0, 1e-5);
        }
        let two = leave_one_out(&rewards, 2).unwrap();
        for (a, r) in two.values.chunks(2).zip(rewards.chunks(2)) {
            assert_near(f64::from(a[0]), f64::from(r[0] - r[1]), 1e-6);
            assert_near(f64::from(a[1]), f64::from(r[1] - r[0]), 1e-6);
        }
    }

    /// Equal rewards have no advantage.
    #[test]
    fn equal_rewards(reward in -5.0f32..5.0) {
        for scale in [Scale::Group, Scale::Batch, Scale::None] {
            let found = group_advantages(&[reward; 6], 3, scale).unwrap();
            prop_assert!(found.values.iter().all(|a| a.abs() < 1e-2), "{:?}", found.values);
            prop_assert_eq!(found.equal_groups, 1.0);
        }
    }

    /// Rewards of tokens sum to the score less the divergence; only the last token has the score.
    #[test]
    fn rewards_of_tokens((old, reference) in rows(2).prop_flat_map(|r| (Just(r.clone()), near(&r, 0.5))), scores in [-5.0f32..5.0, -5.0f32..5.0]) {
        let [old, reference] = [&old, &reference].map(ragged);
        let shaping = RewardShaping::new()
            .with_kl(0.2, KlEstimator::K1)
            .with_missing_end_penalty(1.5)
            .with_clip(2.0);
        let found = token_rewards(&scores, &[true, false], &old, &reference, &shaping).unwrap();
        let expected = [scores[0].clamp(-2.0, 2.0), (scores[1] - 1.5).clamp(-2.0, 2.0)];
        prop_assert_eq!(found.scores, expected.to_vec());
        for (row, sum) in found.rewards.sums().iter().enumerate() {
            let expected = f64::from(expected[row]) - 0.2 * f64::from(found.kl[row]);
            assert_near(f64::from(*sum), expected, 1e-5);
        }
        let bare = token_rewards(&scores, &[true; 2], &old, &reference, &RewardShaping::new()).unwrap();
        for (row, score) in bare.rewards.rows().zip(&scores) {
            let (last, others) = row.split_last().unwrap();
            prop_assert_eq!(last, score);
            prop_assert!(others.iter().all(|r| *r == 0.0));
        }
    }

    /// Without a mismatch every weight is 1; else the weights are within their bounds, or zero.
    #[test]
    fn weights_of_the_correction((old, sampled) in rows(1..4).prop_flat_map(|r| (Just(r.clone()), near(&r, 1.0)))) {
        let [old, sampled] = [&old, &sampled].map(ragged);
        for level in [Level::Token, Level::Sequence, Level::SequenceSum] {
            let correction = Correction::new().with_level(level).with_bounds(Some(0.8), Some(1.2));
            let (weights, mismatch) = importance_weights(&old, &old, &correction).unwrap();
            prop_assert!(weights.values().iter().all(|w| *w == 1.0));
            prop_assert_eq!((mismatch.mean, mismatch.max, mismatch.out_of_range), (0.0, 0.0, 0.0));

            let (weights, mismatch) = importance_weights(&old, &sampled, &correction).unwrap();
            prop_assert!(weights.values().iter().all(|w| (0.8..=1.2).contains(w)));
            let differences = old.values().iter().zip(sampled.values());
            let differences: Vec<f32> = differences.map(|(o, s)| (o - s).abs()).collect();
            assert_near(f64::from(mismatch.max), f64::from(differences.iter().copied().fold(0.0, f32::max)), 1e-5);
            let mean = differences.iter().sum::<f32>() / differences.len() as f32;
            assert_near(f64::from(mismatch.mean), f64::from(mean), 1e-5);

            let dropped = correction.with_out_of_range(OutOfRange::Drop);
            let (kept, mismatch) = importance_weights(&old, &sampled, &dropped).unwrap();
            for (kept, weight) in kept.values().iter().zip(weights.values()) {
                prop_assert!(kept == weight || *kept == 0.0);
            }
            let any = kept.values().contains(&0.0);
            prop_assert_eq!(any, mismatch.out_of_range > 0.0);
            if level != Level::Token {
                for row in kept.rows() {
                    prop_assert!(row.iter().all(|w| *w == row[0]));
                }
            }
        }
    }
}
