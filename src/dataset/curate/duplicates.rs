//! Texts that stand twice, exactly or nearly.

use std::collections::{HashMap, HashSet};

use super::{joined, words};
use crate::splitmix::{GOLDEN, mix};
use crate::{PeftError, Result};

/// For each text the first one with the same words in the same order, if that comes before it.
pub fn exact_duplicates<T: AsRef<str>>(texts: &[T]) -> Vec<Option<usize>> {
    let mut first = HashMap::new();
    texts
        .iter()
        .enumerate()
        .map(|(index, text)| {
            let seen = *first.entry(words(text.as_ref())).or_insert(index);
            (seen < index).then_some(seen)
        })
        .collect()
}

/// Finds texts of nearly the same words: those whose sets of word `n`-grams have a Jaccard similarity `|A ∩ B| / |A ∪ B|` of at least
/// the threshold.
///
/// MinHash finds candidates without comparing all pairs (Broder, 1997). Each of `k` hash functions takes the same minimum on two sets
/// with a probability of their similarity. The minima are cut into bands of `r`, and a pair is a candidate if a band agrees. `r` is the
/// largest number with which a pair at the threshold is missed with a probability of at most 1/1000. Candidates are then compared
/// exactly, so that nothing is called a duplicate that is none.
#[derive(Clone, Debug, PartialEq)]
pub struct NearDuplicates {
    /// The least similarity, in (0, 1]. Default: 0.8.
    pub threshold: f64,
    /// The number of words of an n-gram. A shorter text is one n-gram. Default: 5.
    pub ngram: usize,
    /// The number `k` of hash functions. Default: 128.
    pub hashes: usize,
}

impl Default for NearDuplicates {
    fn default() -> Self {
        Self {
            threshold: 0.8,
            ngram: 5,
            hashes: 128,
        }
    }
}

impl NearDuplicates {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the least similarity.
    pub fn with_threshold(mut self, threshold: f64) -> Self {
        self.threshold = threshold;
        self
    }

    /// Sets the number of words of an n-gram.
    pub fn with_ngram(mut self, ngram: usize) -> Self {
        self.ngram = ngram;
        self
    }

    /// For each text the first one that it is a near duplicate of, if that comes before it. A text without words is none.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for a threshold outside of (0, 1], n-grams of no words, no hash functions, and a threshold so low that the
    /// hash functions are too few.
    pub fn find<T: AsRef<str>>(&self, texts: &[T]) -> Result<Vec<Option<usize>>> {
        let rows = self.rows()?;
        let mut bands: HashMap<(usize, u64), Vec<usize>> = HashMap::new();
        let mut sets: Vec<HashSet<u64>> = Vec::with_capacity(texts.len());
        let mut found = Vec::with_capacity(texts.len());
        for (index, text) in texts.iter().enumerate() {
            let set = ngrams(text.as_ref(), self.ngram);
            let mut candidates: Vec<usize> = Vec::new();
            if !set.is_empty() {
                let signature: Vec<u64> = (1..=self.hashes as u64)
                    .map(|function| {
                        let key = mix(function.wrapping_mul(GOLDEN));
                        set.iter().map(|&gram| mix(gram ^ key)).min().unwrap_or(0)
                    })
                    .collect();
                for (band, values) in signature.chunks_exact(rows).enumerate() {
                    let members = bands.entry((band, joined(values))).or_default();
                    candidates.extend(members.iter());
                    members.push(index);
                }
            }
            candidates.sort_unstable();
            candidates.dedup();
            let near = |&other: &usize| similarity(&set, &sets[other]) >= self.threshold;
            found.push(candidates.into_iter().find(near));
            sets.push(set);
        }
        Ok(found)
    }

    /// How many hash values make a band.
    fn rows(&self) -> Result<usize> {
        if !(self.threshold > 0.0 && self.threshold <= 1.0) {
            return Err(PeftError::config(
                "threshold",
                self.threshold,
                "a similarity in (0, 1]",
            ));
        }
        if self.ngram == 0 {
            return Err(PeftError::config("ngram", 0, "at least 1 word"));
        }
        let missed = |rows: usize| {
            let agree = self.threshold.powi(rows as i32);
            (1.0 - agree).powi((self.hashes / rows) as i32)
        };
        let rows = (1..=self.hashes).rev().find(|&rows| missed(rows) <= 1e-3);
        rows.ok_or_else(|| {
            PeftError::config(
                "hashes",
                self.hashes,
                format!("more hash functions for a threshold of {}", self.threshold),
            )
        })
    }
}

/// The n-grams of a text; a shorter text is one.
fn ngrams(text: &str, n: usize) -> HashSet<u64> {
    let words = words(text);
    match words.len() {
        0 => HashSet::new(),
        len => words.windows(n.min(len)).map(joined).collect(),
    }
}

fn similarity(a: &HashSet<u64>, b: &HashSet<u64>) -> f64 {
    let common = a.intersection(b).count();
    common as f64 / (a.len() + b.len() - common) as f64
}
