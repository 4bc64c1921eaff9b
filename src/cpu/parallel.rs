//! Threads: Rayon's pool, which is Burn's too.

use std::ops::Range;

use rayon::prelude::*;

/// Multiply-adds below which a product is not worth the pool, whose entry costs about twenty microseconds.
const WORTH: usize = 1 << 18;

/// Threads of the pool.
pub(crate) fn threads() -> usize {
    rayon::current_num_threads()
}

/// Runs `f` for each of `0..n`, on all threads if `work`, in multiply-adds or as many simple steps, is worth it.
pub(crate) fn for_each(n: usize, work: usize, f: impl Fn(usize) + Send + Sync) {
    if n <= 1 || work < WORTH || threads() == 1 {
        (0..n).for_each(f);
    } else {
        (0..n).into_par_iter().with_max_len(1).for_each(f);
    }
}

/// Memory that tasks write, each its own part.
pub(crate) struct Shared<T>(pub(crate) *mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: a pointer alone; whoever writes through it says why it may.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// # Safety
    ///
    /// Within the memory that this points to.
    #[inline(always)]
    pub(crate) unsafe fn at(self, index: usize) -> *mut T {
        unsafe { self.0.add(index) }
    }
}

/// Runs `f` for each chunk of `out`, on all threads if `work` is worth it.
pub(crate) fn for_each_chunk<T: Send>(
    out: &mut [T],
    chunk: usize,
    work: usize,
    f: impl Fn(usize, &mut [T]) + Send + Sync,
) {
    if work < WORTH || threads() == 1 {
        let chunks = out.chunks_mut(chunk).enumerate();
        chunks.for_each(|(index, out)| f(index, out));
    } else {
        let chunks = out.par_chunks_mut(chunk).enumerate();
        chunks.for_each(|(index, out)| f(index, out));
    }
}

/// Columns cut into strips, of which every thread gets about as much.
#[derive(Clone, Copy)]
pub(crate) struct Strips {
    columns: usize,
    step: usize,
    count: usize,
}

impl Strips {
    /// Strips of `most` columns or fewer, a multiple of `step`, beginning at multiples of it.
    pub(crate) fn new(columns: usize, step: usize, most: usize) -> Self {
        let steps = columns.div_ceil(step);
        let count = steps.div_ceil(most / step).max(4 * threads());
        Self {
            columns,
            step,
            count: count.next_multiple_of(threads()).min(steps),
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Columns of the widest strip, in whole steps.
    pub(crate) fn width(&self) -> usize {
        self.columns.div_ceil(self.step).div_ceil(self.count) * self.step
    }

    pub(crate) fn columns(&self, index: usize) -> Range<usize> {
        let steps = self.columns.div_ceil(self.step);
        let bound = |index: usize| (index * steps / self.count * self.step).min(self.columns);
        bound(index)..bound(index + 1)
    }
}

/// Asserts that `f` gives the same whatever the number of threads is.
#[cfg(test)]
pub(crate) fn assert_same_in_pools<T: PartialEq + Send>(name: &str, f: impl Fn() -> T + Sync) {
    let [one, three, eight] = [1, 3, 8].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().expect("a pool").install(&f)
    });
    assert!(one == three, "{name}: one thread and three");
    assert!(one == eight, "{name}: one thread and eight");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strips_are_all_of_the_columns_and_alike() {
        for columns in [1, 23, 24, 25, 512, 1000, 1408, 4096] {
            let strips = Strips::new(columns, 24, 96);
            let mut end = 0;
            for index in 0..strips.count() {
                let range = strips.columns(index);
                assert_eq!(range.start, end);
                assert!(!range.is_empty() && range.len() <= strips.width());
                assert!(range.end == columns || strips.width() - range.len() <= 24);
                end = range.end;
            }
            assert_eq!(end, columns);
            assert!(strips.width() <= 96);
        }
    }
}
