//! Batches whose rows hold several sequences, with attention that never crosses from one to another.
//!
//! ```text
//! example  a b C $   row     a b C e F          segments  [0, 3) [3, 5)
//! example  e F $     targets b C $ F $          positions 0 1 2 0 1
//!                    mask    0 1 1 1 1          sees      0..1 0..2 0..3 3..4 3..5
//! ```
//!
//! Token and target are paired within their example, so no target crosses a boundary.

use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::preference_batch::margins;
use super::{
    Example, HostBatch, Overflow, Piece, PreferenceBatch, PreferenceExample, SequenceLabels, pack,
    pack_wrapped,
};
use crate::Result;
use crate::fused::Visible;

/// Makes batches by putting several examples into a row.
///
/// An example of `n` tokens takes `n − 1` places of a row, as its last token is only ever a target.
#[derive(Clone, Debug)]
pub struct PackedBatcher {
    pad_token: u32,
    capacity: Option<usize>,
    overflow: Overflow,
    wrapped: bool,
}

impl PackedBatcher {
    /// Rows of `capacity` places, filled best-fit decreasing ([`pack`]). What is left of a row is filled with `pad_token`, which any token
    /// of the vocabulary can be.
    pub fn new(pad_token: u32, capacity: usize) -> Self {
        Self {
            pad_token,
            capacity: Some(capacity),
            overflow: Overflow::default(),
            wrapped: false,
        }
    }

    /// All examples of a batch in one row, in their order: no padding at all.
    pub fn padding_free() -> Self {
        Self {
            pad_token: 0,
            capacity: None,
            overflow: Overflow::default(),
            wrapped: false,
        }
    }

    /// Chooses what happens to an example that is longer than a row.
    pub fn with_overflow(mut self, overflow: Overflow) -> Self {
        self.overflow = overflow;
        self
    }

    /// Cuts the stream of all examples into rows ([`pack_wrapped`]) instead of keeping examples whole.
    pub fn with_wrapped(mut self, wrapped: bool) -> Self {
        self.wrapped = wrapped;
        self
    }

    /// Decides which examples share a row. A large data set is planned once, and [`collate_rows`](Self::collate_rows) makes
    /// batches of some rows at a time.
    ///
    /// # Errors
    ///
    /// As [`pack`].
    pub fn plan(&self, examples: &[&Example]) -> Result<Vec<Vec<Piece>>> {
        let lens: Vec<usize> = examples.iter().map(|example| places(example)).collect();
        match self.capacity {
            None if lens.is_empty() => Ok(Vec::new()),
            None => pack_wrapped(&lens, lens.iter().sum()),
            Some(capacity) if self.wrapped => pack_wrapped(&lens, capacity),
            Some(capacity) => pack(&lens, capacity, self.overflow),
        }
    }

    /// Makes one batch of all `examples`.
    ///
    /// # Errors
    ///
    /// As [`pack`].
    pub fn collate(&self, examples: &[&Example]) -> Result<PackedBatch> {
        Ok(self.collate_rows(examples, &self.plan(examples)?))
    }

    /// Makes one batch of pairs. Its sequences are all preferred answers, then all others in the same order.
    ///
    /// # Errors
    ///
    /// As [`pack`], and [`PeftError::Config`](crate::PeftError::Config) when some of the pairs have a margin and others have none.
    pub fn collate_preferences(
        &self,
        pairs: &[PreferenceExample],
    ) -> Result<PreferenceBatch<PackedBatch>> {
        let chosen = pairs.iter().map(|pair| pair.chosen().example());
        let rejected = pairs.iter().map(|pair| pair.rejected().example());
        let rows: Vec<&Example> = chosen.chain(rejected).collect();
        Ok(PreferenceBatch {
            margins: margins(pairs)?,
            batch: self.collate(&rows)?,
            pairs: pairs.len(),
        })
    }

