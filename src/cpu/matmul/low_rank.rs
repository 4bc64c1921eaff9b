//! A low-rank term that a product may end with: `u · v`, in f32, added to the sums before they are rounded.

/// `u [rows, rank]` times `v [rank, columns]`, both row-major.
#[derive(Clone, Copy)]
pub(crate) struct LowRank<'a> {
    pub(crate) rank: usize,
    pub(crate) u: &'a [f32],
    pub(crate) v: &'a [f32],
}

impl<'a> LowRank<'a> {
    /// Nothing to add.
    pub(crate) const NONE: Self = LowRank {
        rank: 0,
        u: &[],
        v: &[],
    };

    /// # Panics
    ///
    /// If the factors have other lengths.
    pub(crate) fn check(&self, rows: usize, columns: usize) {
        let expected = (rows * self.rank, self.rank * columns);
        assert_eq!((self.u.len(), self.v.len()), expected, "a low-rank term");
    }

    /// The term of `count` rows from `first` on.
    pub(crate) fn rows(self, first: usize, count: usize) -> Self {
        Self {
            u: &self.u[first * self.rank..][..count * self.rank],
            ..self
        }
    }
}
