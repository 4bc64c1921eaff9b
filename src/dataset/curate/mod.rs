//! Looks at data before training: duplicates, held-out texts that stand in the training data, lengths; and mixtures of sources.
//!
//! Words are what lies between white space and punctuation, in lower case, so that neither makes two texts different.

mod contamination;
mod duplicates;
mod lengths;
mod mixture;

pub use contamination::contamination;
pub use duplicates::{NearDuplicates, exact_duplicates};
pub use lengths::Lengths;
pub use mixture::Mixture;

use crate::splitmix::mix;

/// The words of a text as hashes of 64 bits. Two words of a data set share one with a probability of about words² / 2⁶⁵.
fn words(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(|word| {
            let letters = word.chars().flat_map(char::to_lowercase);
            letters.fold(word.len() as u64, |hash, letter| {
                mix(hash ^ u64::from(letter))
            })
        })
        .collect()
}

/// The hash of some words in their order.
fn joined(words: &[u64]) -> u64 {
    words
        .iter()
        .fold(words.len() as u64, |hash, word| mix(hash ^ word))
}
