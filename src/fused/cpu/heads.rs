//! Heads of queries, keys or values in whatever order they lie in memory.

/// A tensor `[batch, heads, seq, d]` whose rows of `d` values are contiguous.
#[derive(Clone, Copy)]
pub(super) struct Heads<'a, V> {
    values: &'a [V],
    /// Values from one batch row, head and token to the next.
    strides: [usize; 3],
    pub(super) batch: usize,
    pub(super) heads: usize,
    pub(super) seq: usize,
    pub(super) d: usize,
}

impl<'a, V> Heads<'a, V> {
    /// # Panics
    ///
    /// If a row lies beyond the values.
    pub(super) fn new(values: &'a [V], shape: [usize; 4], strides: [usize; 3]) -> Self {
        let [batch, heads, seq, d] = shape;
        if !shape.contains(&0) {
            let [b, h, s] = strides;
            let last = (batch - 1) * b + (heads - 1) * h + (seq - 1) * s;
            assert!(last + d <= values.len(), "heads beyond their memory");
        }
        Self {
            values,
            strides,
            batch,
            heads,
            seq,
            d,
        }
    }

    #[inline(always)]
    pub(super) fn row(&self, batch: usize, head: usize, token: usize) -> &'a [V] {
        let [b, h, s] = self.strides;
        &self.values[batch * b + head * h + token * s..][..self.d]
    }
}
