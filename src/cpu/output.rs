//! Memory for results, without zeros written to it before.

use std::mem::MaybeUninit;

/// Vectors of these lengths, whose values `write` writes.
///
/// Zeros first would be written by one thread, where the kernel's own writes are many threads'.
///
/// # Safety
///
/// `write` writes every value.
pub(crate) unsafe fn written<T, const N: usize>(
    lengths: [usize; N],
    write: impl FnOnce([&mut [MaybeUninit<T>]; N]),
) -> [Vec<T>; N] {
    let mut vectors = lengths.map(Vec::with_capacity);
    let mut index = 0;
    write(vectors.each_mut().map(|values: &mut Vec<T>| {
        let memory = &mut values.spare_capacity_mut()[..lengths[index]];
        index += 1;
        memory
    }));
    for (values, length) in vectors.iter_mut().zip(lengths) {
        // SAFETY: there is room for so many, and the caller says that they are written.
        unsafe { values.set_len(length) };
    }
    vectors
}

/// What `write` writes over `old`, which stays where it writes nothing.
#[cfg(test)]
pub(crate) fn over<T: Copy>(
    old: T,
    len: usize,
    write: impl FnOnce(&mut [MaybeUninit<T>]),
) -> Vec<T> {
    // SAFETY: all of it is written here.
    let [values] = unsafe {
        written([len], |[memory]| {
            memory.fill(MaybeUninit::new(old));
            write(memory);
        })
    };
    values
}
