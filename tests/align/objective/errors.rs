//! Bad input is a typed error that names the row, the option or the value.

use burn::tensor::{DType, Device, Tensor};
use burn_peft::PeftError;
use burn_peft::objective::policy::{
    AdaptiveKl, Aggregate, Correction, KlPenalty, PolicyBatch, PolicyConfig, RewardShaping, Scale,
    Surrogate, gae, group_advantages, importance_weights, leave_one_out, policy_loss,
    token_rewards, value_loss, weighted_rewards, whiten,
};
use burn_peft::objective::preference::{
    CpoConfig, CpoLoss, DpoConfig, DpoLoss, FDivergence, KlBatch, KtoConfig, KtoLoss, Pairs,
    cpo_loss, dpo_loss, kl_partners, kto_loss,
};
use burn_peft::objective::{LogProbs, Ragged, bradley_terry_loss};

use super::golden;

/// The text of a [`PeftError::Config`] or [`PeftError::Shape`].
#[track_caller]
fn text<T>(result: burn_peft::Result<T>) -> String {
    let error = result.err().expect("an error");
    assert!(
        matches!(error, PeftError::Config { .. } | PeftError::Shape { .. }),
        "{error}"
    );
    error.to_string()
}

#[track_caller]
fn assert_names<T>(result: burn_peft::Result<T>, names: &[&str]) {
    let text = text(result);
    for name in names {
        assert!(text.contains(name), "`{name}` is not in: {text}");
    }
}

fn log_probs(lens: &[usize]) -> LogProbs {
    let rows = lens.iter().map(|len| vec![-1.0; *len]).collect();
    golden::log_probs(&rows, DType::F32)
}

fn pairs(chosen: &[usize], rejected: &[usize]) -> Pairs {
    Pairs::new(log_probs(chosen), log_probs(rejected)).unwrap()
}

fn ragged(rows: &[&[f32]]) -> Ragged {
    Ragged::from_rows(rows).unwrap()
}

#[test]
fn empty_sequences_and_lengths() {
    let values = Tensor::<1>::zeros([3], &Device::flex());
    assert_names(
        LogProbs::new(values.clone(), [2, 0, 1]),
        &["sequence 1", "0"],
    );
    assert_names(LogProbs::new(values.clone(), [2, 2]), &["[4]", "[3]"]);
    assert_names(LogProbs::new(values.clone(), []), &["sequences"]);
    assert_names(Ragged::from_rows(&[&[1.0][..], &[]]), &["sequence 1"]);
    assert_names(Ragged::spread(&[1.0], [1, 1]), &["sequences"]);
    assert_names(log_probs(&[1, 1]).with_entropy(values), &["entropy"]);
    assert_names(Pairs::new(log_probs(&[1]), log_probs(&[1, 2])), &["2", "1"]);
    assert_names(Pairs::halves(log_probs(&[1, 1, 1])), &["3", "even"]);
}

#[test]
fn references_of_other_sequences() {
    let policy = pairs(&[2, 3], &[1, 1]);
    let config = DpoConfig::new();
    let error = dpo_loss(&policy, &pairs(&[2, 4], &[1, 1]), &config);
    assert_names(error, &["sequence 1", "reference.chosen", "4", "3"]);
    let error = dpo_loss(&policy, &pairs(&[2], &[1]), &config);
    assert_names(error, &["reference.chosen", "1", "2"]);
    let advantages = ragged(&[&[1.0, 1.0], &[1.0]]);
    let error = PolicyBatch::new(&log_probs(&[2, 2]), &log_probs(&[2, 2]), &advantages).map(|_| ());
    assert_names(error, &["sequence 1", "advantages"]);
}

