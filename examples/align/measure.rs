//! What held-out questions say of a policy.

use std::collections::HashSet;
use std::error::Error;

use burn_peft::rollout::{Draws, Finish, Sampler};
use llama::estimate::Estimate;

use crate::answers::{Data, is_sentence, word_of};
use crate::policy::{self, Policy};

/// Sampled completions of each question.
const COPIES: usize = 2;

/// The numbers of one policy, by question: the sum over its completions, and their count.
#[derive(Clone, Debug, Default)]
pub struct Scores {
    /// Sampled answers that are a sentence.
    pub sentence: Vec<(f64, f64)>,
    /// Sampled answers that are right, in any form.
    pub right: Vec<(f64, f64)>,
    /// Greedy answers that are right, in any form.
    pub greedy: Vec<(f64, f64)>,
    /// `Σ_t (ℓ_t − ℓ^ref_t)` of sampled answers, in nats.
    pub kl: Vec<(f64, f64)>,
    /// Tokens of sampled answers.
    pub tokens: Vec<(f64, f64)>,
    /// Sampled answers that ended by themselves.
    pub ended: Vec<(f64, f64)>,
    /// Different texts among all sampled answers, of their count.
    pub distinct: Vec<(f64, f64)>,
    /// Loss per token of the base's own text, and tokens.
    pub text: Vec<(f64, f64)>,
}

impl Scores {
    /// The scores of several seeds as one.
    pub fn extend(&mut self, other: Self) {
        let pairs = [
            (&mut self.sentence, other.sentence),
            (&mut self.right, other.right),
            (&mut self.greedy, other.greedy),
            (&mut self.kl, other.kl),
            (&mut self.tokens, other.tokens),
            (&mut self.ended, other.ended),
            (&mut self.distinct, other.distinct),
            (&mut self.text, other.text),
        ];
        for (own, other) in pairs {
            own.extend(other);
        }
    }
}

/// Measures a policy. `seed` is that of the samples.
pub fn measure(
    policy: &Policy,
    reference: &Policy,
    data: &Data,
    seed: u64,
) -> Result<Scores, Box<dyn Error>> {
    let prompts: Vec<Vec<u32>> = data.heldout.iter().map(|own| own.prompt.clone()).collect();
    let mut scores = Scores::default();

    let draws = Draws::new(seed);
    let sampled = policy::sample(policy, &prompts, COPIES, &Sampler::new(), data, draws)?;
    let examples: Vec<_> = sampled
        .iter()
        .map(|own| policy::example(&prompts[own.prompt], &own.tokens))
        .collect::<Result<_, _>>()?;
    let new = policy::scored(policy, &examples)?;
    let old = policy::scored(reference, &examples)?;
    let mut texts = HashSet::new();
    for (question, (own, (new, old))) in sampled.iter().zip(new.iter().zip(&old)).enumerate() {
        let text = data.text_of(&own.tokens)?;
        let right = word_of(&text) == data.heldout[question / COPIES].answer;
        let kl: f64 = new.iter().zip(old).map(|(a, b)| f64::from(a - b)).sum();
        let one = |value: f64| (value, 1.0);
        scores.sentence.push(one(flag(is_sentence(&text))));
        scores.right.push(one(flag(right)));
        scores.kl.push(one(kl));
        scores.tokens.push(one(own.tokens.len() as f64));
        scores.ended.push(one(flag(own.finish == Finish::Stop)));
        texts.insert(text);
    }
    scores
        .distinct
        .push((texts.len() as f64, sampled.len() as f64));

    let greedy = policy::sample(policy, &prompts, 1, &Sampler::greedy(), data, draws)?;
    for (own, question) in greedy.iter().zip(&data.heldout) {
        let text = data.text_of(&own.tokens)?;
        scores
            .greedy
            .push((flag(word_of(&text) == question.answer), 1.0));
    }
    for row in policy::scored(policy, &data.text)? {
        let loss: f32 = row.iter().sum();
        scores.text.push((-f64::from(loss), row.len() as f64));
    }
    Ok(scores)
}

fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}

/// A mean over questions and seeds, with its 95 % interval.
pub fn estimate(pairs: &[(f64, f64)]) -> Estimate {
    // The completions of a question belong together.
    let together: Vec<(f64, f64)> = pairs
        .chunks(COPIES)
        .map(|own| {
            own.iter()
                .fold((0.0, 0.0), |sum, own| (sum.0 + own.0, sum.1 + own.1))
        })
        .collect();
    Estimate::ratio(&together)
}
