//! The losses of [`DpoLoss`] as arithmetic on log-ratios.
//!
//! No tensor is divided by a number: the gradient of Burn's division is rounded to f32, also in f64. It is multiplied by the reciprocal.

use burn::tensor::Tensor;
use burn::tensor::activation::{log_sigmoid, sigmoid};

use super::{DpoConfig, DpoLoss, Pairs, logistic, relu};
use crate::objective::{LogProbs, segments};

/// The log-ratios of a batch, and what few losses read besides.
pub(super) struct Batch<'a> {
    policy: &'a Pairs,
    reference: &'a Pairs,
    /// Weights by token of length-desensitised DPO: of chosen and of rejected completions.
    token_weights: Option<[Vec<f64>; 2]>,
    /// `u_c`, `[pairs]`.
    pub chosen: Tensor<1>,
    /// `u_r`, `[pairs]`.
    pub rejected: Tensor<1>,
}

impl<'a> Batch<'a> {
    pub(super) fn new(policy: &'a Pairs, reference: &'a Pairs, config: &DpoConfig) -> Self {
        let lens = [policy.chosen.lens(), policy.rejected.lens()];
        let token_weights = config.ld_alpha.map(|alpha| {
            [
                tail_weights(lens, alpha),
                tail_weights([lens[1], lens[0]], alpha),
            ]
        });
        let ratio = |side: usize, policy: &LogProbs, reference: &LogProbs| {
            let ratios = policy.values.clone() - reference.beside(&policy.values);
            let weights = token_weights.as_ref().map(|sides| &sides[side]);
            weighted_sums(ratios, weights, policy.lens())
        };
        Self {
            chosen: ratio(0, &policy.chosen, &reference.chosen),
            rejected: ratio(1, &policy.rejected, &reference.rejected),
            policy,
            reference,
            token_weights,
        }
    }

    /// `L_c` of the policy, `[pairs]`.
    pub(super) fn chosen_log_probs(&self) -> Tensor<1> {
        self.log_probs(0, &self.policy.chosen)
    }

    /// `L_r` of the policy, `[pairs]`.
    pub(super) fn rejected_log_probs(&self) -> Tensor<1> {
        self.log_probs(1, &self.policy.rejected)
    }

    fn log_probs(&self, side: usize, of: &LogProbs) -> Tensor<1> {
        let weights = self.token_weights.as_ref().map(|sides| &sides[side]);
        weighted_sums(of.values.clone(), weights, of.lens())
    }

    /// The loss of every pair, `[pairs]` (for AOT: of every place of the sorted order); none for the loss of tokens.
    pub(super) fn terms(&self, loss: DpoLoss, config: &DpoConfig) -> Option<Tensor<1>> {
        let beta = config.beta;
        let [chosen, rejected] = [self.chosen.clone(), self.rejected.clone()];
        let scores = || [&self.chosen, &self.rejected].map(|u| config.divergence.score(u.clone()));
        let x = || {
            let [chosen, rejected] = scores();
            (chosen - rejected) * beta
        };
        let by_token = || {
            let [chosen, rejected] = scores();
            let n_c = segments::counts(self.policy.chosen.lens(), &chosen);
            let n_r = segments::counts(self.policy.rejected.lens(), &chosen);
            chosen / n_c - rejected / n_r
        };
        Some(match loss {
            DpoLoss::Sigmoid { label_smoothing } => logistic(x(), label_smoothing),
            DpoLoss::Robust { flip } => {
                let x = x();
                let clean = log_sigmoid(x.clone()) * -(1.0 - flip);
                let loss = match flip == 0.0 {
                    true => clean,
                    false => clean + log_sigmoid(-x) * flip,
                };
                loss * (1.0 / (1.0 - 2.0 * flip))
            }
            DpoLoss::Hinge => relu(-x() + 1.0),
            DpoLoss::Ipo => (by_token() - 0.5 / beta).square(),
            DpoLoss::SigmoidNorm => -log_sigmoid(by_token() * beta),
            DpoLoss::ExoPair { label_smoothing } => {
                let x = x();
                let right =
                    sigmoid(x.clone()) * (log_sigmoid(x.clone()) - (-label_smoothing).ln_1p());
                let wrong = sigmoid(-x.clone()) * (log_sigmoid(-x) - label_smoothing.ln());
                right + wrong
            }
            DpoLoss::NcaPair => {
                let [a, b] = [chosen * beta, rejected * beta];
                -log_sigmoid(a.clone()) - (log_sigmoid(-a) + log_sigmoid(-b)) * 0.5
            }
            DpoLoss::BcoPair => -log_sigmoid(chosen * beta) - log_sigmoid(rejected * -beta),
            DpoLoss::SppoHard => (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square(),
            // 1 − σ(a) is σ(−a), without the cancellation.
            DpoLoss::ApoZero => sigmoid(chosen * -beta) + sigmoid(rejected * beta),
            DpoLoss::ApoDown => {
                sigmoid(chosen.clone() * beta) + sigmoid((chosen - rejected) * -beta)
            }
            DpoLoss::Aot { label_smoothing } => {
                let policy = self.chosen_log_probs() - self.rejected_log_probs();
                let [chosen, rejected] = [
                    (0, &self.reference.chosen, &policy),
                    (1, &self.reference.rejected, &policy),
                ]
                .map(|(side, of, like)| {
                    let weights = self.token_weights.as_ref().map(|sides| &sides[side]);
                    weighted_sums(of.beside(like), weights, of.lens())
                });
                let reference = (chosen - rejected).sort(0);
                logistic((policy.sort(0) - reference) * beta, label_smoothing)
            }
            DpoLoss::AotUnpaired { label_smoothing } => {
                logistic((chosen.sort(0) - rejected.sort(0)) * beta, label_smoothing)
            }
            DpoLoss::DiscoPop { temperature } => {
                let x = x();
                let mix = sigmoid(x.clone() * (1.0 / temperature));
                let logistic = -log_sigmoid(x.clone());
                logistic * (-mix.clone() + 1.0) + (-x).exp() * mix
            }
            DpoLoss::Sft => return None,
        })
    }
}

/// 1 for a completion's tokens up to the other one's length, α beyond.
fn tail_weights([own, other]: [&[usize]; 2], alpha: f64) -> Vec<f64> {
    let pairs = own.iter().zip(other);
    pairs
        .flat_map(|(own, other)| (0..*own).map(move |t| if t < *other { 1.0 } else { alpha }))
        .collect()
}

fn weighted_sums(values: Tensor<1>, weights: Option<&Vec<f64>>, lens: &[usize]) -> Tensor<1> {
    let values = match weights {
        None => values,
        Some(weights) => {
            let weights = segments::host(weights.clone(), &values);
            values * weights
        }
    };
    segments::sums(values, lens)
}