    /// Makes a batch of some rows of a [`plan`](Self::plan) for the same `examples`.
    ///
    /// # Panics
    ///
    /// If a piece is not of these examples.
    pub fn collate_rows(&self, examples: &[&Example], rows: &[Vec<Piece>]) -> PackedBatch {
        let columns = rows
            .iter()
            .map(|row| row.iter().map(Piece::len).sum())
            .max();
        let columns: usize = columns.unwrap_or(0);
        let places = rows.len() * columns;
        let pad = i64::from(self.pad_token);
        let mut packed = PackedBatch {
            batch: HostBatch {
                rows: rows.len(),
                columns,
                tokens: vec![pad; places],
                targets: vec![pad; places],
                mask: vec![false; places],
                padding: vec![true; places],
            },
            positions: vec![0; places],
            segments: Vec::new(),
        };
        for (row, pieces) in rows.iter().enumerate() {
            let mut column = 0;
            for piece in pieces {
                packed.put(row, column, examples[piece.sequence], piece);
                column += piece.len();
            }
        }
        packed
    }
}

/// How many places of a row an example takes.
fn places(example: &Example) -> usize {
    example.tokens().len() - 1
}

/// A part of an example in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedSegment {
    /// The row.
    pub row: usize,
    /// Its columns.
    pub columns: Range<usize>,
    /// The part of the example that stands there.
    pub piece: Piece,
}

/// A packed batch in plain vectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedBatch {
    /// Tokens, targets and masks, `[rows, columns]`.
    pub batch: HostBatch,
    /// Where each token stands in its segment, from 0; `[rows, columns]`, row-major.
    pub positions: Vec<i64>,
    /// The segments, row by row from the left.
    pub segments: Vec<PackedSegment>,
}

impl PackedBatch {
    fn put(&mut self, row: usize, column: usize, example: &Example, piece: &Piece) {
        let batch = &mut self.batch;
        for (offset, place) in piece.range.clone().enumerate() {
            let at = row * batch.columns + column + offset;
            batch.tokens[at] = example.tokens()[place].into();
            batch.targets[at] = example.tokens()[place + 1].into();
            batch.mask[at] = example.supervised()[place + 1];
            batch.padding[at] = false;
            self.positions[at] = offset as i64;
        }
        self.segments.push(PackedSegment {
            row,
            columns: column..column + piece.len(),
            piece: piece.clone(),
        });
    }

    /// What each query sees: the tokens of its own segment up to itself. Padding sees nothing.
    pub fn visible(&self) -> Visible {
        self.visible_within(usize::MAX)
    }

    /// As [`visible`](Self::visible), and no more than `window` tokens, itself included: sliding-window attention.
    pub fn visible_within(&self, window: usize) -> Visible {
        let (rows, columns) = (self.batch.rows, self.batch.columns);
        let mut ranges = vec![0..0; rows * columns];
        for PackedSegment {
            row,
            columns: segment,
            ..
        } in &self.segments
        {
            for query in segment.clone() {
                let start = segment.start.max((query + 1).saturating_sub(window));
                ranges[row * columns + query] = start..query + 1;
            }
        }
        Visible::from_ranges(&ranges, columns, columns)
    }

    /// [`positions`](Self::positions) on a device, `[rows, columns]`.
    pub fn positions_on(&self, device: &Device) -> Tensor<2, Int> {
        let shape = [self.batch.rows, self.batch.columns];
        Tensor::from_data(TensorData::new(self.positions.clone(), shape), device)
    }

    /// The examples that have a part in this batch, in ascending order.
    pub fn sequences(&self) -> Vec<usize> {
        let mut sequences: Vec<_> = self.segments.iter().map(|s| s.piece.sequence).collect();
        sequences.sort_unstable();
        sequences.dedup();
        sequences
    }

    /// The supervised targets by example, in the order of [`sequences`](Self::sequences). The parts of a split example come in order.
    pub fn labels(&self) -> SequenceLabels {
        let mut segments: Vec<_> = self.segments.iter().collect();
        segments.sort_by_key(|s| (s.piece.sequence, s.piece.range.start));
        let mut labels = SequenceLabels::default();
        let mut last = None;
        for segment in segments {
            let before = labels.pairs.len();
            let positions = segment.columns.clone();
            for at in positions.map(|column| segment.row * self.batch.columns + column) {
                if self.batch.mask[at] {
                    labels.pairs.push((at, self.batch.targets[at] as usize));
                }
            }
            let count = labels.pairs.len() - before;
            match labels.lens.last_mut() {
                Some(len) if last == Some(segment.piece.sequence) => *len += count,
                _ => labels.lens.push(count),
            }
            last = Some(segment.piece.sequence);
        }
        labels
    }
}
