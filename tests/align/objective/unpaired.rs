//! KTO and reward models against TRL.

use burn::tensor::DType;
use burn_peft::objective::preference::{FeedbackLoss, KlBatch, KtoConfig, KtoLoss, kto_loss};
use burn_peft::objective::{LogProbs, bradley_terry_loss};

use super::golden::{self, Case, Golden};

fn golden() -> Golden {
    Golden::read(include_str!("../../golden/objectives/unpaired.json"))
}

fn kto(golden: &Golden, case: &Case, dtype: DType) -> (burn::tensor::Tensor<1>, FeedbackLoss) {
    let leaf = golden::leaf(&golden.batch["policy"], dtype);
    let policy = LogProbs::new(leaf.clone(), golden::lens(&golden.batch["policy"]))
        .and_then(|l| l.with_entropy(golden::constant(&golden.batch["entropy"], dtype)))
        .unwrap();
    let [first, second] = match case.flag("swapped") {
        false => ["kl_policy", "kl_reference"],
        true => ["kl_reference", "kl_policy"],
    };
    let kl = KlBatch {
        policy: golden.log_probs(first, dtype),
        reference: golden.log_probs(second, dtype),
    };
    let labels = case.options["labels"].as_array().unwrap().iter();
    let labels: Vec<bool> = labels.map(|label| label.as_bool().unwrap()).collect();
    let (loss, kl) = match case.text("loss") {
        "kto" => (KtoLoss::Kto, Some(&kl)),
        "apo_zero_unpaired" => (KtoLoss::ApoZeroUnpaired, None),
        other => panic!("{other}"),
    };
    let weights = case.numbers("weights");
    let config = KtoConfig::new()
        .with_beta(case.number("beta"))
        .with_weights(weights[0], weights[1])
        .with_loss(loss);
    let reference = golden.log_probs("reference", dtype);
    let loss = kto_loss(&policy, &reference, &labels, kl, &config).unwrap();
    (leaf, loss)
}

#[test]
fn kto_is_that_of_trl() {
    let golden = golden();
    let cases: Vec<_> = golden.cases.iter().filter(|c| c.kind == "kto").collect();
    assert_eq!(cases.len(), 6);
    for case in cases {
        for dtype in [DType::F64, DType::F32] {
            let (leaf, loss) = kto(&golden, case, dtype);
            let metrics = loss.metrics().unwrap();
            case.check_metric("kl", metrics.kl);
            case.check_metric("entropy", metrics.entropy.unwrap());
            let optional = [
                ("rewards/chosen", metrics.reward_chosen),
                ("rewards/rejected", metrics.reward_rejected),
                ("rewards/margins", metrics.margin),
                ("logps/chosen", metrics.log_probs_chosen),
                ("logps/rejected", metrics.log_probs_rejected),
            ];
            for (name, value) in optional {
                let expected = case.metrics.contains_key(name);
                assert_eq!(value.is_some(), expected, "{}: {name}", case.name);
                if let Some(value) = value {
                    case.check_metric(name, value);
                }
            }
            case.check_loss(&loss.loss.mean(), dtype);
            let gradients = loss.loss.mean().backward();
            case.check_gradient("policy", &leaf, &gradients, dtype);
        }
    }
}

#[test]
fn reward_models_learn_as_those_of_trl() {
    let golden = golden();
    let cases: Vec<_> = golden.cases.iter().filter(|c| c.kind == "reward").collect();
    assert_eq!(cases.len(), 4);
    for case in cases {
        for dtype in [DType::F64, DType::F32] {
            let leaf = golden::leaf(&vec![case.numbers("scores")], dtype);
            let [chosen, rejected] = [0, 4].map(|start| leaf.clone().narrow(0, start, 4));
            let margins = case.options["margin"]
                .is_array()
                .then(|| case.numbers("margin"));
            let margins: Option<Vec<f32>> =
                margins.map(|margins| margins.iter().map(|m| *m as f32).collect());
            let centring = case.optional("centering").unwrap_or(0.0);
            let loss = bradley_terry_loss(chosen, rejected, margins.as_deref(), centring).unwrap();
            let metrics = loss.metrics().unwrap();
            case.check_metric("accuracy", metrics.accuracy);
            case.check_metric("margin", metrics.margin);
            case.check_metric("min_reward", metrics.min);
            case.check_metric("mean_reward", metrics.mean);
            case.check_metric("max_reward", metrics.max);
            case.check_loss(&loss.loss.mean(), dtype);
            let gradients = loss.loss.mean().backward();
            case.check_gradient("scores", &leaf, &gradients, dtype);
        }
    }
}
