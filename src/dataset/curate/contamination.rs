//! Held-out texts that stand in the training data.

use std::collections::HashSet;

use super::{joined, words};
use crate::{PeftError, Result};

/// The share of each held-out text's word `n`-grams that occur in the training data; none for a text of fewer than `n` words, which
/// cannot be judged. GPT-3's authors took `n` = 13 and called a text with any such n-gram contaminated (Brown et al., 2020).
///
/// # Errors
///
/// [`PeftError::Config`] for n-grams of no words.
pub fn contamination<T: AsRef<str>, H: AsRef<str>>(
    training: impl IntoIterator<Item = T>,
    held_out: &[H],
    n: usize,
) -> Result<Vec<Option<f64>>> {
    if n == 0 {
        return Err(PeftError::config("n", 0, "at least 1 word"));
    }
    // What is held out is small, the training data perhaps not: it may stream by.
    let grams: Vec<Vec<u64>> = held_out
        .iter()
        .map(|text| words(text.as_ref()).windows(n).map(joined).collect())
        .collect();
    let wanted: HashSet<u64> = grams.iter().flatten().copied().collect();
    let mut seen = HashSet::new();
    for text in training {
        let found = words(text.as_ref());
        seen.extend(
            found
                .windows(n)
                .map(joined)
                .filter(|gram| wanted.contains(gram)),
        );
    }
    Ok(grams
        .iter()
        .map(|grams| {
            let common = grams.iter().filter(|gram| seen.contains(gram)).count();
            (!grams.is_empty()).then(|| common as f64 / grams.len() as f64)
        })
        .collect())
}
