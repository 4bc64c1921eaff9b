//! Distributions against transformers' own processors (`tests/golden/sampling/generate.py`), and draws against distributions.

use std::collections::BTreeMap;

use burn_peft::rollout::{Sampler, Stop, generate};
use serde::Deserialize;

use super::logits::Scripted;

#[derive(Deserialize)]
struct Golden {
    rows: Vec<Row>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Row {
    /// None is −∞.
    logits: Vec<Option<f32>>,
    context: Vec<u32>,
}

#[derive(Deserialize)]
struct Case {
    options: Options,
    row: usize,
    probabilities: BTreeMap<u32, f64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    temperature: Option<f64>,
    top_k: Option<usize>,
    top_p: Option<f64>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
}

impl Options {
    fn sampler(&self) -> Sampler {
        Sampler {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k,
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
        }
    }
}

fn golden() -> Golden {
    let path = super::golden("sampling").join("processors.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

impl Row {
    fn logits(&self) -> Vec<f32> {
        let logits = self.logits.iter();
        logits
            .map(|logit| logit.unwrap_or(f32::NEG_INFINITY))
            .collect()
    }
}

#[test]
fn distributions_equal_transformers() {
    let golden = golden();
    assert!(golden.cases.len() >= 70);
    let mut truncated = 0;
    for case in &golden.cases {
        let row = &golden.rows[case.row];
        let distribution = case
            .options
            .sampler()
            .distribution(&row.logits(), &row.context);
        let distribution = distribution.unwrap();
        let found: Vec<(u32, f64)> = distribution.probabilities().collect();
        let expected: Vec<(u32, f64)> = case.probabilities.clone().into_iter().collect();
        let tokens = |of: &[(u32, f64)]| of.iter().map(|(token, _)| *token).collect::<Vec<_>>();
        assert_eq!(tokens(&found), tokens(&expected), "{:?}", case.options);
        truncated += usize::from(found.len() < 46);
        for ((token, found), (_, expected)) in found.iter().zip(&expected) {
            // The penalty is applied in f32, all else in f64.
            let bound = if case.options.repetition_penalty.is_some() {
                1e-6
            } else {
                1e-12
            };
            assert!(
                (found - expected).abs() <= bound,
                "{:?}, token {token}: {found}, expected {expected}",
                case.options
            );
            assert_eq!(distribution.probability(*token), *found);
        }
        assert_eq!(distribution.probability(10_000), 0.0);
    }
    assert!(truncated > 40, "{truncated}");
}

/// Inverse cumulative distribution: every token has the interval of its probability, in the order of tokens.
#[test]
fn a_draw_is_the_token_at_that_place_of_the_distribution() {
    let golden = golden();
    for case in golden
        .cases
        .iter()
        .filter(|case| case.probabilities.len() < 30)
    {
        let row = &golden.rows[case.row];
        let distribution = case
            .options
            .sampler()
            .distribution(&row.logits(), &row.context);
        let distribution = distribution.unwrap();
        let mut below = 0.0;
        for (token, probability) in distribution.probabilities() {
            let (drawn, log_prob) = distribution.draw(below + probability / 2.0);
            assert_eq!(drawn, token);
            assert!((log_prob - probability.ln()).abs() < 1e-12);
            below += probability;
        }
        assert!((below - 1.0).abs() < 1e-12);
        // The largest number below 1.
        let last = distribution.draw(1.0 - f64::EPSILON / 2.0).0;
        assert!(distribution.probability(last) > 0.0);
    }
}

#[test]
fn top_p_looks_beyond_its_first_tokens() {
    // Flat, so that top-p needs thousands of tokens; the best are the last.
    let logits: Vec<f32> = (0..5000).map(|token| token as f32 * 1e-4).collect();
    let kept = |top_p| {
        let sampler = Sampler::new().with_top_p(top_p);
        let distribution = sampler.distribution(&logits, &[]).unwrap();
        let tokens: Vec<u32> = distribution
            .probabilities()
            .map(|(token, _)| token)
            .collect();
        let sum: f64 = distribution.probabilities().map(|(_, p)| p).sum();
        assert!((sum - 1.0).abs() < 1e-9);
        assert_eq!(*tokens.last().unwrap(), 4999);
        assert!(tokens.windows(2).all(|pair| pair[0] + 1 == pair[1]));
        tokens.len()
    };
    // `Σ exp(−1e-4·i)` over the kept of 5000 is top-p of `Σ` over all.
    let expected = |top_p: f64| {
        let all = 1.0 - (-0.5_f64).exp();
        (-(1.0 - top_p * all).ln() / 1e-4).ceil() as usize
    };
    for top_p in [0.001, 0.01, 0.1, 0.5, 0.9, 0.9999] {
        assert!(
            kept(top_p).abs_diff(expected(top_p)) <= 1,
            "{top_p}: {}",
            kept(top_p)
        );
    }
}

#[test]
fn greedy_takes_the_first_of_the_best() {
    let logits = [1.0, 3.0, 3.0, f32::NEG_INFINITY];
    let distribution = Sampler::greedy().distribution(&logits, &[]).unwrap();
    assert_eq!(distribution.probabilities().collect::<Vec<_>>(), [(1, 1.0)]);
    // The penalty acts in greedy choice too, as in transformers.
    let sampler = Sampler::greedy().with_repetition_penalty(1.1);
    let distribution = sampler.distribution(&logits, &[1, 1]).unwrap();
    assert_eq!(distribution.probability(2), 1.0);
}

/// Frequencies of 8 000 draws against the exact distribution, by χ² with fixed seeds.
#[test]
fn draws_follow_the_distribution() {
    let golden = golden();
    let draws = 8_000;
    for (index, options) in [0, 1, 3]
        .map(|index| (index, &golden.cases))
        .into_iter()
        .flat_map(|(index, cases)| {
            let own = cases.iter().filter(move |case| case.row == index);
            own.map(move |case| (index, &case.options)).step_by(3)
        })
    {
        let row = &golden.rows[index];
        let logits = row.logits();
        let sampler = options.sampler();
        let distribution = sampler.distribution(&logits, &row.context).unwrap();
        let mut model = Scripted::new(logits.len(), |_, _| logits.clone());
        let prompts = [row.context.clone()];
        let stop = Stop::new(1);
        let completions = generate(&mut model, &prompts, draws, &sampler, &stop, 11).unwrap();
        let mut counts = vec![0_usize; logits.len()];
        for own in &completions {
            counts[own.tokens[0] as usize] += 1;
        }
        // Tokens that are expected fewer than 5 times count as one.
        let (mut chi_square, mut groups) = (0.0, 0);
        let (mut rare, mut rare_count) = (0.0, 0.0);
        for (token, count) in counts.iter().enumerate() {
            let probability = distribution.probability(token as u32);
            let (expected, count) = (probability * draws as f64, *count as f64);
            assert!(
                probability > 0.0 || count == 0.0,
                "{options:?}: token {token} has no chance"
            );
            match expected < 5.0 {
                true => (rare, rare_count) = (rare + expected, rare_count + count),
                false => {
                    chi_square += (count - expected).powi(2) / expected;
                    groups += 1;
                }
            }
        }
        if rare > 0.0 {
            chi_square += (rare_count - rare).powi(2) / rare.max(1.0);
            groups += 1;
        }
        // Mean `n − 1`, variance `2(n − 1)`; 5 standard deviations. The seed is fixed, so this is no gamble.
        let freedom = (groups - 1) as f64;
        let bound = freedom + 5.0 * (2.0 * freedom).sqrt();
        assert!(
            chi_square <= bound,
            "{options:?}, row {index}: {chi_square} > {bound}"
        );
        // Log-probabilities are those of the distribution, of the model, and of the model at the temperature.
        let softmax = |temperature: f64| {
            let tempered = Sampler::new().with_temperature(temperature);
            tempered.distribution(&logits, &[]).unwrap()
        };
        let (full, tempered) = (softmax(1.0), softmax(sampler.temperature));
        for own in completions.iter().step_by(97) {
            let token = own.tokens[0];
            for (found, of) in [
                (own.sampled_log_probs[0], &distribution),
                (own.log_probs[0], &full),
                (own.tempered_log_probs[0], &tempered),
            ] {
                let expected = of.probability(token).ln();
                let bound = 1e-6 * (1.0 + expected.abs());
                assert!(
                    (f64::from(found) - expected).abs() < bound,
                    "{found}, {expected}"
                );
            }
        }
    }
}
