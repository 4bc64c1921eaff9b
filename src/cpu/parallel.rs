//! Threads: Rayon's pool, which is Burn's too.

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
