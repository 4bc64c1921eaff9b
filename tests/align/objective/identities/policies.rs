//! Losses of policies, and the estimators of a divergence.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Tensor};
use burn_peft::objective::policy::{
    Aggregate, KlEstimator, KlPenalty, Level, PolicyBatch, PolicyConfig, Surrogate, policy_loss,
};
use burn_peft::objective::{LogProbs, Ragged};
use proptest::prelude::*;

use super::{assert_all_near, assert_near, golden, gradient, known, near, rows, tracked};
use crate::objective::golden::Rows;

/// The loss, and its gradient at the policy's log-probabilities.
fn loss(new: &Rows, old: &Rows, advantages: &[f32], config: &PolicyConfig) -> (f64, Vec<f64>) {
    let (leaf, new) = tracked(new);
    let advantages = Ragged::spread(advantages, new.lens().to_vec()).unwrap();
    let old = known(old);
    let batch = PolicyBatch::new(&new, &old, &advantages).unwrap();
    let loss = policy_loss(&batch, config).unwrap().mean();
    (golden::scalar(&loss), gradient(&loss, &leaf))
}

/// Log-probabilities, those of an older policy near them, and one advantage for each sequence.
fn batches(lens: impl Strategy<Value = Rows>) -> impl Strategy<Value = (Rows, Rows, Vec<f32>)> {
    lens.prop_flat_map(|new| {
        let advantages = prop::collection::vec(-2.0f32..2.0, new.len());
        (Just(new.clone()), near(&new, 0.6), advantages)
    })
}

/// Rows of one length.
fn equal_rows(tokens: usize) -> impl Strategy<Value = Rows> {
    prop::collection::vec(prop::collection::vec(-4.0..-0.01, tokens), 2..5)
}

