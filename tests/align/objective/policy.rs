//! The family of GRPO, and RLOO, against TRL.

use burn::tensor::DType;
use burn_peft::objective::policy::{
    Aggregate, KlPenalty, Level, PolicyBatch, PolicyConfig, PolicyLoss, Surrogate,
    off_policy_weights, policy_loss,
};
use burn_peft::objective::{LogProbs, Ragged};

use super::golden::{self, Case, Golden};

fn golden() -> Golden {
    Golden::read(include_str!("../../golden/objectives/policy.json"))
}

fn config(case: &Case) -> PolicyConfig {
    let epsilon = case.numbers("epsilon");
    let clip = Surrogate::Clip {
        low: epsilon[0],
        high: epsilon[1],
        dual: case.optional("delta"),
    };
    let most = case.number("max_length") as usize;
    let (surrogate, aggregate) = match case.text("loss") {
        "grpo" | "rloo" => (clip, Aggregate::SequenceMean),
        "dapo" | "bnpo" => (clip, Aggregate::TokenMean),
        "dr_grpo" => (clip, Aggregate::Constant(most)),
        "luspo" => (clip, Aggregate::SequenceSum),
        "cispo" => (Surrogate::Cispo { max: epsilon[1] }, Aggregate::TokenMean),
        "sapo" => (PolicyConfig::sapo().surrogate, Aggregate::SequenceMean),
        "vespo" => (PolicyConfig::vespo().surrogate, Aggregate::TokenMean),
        other => panic!("{other}"),
    };
    let level = match case.text("level") {
        "token" => Level::Token,
        "sequence" => Level::Sequence,
        "sequence_sum" => Level::SequenceSum,
        other => panic!("{other}"),
    };
    let config = PolicyConfig::new()
        .with_surrogate(surrogate)
        .with_aggregate(aggregate)
        .with_level(level)
        .with_entropy_coef(case.number("entropy"));
    match case.number("beta") {
        0.0 => config,
        beta => config.with_kl(KlPenalty::new(beta).with_corrected(case.flag("corrected"))),
    }
}

#[test]
fn losses_and_gradients_are_those_of_trl() {
    let golden = golden();
    assert_eq!(golden.cases.len(), 39);
    let lens = golden::lens(&golden.batch["new"]);
    let weights = golden::ragged(&golden.batch["weights"]);
    for case in &golden.cases {
        let advantages: Vec<f32> = case
            .numbers("advantages")
            .iter()
            .map(|a| *a as f32)
            .collect();
        let spread = Ragged::spread(&advantages, lens.clone()).unwrap();
        for dtype in [DType::F64, DType::F32] {
            let leaf = golden::leaf(&golden.batch["new"], dtype);
            let entropy = golden::leaf(&golden.batch["entropy"], dtype);
            let new = LogProbs::new(leaf.clone(), lens.clone())
                .and_then(|l| l.with_entropy(entropy.clone()))
                .unwrap();
            let old = match case.flag("on_policy") {
                true => new.clone(),
                false => golden.log_probs("old", dtype),
            };
            let reference = golden.log_probs("reference", dtype);
            let mut batch = PolicyBatch::new(&new, &old, &spread)
                .and_then(|batch| batch.with_reference(&reference))
                .unwrap();
            let kept = case.optional("threshold").map(|threshold| {
                let [new, old] = [&new, &old].map(|l| l.to_ragged().unwrap());
                off_policy_weights(&new, &old, &advantages, threshold).unwrap()
            });
            if let Some(kept) = &kept {
                assert!(kept.values().contains(&0.0) && kept.values().contains(&1.0));
                batch = batch.with_weights(kept).unwrap();
            }
            if case.flag("weights") {
                batch = batch.with_weights(&weights).unwrap();
            }
            let loss = policy_loss(&batch, &config(case)).unwrap();
            check_metrics(case, &loss);
            case.check_loss(&loss.mean(), dtype);
            let gradients = loss.mean().backward();
            case.check_gradient("new", &leaf, &gradients, dtype);
            if case.gradients.contains_key("entropy") {
                case.check_gradient("entropy", &entropy, &gradients, dtype);
            }
        }
    }
}

fn check_metrics(case: &Case, loss: &PolicyLoss) {
    let metrics = loss.metrics().unwrap();
    case.check_metric("entropy", metrics.entropy.unwrap());
    let optional = [
        ("kl", metrics.kl),
        ("clip_ratio/low_mean", Some(metrics.clip_low)),
        ("clip_ratio/high_mean", Some(metrics.clip_high)),
        ("clip_ratio/region_mean", Some(metrics.clip_fraction)),
        ("clip_ratio/low_min", Some(metrics.clip_low_min)),
        ("clip_ratio/high_max", Some(metrics.clip_high_max)),
        ("cispo_clip_ratio", Some(metrics.clip_high)),
    ];
    let mut read = 0;
    for (name, found) in optional {
        if case.metrics.contains_key(name) {
            case.check_metric(name, found.unwrap());
            read += 1;
        }
    }
    let clips = ["sapo", "vespo"].contains(&case.text("loss"));
    assert!(clips || read > 0, "{} has no metrics", case.name);
}
