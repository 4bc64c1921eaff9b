//! Which positions of hidden states predict which tokens, sequence by sequence.

use std::sync::Arc;

use burn::tensor::{Bool, Int, Tensor};

use super::sft::read_labels;
use crate::dataset::SequenceLabels;
use crate::{PeftError, Result};

/// Tokens are below this: devices hold them as 32-bit integers. The vocabulary is known later.
const TOKEN_LIMIT: usize = 1 << 31;

/// The labelled positions of a batch, sequence by sequence: at each the token that follows.
///
/// A sequence is what a preference or a reward is about: the response of one row of a padded batch, or one segment of a packed row.
/// It has at least one label, so that no mean over its tokens divides by zero. A position may have labels in several sequences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    /// `(position, token)`.
    labels: Vec<(usize, usize)>,
    lens: Arc<[usize]>,
}

impl Labels {
    /// One sequence for each row of a padded batch: the positions where `mask [batch, seq]` is true, whose tokens are in `targets [batch,
    /// seq]` (the token that follows each position), as [`Batch`](crate::dataset::Batch) has them. Reads both back from their device.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] that names a row without a label; [`PeftError::Shape`] where the shapes differ; [`PeftError::TokenRange`] for a
    /// negative target; [`PeftError::DeviceRead`] when the device fails.
    pub fn from_mask(targets: Tensor<2, Int>, mask: Tensor<2, Bool>) -> Result<Self> {
        let [batch, seq] = targets.dims();
        let labels = read_labels(targets, mask, [batch, seq], TOKEN_LIMIT)?;
        let mut sequences = vec![Vec::new(); batch];
        for (position, token) in labels {
            sequences[position / seq].push((position, token));
        }
        Self::from_sequences(&sequences)
    }

    /// The sequences of a batch on the host, padded or packed, as [`HostBatch::labels`](crate::dataset::HostBatch::labels) and the batches of
    /// preferences have them.
    ///
    /// # Errors
    ///
    /// As [`from_sequences`](Self::from_sequences).
    pub fn of(labels: &SequenceLabels) -> Result<Self> {
        let sequences: Vec<_> = labels.sequences().map(<[_]>::to_vec).collect();
        Self::from_sequences(&sequences)
    }

    /// Sequences of `(position, token)`, the positions counted over `[batch, seq]`, row-major. The token is that which follows the position.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] that names a sequence without a label, and for no sequence at all.
    pub fn from_sequences(sequences: &[Vec<(usize, usize)>]) -> Result<Self> {
        if sequences.is_empty() {
            return Err(PeftError::config("labels", "no sequence", "at least one"));
        }
        if let Some(index) = sequences.iter().position(Vec::is_empty) {
            return Err(PeftError::config(
                format!("labels of sequence {index}"),
                "no token",
                "at least one: leave out what has an empty response, and check that the limit of tokens does not cut responses off",
            ));
        }
        Ok(Self {
            labels: sequences.concat(),
            lens: sequences.iter().map(Vec::len).collect(),
        })
    }

    /// Labels of each sequence; at least one.
    pub fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// Labels in all.
    pub fn tokens(&self) -> usize {
        self.labels.len()
    }

    /// The labelled tokens, sequence by sequence.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.labels.iter().map(|&(_, token)| token as u32)
    }

    pub(super) fn shared_lens(&self) -> Arc<[usize]> {
        self.lens.clone()
    }

    /// The labels, whose positions are among `batch · seq` and whose tokens are of the vocabulary.
    pub(super) fn checked(
        &self,
        [batch, seq]: [usize; 2],
        vocabulary: usize,
    ) -> Result<Vec<(usize, usize)>> {
        for &(position, token) in &self.labels {
            if position >= batch * seq {
                return Err(PeftError::config(
                    "labels",
                    format!("position {position}"),
                    format!("a position of the {batch} x {seq} hidden states"),
                ));
            }
            if token >= vocabulary {
                return Err(PeftError::TokenRange {
                    token: token as i64,
                    row: position / seq,
                    column: position % seq,
                    vocabulary,
                });
            }
        }
        Ok(self.labels.clone())
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn labels_are_those_of_the_mask() {
        let device = Device::default();
        let targets = Tensor::<2, Int>::from_data([[5, 6, 7], [8, 9, 10]], &device);
        let mask =
            Tensor::<2, Bool>::from_data([[false, true, true], [true, false, false]], &device);
        let labels = Labels::from_mask(targets.clone(), mask).unwrap();
        assert_eq!(labels.lens(), [2, 1]);
        let expected = Labels::from_sequences(&[vec![(1, 6), (2, 7)], vec![(3, 8)]]).unwrap();
        assert_eq!(labels, expected);
        assert_eq!(labels.iter().collect::<Vec<_>>(), [6, 7, 8]);

        let mask = Tensor::<2, Bool>::from_data([[false, true, true], [false; 3]], &device);
        let error = Labels::from_mask(targets, mask).unwrap_err().to_string();
        assert!(error.contains("sequence 1"), "{error}");
    }

    #[test]
    fn labels_outside_of_the_batch_or_the_vocabulary_are_refused() {
        let labels = Labels::from_sequences(&[vec![(1, 6)], vec![(5, 3)]]).unwrap();
        assert!(labels.checked([2, 3], 7).is_ok());
        let error = labels.checked([2, 3], 6).unwrap_err();
        assert!(matches!(
            error,
            PeftError::TokenRange {
                token: 6,
                row: 0,
                column: 1,
                ..
            }
        ));
        let error = labels.checked([1, 5], 7).unwrap_err().to_string();
        assert!(error.contains("position 5"), "{error}");
    }
}
