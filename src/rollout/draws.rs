//! Which random numbers a completion has.

use crate::splitmix::{GOLDEN, Stream, mix};

/// Where in a run completions are sampled: the random numbers of each follow from this and from its place alone.
///
/// A seed converts: `generate(.., 7)`. A training loop gives its step, so that every step draws anew and a resumed run draws as the
/// uninterrupted one. Where the prompts or copies of one step are spread over several calls, the first numbers say which these are, and
/// the texts are those of one call.
///
/// The values are the same on every platform and in every version of this crate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Draws {
    /// The seed of the run.
    pub seed: u64,
    /// The step of training.
    pub step: u64,
    /// The number of the first prompt of the call among those of the step.
    pub first_prompt: u64,
    /// The number of the first copy of each prompt.
    pub first_copy: u64,
}

impl Draws {
    /// Draws of this seed at step 0.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            ..Self::default()
        }
    }

    /// Draws at another step of training.
    pub fn with_step(mut self, step: u64) -> Self {
        self.step = step;
        self
    }

    /// The prompts of the call are those from this number on.
    pub fn with_first_prompt(mut self, first_prompt: u64) -> Self {
        self.first_prompt = first_prompt;
        self
    }

    /// The copies of the call are those from this number on.
    pub fn with_first_copy(mut self, first_copy: u64) -> Self {
        self.first_copy = first_copy;
        self
    }

    /// The random numbers of one completion of the call.
    pub(super) fn stream(&self, prompt: usize, copy: usize) -> Uniform {
        let words = [
            self.step,
            self.first_prompt.wrapping_add(prompt as u64),
            self.first_copy.wrapping_add(copy as u64),
        ];
        // For a given prefix of words, different next words lead to different states: each line is a bijection of its word.
        let state = words.into_iter().fold(mix(self.seed), |state, word| {
            mix(state ^ mix(word.wrapping_add(GOLDEN)))
        });
        Uniform(Stream(state))
    }
}

impl From<u64> for Draws {
    fn from(seed: u64) -> Self {
        Self::new(seed)
    }
}

/// Random numbers in `[0, 1)`, one for each token.
pub(super) struct Uniform(Stream);

impl Uniform {
    pub(super) fn next(&mut self) -> f64 {
        (self.0.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// A change here would change the texts of every run that is resumed. From an implementation in Python, written after the sources.
    #[test]
    fn values_stay_what_they_are() {
        let mut stream = Draws::new(42).with_step(7).stream(3, 1);
        assert_eq!(
            [stream.next(), stream.next()],
            [0.2235332443822322, 0.35586918013180346]
        );
    }

    #[test]
    fn every_place_has_numbers_of_its_own() {
        let mut seen = HashSet::new();
        for (seed, step) in (0..4).flat_map(|seed| (0..4).map(move |step| (seed, step))) {
            for (prompt, copy) in (0..16).flat_map(|prompt| (0..16).map(move |copy| (prompt, copy)))
            {
                let draws = Draws::new(seed).with_step(step);
                assert!(seen.insert(draws.stream(prompt, copy).next().to_bits()));
            }
        }
    }

    #[test]
    fn the_first_numbers_shift_the_places() {
        let all = Draws::new(5);
        let part = all.with_first_prompt(8).with_first_copy(2);
        assert_eq!(part.stream(1, 3).next(), all.stream(9, 5).next());
    }
}
