//! Which keys a query sees.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

/// The keys that each query of an attention sees: for each, a range of them.
///
/// Ranges cover causal attention, padding on either side, sequences packed beside each other and sliding windows; and a
/// kernel computes what is seen only. Cloning shares the memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visible {
    /// `[batch or 1, queries]`.
    ranges: Arc<[Range<usize>]>,
    rows: usize,
    queries: usize,
    keys: usize,
}

impl Visible {
    /// `queries` tokens that follow `past` cached ones: each sees those before it and itself.
    pub fn causal(queries: usize, past: usize) -> Self {
        Self::left_padded(&[0], queries, past)
    }

    /// As [`causal`](Self::causal), but row `b` of the batch begins with `padding[b]` tokens that nothing sees.
    pub fn left_padded(padding: &[usize], queries: usize, past: usize) -> Self {
        let row = |&pad: &usize| (past..past + queries).map(move |query| pad..query + 1);
        let ranges: Vec<_> = padding.iter().flat_map(row).collect();
        Self::of_rows(padding.len(), &ranges, queries, past + queries)
    }

    /// Any ranges of `keys` keys, `[batch or 1, queries]`, row-major. A range may be empty; of no queries there is one row.
    ///
    /// # Panics
    ///
    /// If there is not a range for each query of each row, or one goes beyond the keys.
    pub fn from_ranges(ranges: &[Range<usize>], queries: usize, keys: usize) -> Self {
        let rows = match queries {
            0 => 1,
            queries => (ranges.len() / queries).max(1),
        };
        Self::of_rows(rows, ranges, queries, keys)
    }

    fn of_rows(rows: usize, ranges: &[Range<usize>], queries: usize, keys: usize) -> Self {
        assert!(
            ranges.len() == rows * queries,
            "{} ranges for rows of {queries} queries",
            ranges.len()
        );
        let ranges = ranges.iter().map(|range| {
            assert!(
                range.is_empty() || range.end <= keys,
                "range {range:?} of {keys} keys"
            );
            if range.is_empty() {
                0..0
            } else {
                range.clone()
            }
        });
        Self {
            ranges: ranges.collect(),
            rows,
            queries,
            keys,
        }
    }

    /// Rows of the batch with ranges of their own; one if all have the same.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of queries.
    pub fn queries(&self) -> usize {
        self.queries
    }

    /// Number of keys.
    pub fn keys(&self) -> usize {
        self.keys
    }

    /// What the queries of row `batch` see, in order.
    pub fn of_row(&self, batch: usize) -> &[Range<usize>] {
        let row = batch % self.rows();
        &self.ranges[row * self.queries..][..self.queries]
    }

    /// True where a query does not see a key: `[batch or 1, 1, queries, keys]`.
    pub fn hidden(&self, device: &Device) -> Tensor<4, Bool> {
        let bounds = |of: fn(&Range<usize>) -> usize| {
            let bounds: Vec<_> = self.ranges.iter().map(|range| of(range) as i32).collect();
            let shape = [self.rows(), 1, self.queries, 1];
            Tensor::<4, Int>::from_data(TensorData::new(bounds, shape), device)
        };
        let key = Tensor::<1, Int>::arange(0..self.keys as i64, device).unsqueeze::<4>();
        let before = key.clone().lower(bounds(|range| range.start));
        before.bool_or(key.greater_equal(bounds(|range| range.end)))
    }
}
