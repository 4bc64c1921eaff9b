//! A factor of a low-rank change, as it lies.

/// A matrix of f32 in whatever order it lies in memory: element `[i, j]` is `values[i · strides[0] + j · strides[1]]`.
#[derive(Clone, Copy)]
pub(crate) struct Factor<'a> {
    values: &'a [f32],
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> Factor<'a> {
    /// # Panics
    ///
    /// If an element lies beyond the values.
    pub(crate) fn new(values: &'a [f32], shape: [usize; 2], strides: [usize; 2]) -> Self {
        let last = || {
            let of = |axis: usize| strides[axis].checked_mul(shape[axis] - 1);
            of(0)?.checked_add(of(1)?)
        };
        assert!(
            shape.contains(&0) || last().is_some_and(|last| last < values.len()),
            "a factor of {shape:?} beyond its memory"
        );
        Self {
            values,
            shape,
            strides,
        }
    }

    /// A row-major one.
    ///
    /// # Panics
    ///
    /// If there are other values than the shape says.
    pub(crate) fn row_major(values: &'a [f32], shape: [usize; 2]) -> Self {
        let strides = [shape[1], 1];
        assert_eq!(Some(values.len()), shape[0].checked_mul(shape[1]));
        Self::new(values, shape, strides)
    }

    /// Nothing of `columns` columns.
    pub(crate) fn without_rows(columns: usize) -> Self {
        Self::new(&[], [0, columns], [0, 0])
    }

    pub(crate) fn shape(&self) -> [usize; 2] {
        self.shape
    }

    #[inline(always)]
    pub(crate) fn at(&self, row: usize, column: usize) -> f32 {
        self.values[row * self.strides[0] + column * self.strides[1]]
    }

    /// The same matrix turned.
    pub(crate) fn transposed(self) -> Self {
        let [[rows, columns], [by_row, by_column]] = [self.shape, self.strides];
        Self {
            shape: [columns, rows],
            strides: [by_column, by_row],
            ..self
        }
    }

    /// All values, if they lie row-major without gaps.
    pub(crate) fn as_rows(&self) -> Option<&'a [f32]> {
        let [rows, columns] = self.shape;
        match self.strides == [columns, 1] {
            true => self.values.get(..rows * columns),
            false => None,
        }
    }
}
