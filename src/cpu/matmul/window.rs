//! Some rows and columns of a weight, which is not copied.

use std::ops::Range;

use super::Source;
use super::element::Element;
use crate::cpu::simd::Simd;

/// A part of a weight, itself a weight.
#[derive(Clone, Copy)]
pub(crate) struct Window<W> {
    source: W,
    first: [usize; 2],
    shape: [usize; 2],
    /// Length of a row of the whole.
    stride: usize,
}

impl<W> Window<W> {
    /// `rows` by `columns` of a weight of `shape`.
    ///
    /// # Panics
    ///
    /// If they are not within it.
    pub(crate) fn new(
        source: W,
        shape: [usize; 2],
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> Self {
        assert!(
            rows.end <= shape[0] && columns.end <= shape[1],
            "a window of a weight"
        );
        Self {
            source,
            first: [rows.start, columns.start],
            shape: [rows.len(), columns.len()],
            stride: shape[1],
        }
    }

    #[inline(always)]
    fn of_whole(&self, range: Range<usize>) -> Range<usize> {
        let (row, column) = (range.start / self.shape[1], range.start % self.shape[1]);
        let start = (self.first[0] + row) * self.stride + self.first[1] + column;
        start..start + range.len()
    }
}

impl<E: Element, W: Source<E>> Source<E> for Window<W> {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    #[inline(always)]
    unsafe fn run<S: Simd>(&self, range: Range<usize>, out: &mut [f32]) {
        // SAFETY: as asked; the range is within one row, here as there.
        unsafe { self.source.run::<S>(self.of_whole(range), out) }
    }

    #[inline(always)]
    unsafe fn runs<S: Simd>(&self, range: Range<usize>, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { self.source.runs::<S>(self.of_whole(range), out) }
    }
}
