//! Padded batches of pairs and of judged answers.

use super::{Example, FeedbackExample, HostBatch, PaddedBatcher, PreferenceExample};
use crate::{PeftError, Result};

/// Pairs as one batch: all preferred answers, then all others in the same order. `B` is [`HostBatch`] or
/// [`PackedBatch`](super::PackedBatch).
#[derive(Clone, Debug, PartialEq)]
pub struct PreferenceBatch<B = HostBatch> {
    /// `2 · pairs` sequences: rows of their own, or segments of rows.
    pub batch: B,
    /// How many pairs there are.
    pub pairs: usize,
    /// The margin of each pair, if the data has margins.
    pub margins: Option<Vec<f32>>,
}

/// Judged answers as one batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeedbackBatch {
    /// A row each.
    pub batch: HostBatch,
    /// Whether each answer is desirable.
    pub labels: Vec<bool>,
    /// Every prompt with the answer to the prompt before it, the first with the last answer: what KTO estimates the KL divergence on
    /// (Ethayarajh et al., 2024).
    pub mismatched: HostBatch,
}

impl PaddedBatcher {
    /// Makes a batch of pairs: row `i` is the preferred answer of pair `i`, row `pairs + i` the other one.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] when some of the pairs have a margin and others have none.
    pub fn collate_preferences(&self, pairs: &[PreferenceExample]) -> Result<PreferenceBatch> {
        let chosen = pairs.iter().map(|pair| pair.chosen().example());
        let rejected = pairs.iter().map(|pair| pair.rejected().example());
        let rows: Vec<&Example> = chosen.chain(rejected).collect();
        Ok(PreferenceBatch {
            margins: margins(pairs)?,
            batch: self.collate_refs(&rows),
            pairs: pairs.len(),
        })
    }

    /// Makes a batch of judged answers, and one of prompts with another prompt's answer.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for fewer than two answers: the only answer would be compared with itself.
    pub fn collate_feedback(&self, answers: &[FeedbackExample]) -> Result<FeedbackBatch> {
        if answers.len() < 2 {
            return Err(PeftError::config(
                "answers",
                answers.len(),
                "at least 2 in a batch: the KL divergence is estimated on each prompt with the answer to another one",
            ));
        }
        let rows: Vec<&Example> = answers.iter().map(|a| a.answer().example()).collect();
        let others = answers.iter().cycle().skip(answers.len() - 1);
        let mismatched: Result<Vec<Example>> = answers
            .iter()
            .zip(others)
            .map(|(own, other)| {
                let (own, other) = (own.answer(), other.answer());
                let supervised = &other.example().supervised()[other.prompt().len()..];
                Example::new(
                    [own.prompt(), other.response()].concat(),
                    [&vec![false; own.prompt().len()], supervised].concat(),
                )
            })
            .collect();
        Ok(FeedbackBatch {
            batch: self.collate_refs(&rows),
            labels: answers.iter().map(FeedbackExample::label).collect(),
            mismatched: self.collate(&mismatched?),
        })
    }
}

/// The margins of all pairs, or of none.
pub(super) fn margins(pairs: &[PreferenceExample]) -> Result<Option<Vec<f32>>> {
    let margins: Vec<f32> = pairs.iter().filter_map(PreferenceExample::margin).collect();
    if margins.is_empty() {
        return Ok(None);
    }
    if margins.len() != pairs.len() {
        return Err(PeftError::config(
            "margin",
            format!("given for {} of {} pairs", margins.len(), pairs.len()),
            "a margin for every pair of a batch or for none: 0 is the margin of a pair without one",
        ));
    }
    Ok(Some(margins))
}