fn surrogates() -> Vec<Surrogate> {
    vec![
        Surrogate::clip(0.2, 0.28),
        PolicyConfig::cispo().surrogate,
        PolicyConfig::sapo().surrogate,
        Surrogate::Reinforce,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Sequences of one length have one mean over tokens, however it is taken.
    #[test]
    fn aggregates_of_equal_lengths((new, old, advantages) in batches(equal_rows(3))) {
        for surrogate in surrogates() {
            let config = PolicyConfig::new().with_surrogate(surrogate);
            let dapo = loss(&new, &old, &advantages, &config);
            for aggregate in [Aggregate::SequenceMean, Aggregate::Constant(3)] {
                let other = loss(&new, &old, &advantages, &config.with_aggregate(aggregate));
                assert_near(other.0, dapo.0, 1e-12);
                assert_all_near(&other.1, &dapo.1, 1e-12);
            }
            let sums = loss(&new, &old, &advantages, &config.with_aggregate(Aggregate::SequenceSum));
            assert_near(sums.0, 3.0 * dapo.0, 1e-12);
        }
    }

    /// Of sequences of one token, the ratio of a sequence is that of its token.
    #[test]
    fn levels_of_single_tokens((new, old, advantages) in batches(equal_rows(1))) {
        for surrogate in surrogates() {
            let config = PolicyConfig::grpo().with_surrogate(surrogate);
            let tokens = loss(&new, &old, &advantages, &config);
            for level in [Level::Sequence, Level::SequenceSum] {
                let other = loss(&new, &old, &advantages, &config.with_level(level));
                assert_near(other.0, tokens.0, 1e-12);
                assert_all_near(&other.1, &tokens.1, 1e-12);
            }
        }
    }

    /// On the first step the ratios are 1: nothing is clipped, the value is −A, the gradient that of −A·ℓ.
    #[test]
    fn the_first_step((new, _, advantages) in batches(rows(1..5))) {
        let config = PolicyConfig::grpo();
        let (value, gradient) = loss(&new, &new, &advantages, &config);
        let mean = advantages.iter().map(|a| f64::from(*a)).sum::<f64>() / advantages.len() as f64;
        assert_near(value, -mean, 1e-12);
        let reinforce = loss(&new, &new, &advantages, &config.with_surrogate(Surrogate::Reinforce));
        assert_all_near(&gradient, &reinforce.1, 1e-12);
        let policy = known(&new);
        let spread = Ragged::spread(&advantages, policy.lens().to_vec()).unwrap();
        let batch = PolicyBatch::new(&policy, &policy, &spread).unwrap();
        let metrics = policy_loss(&batch, &config).unwrap().metrics().unwrap();
        prop_assert_eq!((metrics.clip_fraction, metrics.ratio_mean, metrics.ratio_max), (0.0, 1.0, 1.0));
        prop_assert_eq!(metrics.approx_kl, 0.0);
    }

    /// Without advantages there is no gradient.
    #[test]
    fn no_advantage((new, old, advantages) in batches(rows(1..5))) {
        let zero = vec![0.0; advantages.len()];
        for surrogate in surrogates() {
            let (value, gradient) = loss(&new, &old, &zero, &PolicyConfig::new().with_surrogate(surrogate));
            prop_assert_eq!(value, 0.0);
            prop_assert!(gradient.iter().all(|g| *g == 0.0));
        }
    }

    /// Any split into micro-batches has the gradient of the whole, for every aggregate.
    #[test]
    fn splits_of_a_batch((new, old, advantages) in batches(rows(2..6)), cut in 1usize..5) {
        let cut = cut.min(new.len() - 1);
        let tokens: usize = new.iter().map(Vec::len).sum();
        for aggregate in [Aggregate::TokenMean, Aggregate::SequenceMean, Aggregate::SequenceSum, Aggregate::Constant(6)] {
            let config = PolicyConfig::new()
                .with_aggregate(aggregate)
                .with_kl(KlPenalty::new(0.1))
                .with_entropy_coef(0.1);
            let part = |range: std::ops::Range<usize>, total: Option<usize>| {
                let (leaf, policy) = tracked(&new[range.clone()].to_vec());
                let policy = policy.with_entropy(leaf.clone().square()).unwrap();
                let sampler = known(&old[range.clone()].to_vec());
                let spread = Ragged::spread(&advantages[range], policy.lens().to_vec()).unwrap();
                let batch = PolicyBatch::new(&policy, &sampler, &spread)
                    .and_then(|batch| batch.with_reference(&sampler))
                    .unwrap();
                let loss = policy_loss(&batch, &config).unwrap();
                let part = match total {
                    None => loss.mean(),
                    Some(total) => loss.over(total, tokens).unwrap(),
                };
                (loss.policy.count, golden::scalar(&part), gradient(&part, &leaf))
            };
            let whole = part(0..new.len(), None);
            let [first, second] = [0..cut, cut..new.len()].map(|range| part(range, Some(whole.0)));
            prop_assert_eq!(first.0 + second.0, whole.0);
            assert_near(first.1 + second.1, whole.1, 1e-12);
            assert_all_near(&[first.2, second.2].concat(), &whole.2, 1e-12);
        }
    }

    /// k2 and k3 are never negative, on the host and as tensors.
    #[test]
    fn estimates_are_not_negative(d in -30.0f64..30.0) {
        for estimator in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3] {
            let value = estimator.value(d);
            prop_assert!(estimator == KlEstimator::K1 || value >= 0.0);
            let tensor = estimator.tensor(golden::constant(&vec![vec![d]], DType::F64));
            assert_near(golden::scalar(&tensor), value, 1e-12);
        }
    }

    /// By enumeration of a vocabulary: E k1 = E k3 = KL(π‖π_ref); and the gradient of E[ρ·k3], on samples of an older policy, is that of
    /// KL(π‖π_ref).
    #[test]
    fn estimates_by_enumeration(logits in [prop::array::uniform5(-2.0f64..2.0), prop::array::uniform5(-2.0f64..2.0), prop::array::uniform5(-2.0f64..2.0)]) {
        let [new, reference, old] = logits.map(|logits| golden::leaf(&vec![logits.to_vec()], DType::F64));
        let log_probs = log_softmax(new.clone(), 0);
        let [reference, old] = [reference, old].map(|x| log_softmax(x, 0).detach());
        let d = log_probs.clone() - reference.clone();
        let exact = (log_probs.clone().exp() * d.clone()).sum();
        let kl = golden::scalar(&exact);
        let expectation = |values: Tensor<1>| golden::scalar(&(log_probs.clone().exp() * values).sum());
        for estimator in [KlEstimator::K1, KlEstimator::K3] {
            assert_near(expectation(estimator.tensor(d.clone())), kl, 1e-12);
        }
        let expected = gradient(&exact, &new);

        // The loss itself, of one token after another, weighted by the probability that the older policy sampled it.
        let none = Ragged::spread(&[0.0], [1]).unwrap();
        let probabilities = golden::values(&old.clone().exp());
        let mut sums = vec![0.0; 5];
        for (token, probability) in probabilities.iter().enumerate() {
            let single = |l: Tensor<1>| LogProbs::new(l.narrow(0, token, 1), [1]).unwrap();
            let own = single(log_softmax(new.clone(), 0));
            let [old, reference] = [&old, &reference].map(|l| single(l.clone()));
            let batch = PolicyBatch::new(&own, &old, &none)
                .and_then(|batch| batch.with_reference(&reference))
                .unwrap();
            let loss = policy_loss(&batch, &PolicyConfig::new().with_kl(KlPenalty::new(1.0))).unwrap();
            for (sum, g) in sums.iter_mut().zip(gradient(&loss.mean(), &new)) {
                *sum += probability * g;
            }
        }
        assert_all_near(&sums, &expected, 1e-9);
    }
}
