//! Threads: Rayon's pool, which is Burn's too.

use rayon::prelude::*;

/// Multiply-adds below which a product is not worth the pool, whose entry costs about twenty microseconds.
const WORTH: usize = 1 << 18;

/// Threads of the pool.
pub(super) fn threads() -> usize {
    rayon::current_num_threads()
}

/// Runs `f` for each of `0..n`, on all threads if `work`, in multiply-adds or as many simple steps, is worth it.
pub(super) fn for_each(n: usize, work: usize, f: impl Fn(usize) + Send + Sync) {
    if n <= 1 || work < WORTH || threads() == 1 {
        (0..n).for_each(f);
    } else {
        (0..n).into_par_iter().with_max_len(1).for_each(f);
    }
}

/// Memory that tasks write, each its own part.
pub(super) struct Shared<T>(pub(super) *mut T);

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
    pub(super) unsafe fn at(self, index: usize) -> *mut T {
        unsafe { self.0.add(index) }
    }
}
