//! Where the rows of a product go: over what is in memory, or added to it.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use crate::cpu::parallel::Shared;
use crate::cpu::value::Value;

/// Rows of values of a dtype of their own, to which the sums of a product are rounded.
pub(crate) struct Target<'a, O> {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) place: Place<O>,
    memory: PhantomData<&'a mut O>,
}

impl<'a, O: Value> Target<'a, O> {
    /// Memory that is written, row-major.
    ///
    /// # Panics
    ///
    /// If it is not whole rows.
    pub(crate) fn new(values: &'a mut [MaybeUninit<O>], columns: usize) -> Self {
        assert!(values.len().is_multiple_of(columns), "whole rows");
        Self {
            rows: values.len() / columns,
            columns,
            place: Place {
                values: Shared(values.as_mut_ptr().cast()),
                stride: columns,
                add: false,
            },
            memory: PhantomData,
        }
    }

    /// These columns of all rows of `values`, each `stride` long: overwritten, or, if `add`, added to.
    ///
    /// # Panics
    ///
    /// If the columns are not within a row.
    pub(crate) fn window(
        values: &'a mut [O],
        stride: usize,
        columns: Range<usize>,
        add: bool,
    ) -> Self {
        assert!(columns.start <= columns.end && columns.end <= stride);
        assert!(!values.is_empty() && values.len().is_multiple_of(stride));
        Self {
            rows: values.len() / stride,
            columns: columns.len(),
            place: Place {
                values: Shared(values[columns.start..].as_mut_ptr()),
                stride,
                add,
            },
            memory: PhantomData,
        }
    }
}

/// The same for the tasks of a product, each of which writes elements of its own.
pub(super) struct Place<O> {
    values: Shared<O>,
    stride: usize,
    add: bool,
}

impl<O> Clone for Place<O> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<O> Copy for Place<O> {}

impl<O: Value> Place<O> {
    /// The same from a later row on.
    ///
    /// # Safety
    ///
    /// `row` is one of the target's.
    pub(super) unsafe fn at_row(self, row: usize) -> Self {
        // SAFETY: as asked.
        let values = Shared(unsafe { self.values.at(row * self.stride) });
        Self { values, ..self }
    }

    /// Puts a sum in its place.
    ///
    /// # Safety
    ///
    /// Within the target, at an element that no other task has.
    #[inline(always)]
    pub(super) unsafe fn put(self, row: usize, column: usize, sum: f32) {
        // SAFETY: as asked; what is added to has been written, since it came as values.
        unsafe {
            let at = self.values.at(row * self.stride + column);
            *at = match self.add {
                false => O::round(sum),
                true => O::round((*at).into() + sum),
            };
        }
    }
}