#[test]
fn options_of_preferences() {
    let policy = pairs(&[2, 3], &[1, 1]);
    let dpo = |config: DpoConfig| dpo_loss(&policy, &policy, &config);
    for beta in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_names(dpo(DpoConfig::new().with_beta(beta)), &["beta"]);
    }
    let smoothed = |label_smoothing| DpoLoss::Sigmoid { label_smoothing };
    assert_names(
        dpo(DpoConfig::new().with_loss(smoothed(0.5))),
        &["label_smoothing"],
    );
    let exo = DpoLoss::ExoPair {
        label_smoothing: 0.0,
    };
    assert_names(dpo(DpoConfig::new().with_loss(exo)), &["ExoPair"]);
    assert_names(dpo(DpoConfig::new().with_losses([])), &["losses"]);
    let weights = [(DpoLoss::SIGMOID, -1.0)];
    assert_names(
        dpo(DpoConfig::new().with_losses(weights)),
        &["weight of Sigmoid"],
    );
    assert_names(dpo(DpoConfig::new().with_ld_alpha(1.5)), &["ld_alpha"]);
    assert_names(dpo(DpoConfig::new().with_weighting(true)), &["log_sum_sq"]);
    let hot = DpoLoss::DiscoPop { temperature: 0.0 };
    assert_names(dpo(DpoConfig::new().with_loss(hot)), &["temperature"]);
    for loss in [
        DpoLoss::NcaPair,
        DpoLoss::BcoPair,
        DpoLoss::SppoHard,
        DpoLoss::ApoZero,
        DpoLoss::ApoDown,
        DpoLoss::AotUnpaired {
            label_smoothing: 0.0,
        },
        DpoLoss::Aot {
            label_smoothing: 0.0,
        },
    ] {
        let config = DpoConfig::new().with_loss(loss);
        let other = config.clone().with_divergence(FDivergence::ForwardKl);
        assert_names(dpo(other), &["divergence", "ForwardKl"]);
        // The limit of the α-divergence is the reverse KL.
        assert!(dpo(config.with_divergence(FDivergence::Alpha(1.0))).is_ok());
    }
    let cpo = |config: CpoConfig| cpo_loss(&policy, &config);
    let hinge = CpoConfig::new().with_loss(CpoLoss::Hinge);
    assert_names(cpo(hinge.with_label_smoothing(0.1)), &["label_smoothing"]);
    assert_names(cpo(CpoConfig::new().with_nll_weight(-0.5)), &["nll_weight"]);
}

#[test]
fn kto_needs_other_rows() {
    assert_eq!(kl_partners(3).unwrap(), [2, 0, 1]);
    assert_names(kl_partners(1), &["1", "at least 2"]);
    let kl = |lens: &[usize]| KlBatch {
        policy: log_probs(lens),
        reference: log_probs(lens),
    };
    let config = KtoConfig::new();
    let loss = |lens: &[usize], labels: &[bool], kl: Option<&KlBatch>, config: &KtoConfig| {
        kto_loss(&log_probs(lens), &log_probs(lens), labels, kl, config)
    };
    let single = loss(&[2], &[true], Some(&kl(&[1])), &config);
    assert_names(single, &["micro-batch", "1"]);
    assert_names(loss(&[2, 1], &[true, false], None, &config), &["kl"]);
    let fewer = loss(&[2, 1], &[true, false], Some(&kl(&[1])), &config);
    assert_names(fewer, &["kl.policy", "1", "2"]);
    let labels = loss(&[2, 1], &[true], Some(&kl(&[1, 1])), &config);
    assert_names(labels, &["labels", "1", "2"]);
    let apo = config.with_loss(KtoLoss::ApoZeroUnpaired);
    assert!(loss(&[2], &[true], None, &apo).is_ok());
}

#[test]
fn rewards_that_are_not_numbers() {
    let rewards = [1.0, 0.0, f32::NAN, 1.0];
    assert_names(
        group_advantages(&rewards, 2, Scale::Group),
        &["rewards[2]", "NaN"],
    );
    assert_names(leave_one_out(&rewards, 2), &["rewards[2]", "NaN"]);
    assert_names(
        group_advantages(&[1.0, 2.0], 1, Scale::Group),
        &["group", "1"],
    );
    assert_names(leave_one_out(&[1.0], 1), &["group", "1"]);
    assert_names(
        group_advantages(&[1.0; 5], 2, Scale::Group),
        &["rewards", "5", "2"],
    );
    assert_names(group_advantages(&[], 2, Scale::None), &["rewards", "0"]);
    let columns = [(&[1.0, 2.0][..], 1.0), (&[1.0, f32::INFINITY][..], 1.0)];
    assert_names(weighted_rewards(&columns), &["function 1[1]", "inf"]);
    assert_names(weighted_rewards(&[]), &["reward functions"]);
    let short = [(&[1.0, 2.0][..], 1.0), (&[1.0][..], 1.0)];
    assert_names(weighted_rewards(&short), &["function 1"]);

    let [old, reference] = [0.0, 0.5].map(|x| ragged(&[&[-1.0 + x, -1.0], &[-2.0]]));
    let plain = RewardShaping::new();
    let rewards = |scores: &[f32], ended: &[bool], shaping: &RewardShaping| {
        token_rewards(scores, ended, &old, &reference, shaping)
    };
    assert_names(
        rewards(&[1.0, f32::NAN], &[true; 2], &plain),
        &["scores[1]"],
    );
    assert_names(rewards(&[1.0], &[true; 2], &plain), &["scores"]);
    assert_names(rewards(&[1.0; 2], &[true], &plain), &["ended"]);
    let negative = plain.with_missing_end_penalty(-1.0);
    assert_names(
        rewards(&[1.0; 2], &[true; 2], &negative),
        &["missing_end_penalty"],
    );
    let broken = ragged(&[&[-1.0, f32::NAN], &[-2.0]]);
    let error = token_rewards(&[1.0; 2], &[true; 2], &broken, &reference, &plain);
    assert_names(error, &["old[0][1]", "NaN"]);
}

