//! DPO and its kin, CPO, SimPO and ORPO, against TRL.

use burn::tensor::DType;
use burn_peft::objective::LogProbs;
use burn_peft::objective::preference::{
    CpoConfig, CpoLoss, DpoConfig, DpoLoss, FDivergence, OrpoConfig, Pairs, PreferenceLoss,
    cpo_loss, dpo_loss, orpo_loss,
};

use super::golden::{self, Case, Golden};

fn golden() -> Golden {
    Golden::read(include_str!("../../golden/objectives/preference.json"))
}

/// The losses of a case with their weights.
fn losses(case: &Case) -> Vec<(DpoLoss, f64)> {
    let smoothing = case.number("smoothing");
    let pairs = case.options["losses"].as_array().unwrap().iter();
    pairs
        .map(|pair| {
            let loss = match pair[0].as_str().unwrap() {
                "sigmoid" => DpoLoss::SIGMOID,
                "robust" => DpoLoss::Robust { flip: smoothing },
                "hinge" => DpoLoss::Hinge,
                "ipo" => DpoLoss::Ipo,
                "sigmoid_norm" => DpoLoss::SigmoidNorm,
                "exo_pair" => DpoLoss::ExoPair {
                    label_smoothing: smoothing,
                },
                "nca_pair" => DpoLoss::NcaPair,
                "bco_pair" => DpoLoss::BcoPair,
                "sppo_hard" => DpoLoss::SppoHard,
                "apo_zero" => DpoLoss::ApoZero,
                "apo_down" => DpoLoss::ApoDown,
                "aot" => DpoLoss::Aot {
                    label_smoothing: smoothing,
                },
                "aot_unpaired" => DpoLoss::AotUnpaired {
                    label_smoothing: smoothing,
                },
                "discopop" => DpoLoss::DiscoPop {
                    temperature: case.number("tau"),
                },
                "sft" => DpoLoss::Sft,
                other => panic!("{other}"),
            };
            (loss, pair[1].as_f64().unwrap())
        })
        .collect()
}

fn dpo_config(case: &Case) -> DpoConfig {
    let divergence = match case.text("divergence") {
        "reverse_kl" => FDivergence::ReverseKl,
        "forward_kl" => FDivergence::ForwardKl,
        "js_divergence" => FDivergence::JensenShannon,
        "alpha_divergence" => FDivergence::Alpha(case.number("alpha")),
        other => panic!("{other}"),
    };
    let config = DpoConfig::new()
        .with_beta(case.number("beta"))
        .with_losses(losses(case))
        .with_divergence(divergence)
        .with_weighting(case.flag("weighting"));
    match case.optional("ld_alpha") {
        None => config,
        Some(alpha) => config.with_ld_alpha(alpha),
    }
}

fn cpo_config(case: &Case) -> CpoConfig {
    let loss = match case.text("loss") {
        "sigmoid" => CpoLoss::Sigmoid,
        "hinge" => CpoLoss::Hinge,
        "ipo" => CpoLoss::Ipo,
        "simpo" => CpoLoss::SimPo {
            margin: case.number("margin"),
        },
        other => panic!("{other}"),
    };
    CpoConfig::new()
        .with_beta(case.number("beta"))
        .with_loss(loss)
        .with_label_smoothing(case.number("smoothing"))
        .with_nll_weight(case.number("nll_weight"))
        .with_alpha(case.number("alpha"))
}

#[test]
fn losses_and_gradients_are_those_of_trl() {
    let golden = golden();
    assert_eq!(golden.cases.len(), 48);
    for case in &golden.cases {
        for dtype in [DType::F64, DType::F32] {
            let rows = |side: &str| match (&case.chosen, side) {
                (Some(rows), "chosen") => rows,
                _ => &golden.batch[side],
            };
            let leaves = ["chosen", "rejected"].map(|side| golden::leaf(rows(side), dtype));
            let side = |index: usize, side: &str| {
                let other =
                    |name: &str| golden::constant(&golden.batch[&format!("{name}_{side}")], dtype);
                LogProbs::new(leaves[index].clone(), golden::lens(rows(side)))
                    .and_then(|l| l.with_entropy(other("entropy")))
                    .and_then(|l| l.with_log_sum_sq(other("log_sum_sq")))
                    .and_then(|l| l.with_top1(other("top1")))
                    .unwrap()
            };
            let policy = Pairs::new(side(0, "chosen"), side(1, "rejected")).unwrap();
            let reference = Pairs::new(
                golden.log_probs("reference_chosen", dtype),
                golden.log_probs("reference_rejected", dtype),
            )
            .unwrap();
            let loss = match case.kind.as_str() {
                "dpo" => dpo_loss(&policy, &reference, &dpo_config(case)),
                "cpo" => cpo_loss(&policy, &cpo_config(case)),
                "orpo" => orpo_loss(
                    &policy,
                    None,
                    &OrpoConfig::new().with_beta(case.number("beta")),
                ),
                other => panic!("{other}"),
            }
            .unwrap();
            check_metrics(case, &loss);
            case.check_loss(&loss.mean(), dtype);
            let gradients = loss.mean().backward();
            for (leaf, side) in leaves.iter().zip(["chosen", "rejected"]) {
                case.check_gradient(side, leaf, &gradients, dtype);
            }
        }
    }
}

fn check_metrics(case: &Case, loss: &PreferenceLoss) {
    let metrics = loss.metrics().unwrap();
    case.check_metric("rewards/chosen", metrics.reward_chosen);
    case.check_metric("rewards/rejected", metrics.reward_rejected);
    case.check_metric("rewards/accuracies", metrics.accuracy);
    case.check_metric("rewards/margins", metrics.margin);
    case.check_metric("logps/chosen", metrics.log_probs_chosen);
    case.check_metric("logps/rejected", metrics.log_probs_rejected);
    match case.kind.as_str() {
        "dpo" => {
            case.check_metric("entropy", metrics.entropy.unwrap());
            case.check_metric("mean_token_accuracy", metrics.token_accuracy.unwrap());
        }
        "cpo" => case.check_metric("nll_loss", metrics.nll),
        _ => {
            case.check_metric("nll_loss", metrics.nll);
            case.check_metric("log_odds_chosen", metrics.log_odds.unwrap());
            case.check_metric("log_odds_ratio", metrics.log_odds_ratio.unwrap());
        }
    }
}

/// Conservative DPO is not in TRL 1.16. Of one pair, AOT is the same loss.
#[test]
fn smoothed_sigmoid_is_aot_of_one_pair() {
    let golden = golden();
    let pair = |policy: bool| {
        let rows = |side: &str| {
            let name = if policy { "" } else { "reference_" };
            golden.batch[&format!("{name}{side}")][..1].to_vec()
        };
        let [chosen, rejected] =
            ["chosen", "rejected"].map(|side| golden::log_probs(&rows(side), DType::F64));
        Pairs::new(chosen, rejected).unwrap()
    };
    let value = |loss| {
        let config = DpoConfig::new().with_loss(loss);
        golden::scalar(&dpo_loss(&pair(true), &pair(false), &config).unwrap().mean())
    };
    let label_smoothing = 0.2;
    let smoothed = value(DpoLoss::Sigmoid { label_smoothing });
    let aot = value(DpoLoss::Aot { label_smoothing });
    assert!((smoothed - aot).abs() < 1e-12, "{smoothed} and {aot}");
    assert!((smoothed - value(DpoLoss::SIGMOID)).abs() > 1e-4);
}
