//! The parts of PPO, and the advantages of groups, against TRL.

use burn::tensor::DType;
use burn_peft::objective::LogProbs;
use burn_peft::objective::policy::{
    AdaptiveKl, KlEstimator, PolicyBatch, PolicyConfig, RewardShaping, Scale, gae,
    group_advantages, leave_one_out, normalized_then_summed, policy_loss, token_rewards,
    value_loss, weighted_rewards, whiten,
};
use serde::Deserialize;

use super::golden::{self, Golden, Rows};

const TEXT: &str = include_str!("../../golden/objectives/ppo.json");

#[derive(Deserialize)]
struct Parts {
    rewards: Vec<Rewards>,
    gae: Vec<Gae>,
    whitened_mean_kept: Rows,
    adaptive: Vec<Step>,
    groups: Groups,
}

#[derive(Deserialize)]
struct Rewards {
    name: String,
    coef: f64,
    scores: Vec<f32>,
    rewards: Rows,
    kl: Vec<f64>,
}

#[derive(Deserialize)]
struct Gae {
    gamma: f64,
    lambda: f64,
    whitened: Rows,
    returns: Rows,
}

#[derive(Deserialize)]
struct Step {
    kl: Vec<f32>,
    coef: f64,
}

#[derive(Deserialize)]
struct Groups {
    rewards: Vec<f32>,
    second: Vec<f32>,
    weights: [f64; 2],
    size: usize,
    group: Vec<f64>,
    batch: Vec<f64>,
    none: Vec<f64>,
    leave_one_out: Vec<f64>,
    normalized_then_summed: Vec<f64>,
    std: f64,
    mean: f64,
}

fn golden() -> (Golden, Parts) {
    (Golden::read(TEXT), serde_json::from_str(TEXT).unwrap())
}

/// Computed in f64, given in f32: one rounding.
#[track_caller]
fn assert_close(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let bound = 1e-6 * expected.abs().max(1.0);
        assert!(
            (f64::from(*found) - expected).abs() <= bound,
            "expected {expected}, found {found}"
        );
    }
}

#[test]
fn rewards_of_tokens() {
    let (golden, parts) = golden();
    let [old, reference] = ["old", "reference"].map(|name| golden::ragged(&golden.batch[name]));
    for case in &parts.rewards {
        let estimator = match case.name.as_str() {
            "k1" => KlEstimator::K1,
            "k2" => KlEstimator::K2,
            other => panic!("{other}"),
        };
        let shaping = RewardShaping::new().with_kl(case.coef, estimator);
        let ended = vec![true; case.scores.len()];
        let found = token_rewards(&case.scores, &ended, &old, &reference, &shaping).unwrap();
        assert_close(found.rewards.values(), &case.rewards.concat());
        assert_close(&found.kl, &case.kl);
        assert_eq!(found.scores, case.scores);
    }
}

#[test]
fn advantages_of_tokens() {
    let (golden, parts) = golden();
    let rewards = golden::ragged(&golden.batch["token_rewards"]);
    let values = golden::ragged(&golden.batch["values"]);
    for case in &parts.gae {
        let found = gae(&rewards, &values, case.gamma, case.lambda).unwrap();
        assert_close(found.returns.values(), &case.returns.concat());
        let whitened = whiten(&found.advantages, false).unwrap();
        assert_close(whitened.values(), &case.whitened.concat());
    }
    let kept = whiten(&rewards, true).unwrap();
    assert_close(kept.values(), &parts.whitened_mean_kept.concat());
}

#[test]
fn the_weight_of_the_divergence_follows_its_target() {
    let (_, parts) = golden();
    let mut control = AdaptiveKl::new(0.2, 6.0, 10000.0).unwrap();
    for step in parts.adaptive {
        control.update(&step.kl).unwrap();
        let found = control.coef();
        assert!(
            (found - step.coef).abs() < 1e-12,
            "expected {}, found {found}",
            step.coef
        );
    }
}

#[test]
fn advantages_of_groups() {
    let groups = golden().1.groups;
    for (scale, expected) in [
        (Scale::Group, &groups.group),
        (Scale::Batch, &groups.batch),
        (Scale::None, &groups.none),
    ] {
        let found = group_advantages(&groups.rewards, groups.size, scale).unwrap();
        assert_close(&found.values, expected);
        assert_close(&[found.mean, found.std], &[groups.mean, groups.std]);
        assert_close(&[found.equal_groups], &[1.0 / 3.0]);
    }
    let found = leave_one_out(&groups.rewards, groups.size).unwrap();
    assert_close(&found.values, &groups.leave_one_out);
    let columns = [
        (&groups.rewards[..], groups.weights[0]),
        (&groups.second[..], groups.weights[1]),
    ];
    let found = normalized_then_summed(&columns, groups.size).unwrap();
    assert_close(&found.values, &groups.normalized_then_summed);
    let sums = weighted_rewards(&columns).unwrap();
    let expected = groups.rewards.iter().zip(&groups.second);
    let expected = expected.map(|(a, b)| f64::from(*a) + 0.5 * f64::from(*b));
    assert_close(&sums, &expected.collect::<Vec<_>>());
}

#[test]
fn losses_of_policy_and_value() {
    let (golden, _) = golden();
    assert_eq!(golden.cases.len(), 2);
    let lens = golden::lens(&golden.batch["new"]);
    let advantages = golden::ragged(&golden.batch["token_rewards"]);
    // The returns are f32 times a power of two.
    let returns = golden::ragged(&golden.batch["returns"]);
    let old_values = golden::ragged(&golden.batch["values"]);
    for case in &golden.cases {
        for dtype in [DType::F64, DType::F32] {
            let leaf = golden::leaf(&golden.batch["new"], dtype);
            let values = golden::leaf(&golden.batch["new_values"], dtype);
            let new = LogProbs::new(leaf.clone(), lens.clone()).unwrap();
            let old = golden.log_probs("old", dtype);
            let batch = PolicyBatch::new(&new, &old, &advantages).unwrap();
            let policy = policy_loss(&batch, &PolicyConfig::ppo(case.number("clip"))).unwrap();
            let clip = Some(case.number("clip_value"));
            let value = value_loss(values.clone(), &old_values, &returns, clip).unwrap();

            let metrics = policy.metrics().unwrap();
            case.check_metric("policy/clipfrac", metrics.clip_fraction);
            case.check_metric("policy/approxkl", metrics.approx_kl);
            case.check_metric("ratio_mean", metrics.ratio_mean);
            let metrics = value.metrics().unwrap();
            case.check_metric("val/clipfrac", metrics.clip_fraction);
            case.check_metric("val/vpred", metrics.mean);
            case.check_metric("val/error", metrics.error);
            assert!(metrics.explained_variance.unwrap() < 1.0);

            let loss = policy.mean() + value.loss.mean() * case.number("value_coef");
            case.check_loss(&loss, dtype);
            let gradients = loss.backward();
            case.check_gradient("new", &leaf, &gradients, dtype);
            case.check_gradient("values", &values, &gradients, dtype);
        }
    }
}