#[test]
fn scans_of_tokens() {
    let rewards = ragged(&[&[0.0, 1.0], &[1.0]]);
    assert_names(gae(&rewards, &rewards, 1.5, 0.9), &["gamma"]);
    assert_names(gae(&rewards, &rewards, 1.0, -0.1), &["lambda"]);
    let other = ragged(&[&[0.0], &[1.0]]);
    assert_names(gae(&rewards, &other, 1.0, 0.9), &["sequence 0", "values"]);
    assert_names(whiten(&ragged(&[&[1.0]]), false), &["1", "at least 2"]);
    assert_names(AdaptiveKl::new(0.1, 0.0, 1e4), &["target"]);
    let mut control = AdaptiveKl::new(0.1, 6.0, 1e4).unwrap();
    assert_names(control.update(&[1.0, f32::NAN]), &["kl[1]"]);
    assert_names(control.update(&[]), &["kl"]);
    assert_eq!(control.coef(), 0.1);
}

#[test]
fn options_of_policies() {
    let new = log_probs(&[2, 3]);
    let advantages = Ragged::spread(&[1.0, -1.0], [2, 3]).unwrap();
    let batch = PolicyBatch::new(&new, &new, &advantages).unwrap();
    let loss = |config: PolicyConfig| policy_loss(&batch, &config);
    let clip =
        |low, high, dual| PolicyConfig::new().with_surrogate(Surrogate::Clip { low, high, dual });
    assert_names(loss(clip(-0.1, 0.2, None)), &["clip.low"]);
    assert_names(loss(clip(0.2, f64::NAN, None)), &["clip.high"]);
    assert_names(loss(clip(0.2, 0.2, Some(1.1))), &["clip.dual"]);
    assert_names(loss(PolicyConfig::dr_grpo(2)), &["Constant(2)", "3"]);
    assert!(loss(PolicyConfig::new().with_aggregate(Aggregate::Constant(3))).is_ok());
    assert_names(
        loss(PolicyConfig::new().with_kl(KlPenalty::new(0.1))),
        &["reference"],
    );
    assert_names(
        loss(PolicyConfig::new().with_kl(KlPenalty::new(-0.1))),
        &["kl.coef"],
    );
    assert_names(
        loss(PolicyConfig::new().with_entropy_coef(0.1)),
        &["entropy"],
    );

    let nan = Ragged::spread(&[1.0, f32::NAN], [2, 3]).unwrap();
    let error = PolicyBatch::new(&new, &new, &nan).map(|_| ());
    assert_names(error, &["advantages[1][0]", "NaN"]);
    let negative = Ragged::spread(&[1.0, -1.0], [2, 3]).unwrap();
    assert_names(
        batch.with_weights(&negative).map(|_| ()),
        &["weights[1][0]", "-1"],
    );

    let values = Tensor::<1>::zeros([5], &Device::flex());
    let error = value_loss(values.clone(), &advantages, &advantages, Some(0.0));
    assert_names(error, &["clip"]);
    let short = ragged(&[&[0.0; 2], &[0.0; 2]]);
    assert_names(
        value_loss(values, &short, &advantages, None),
        &["old values"],
    );
    let correction = Correction::new().with_bounds(Some(4.0), Some(3.0));
    assert_names(
        importance_weights(&short, &short, &correction),
        &["min", "3"],
    );
}

#[test]
fn pairs_of_scores() {
    let scores = |n: usize| Tensor::<1>::zeros([n], &Device::flex());
    assert_names(
        bradley_terry_loss(scores(2), scores(3), None, 0.0),
        &["rejected"],
    );
    assert_names(
        bradley_terry_loss(scores(0), scores(0), None, 0.0),
        &["pairs"],
    );
    let margins = [0.5, f32::NAN];
    let error = bradley_terry_loss(scores(2), scores(2), Some(&margins), 0.0);
    assert_names(error, &["margins[1]", "NaN"]);
    assert_names(
        bradley_terry_loss(scores(2), scores(2), None, -1.0),
        &["centering"],
    );
}
