//! The labelled tokens of a batch, one sequence after another.

use super::HostBatch;

/// Positions and tokens to predict there, and how many belong to each sequence.
///
/// A position is an index into the `[rows · columns]` positions of the batch, row-major: the hidden state there predicts the token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SequenceLabels {
    /// `(position, token)`, sequences one after another, each in the order of its tokens.
    pub pairs: Vec<(usize, usize)>,
    /// How many of the pairs belong to each sequence.
    pub lens: Vec<usize>,
}

impl SequenceLabels {
    /// The pairs of each sequence.
    pub fn sequences(&self) -> impl Iterator<Item = &[(usize, usize)]> {
        let mut rest = &self.pairs[..];
        self.lens.iter().map(move |&len| {
            let (sequence, after) = rest.split_at(len);
            rest = after;
            sequence
        })
    }
}

impl HostBatch {
    /// The supervised targets. A row is a sequence.
    pub fn labels(&self) -> SequenceLabels {
        let mut labels = SequenceLabels::default();
        for row in 0..self.rows {
            let before = labels.pairs.len();
            let positions = row * self.columns..(row + 1) * self.columns;
            let supervised = positions.filter(|&at| self.mask[at]);
            labels
                .pairs
                .extend(supervised.map(|at| (at, self.targets[at] as usize)));
            labels.lens.push(labels.pairs.len() - before);
        }
        labels
    }
}
