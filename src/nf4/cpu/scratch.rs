//! Memory that a thread keeps from call to call, so that no product pays for fresh pages.

use std::cell::Cell;

thread_local! {
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static OPERAND: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Runs `f` with `len` floats of no particular value, this thread's own.
pub(super) fn with_scratch<T>(len: usize, f: impl FnOnce(&mut [f32]) -> T) -> T {
    with(&SCRATCH, len, f)
}

/// As [`with_scratch`], for what a whole call shares while its tasks use their scratch.
pub(super) fn with_operand<T>(len: usize, f: impl FnOnce(&mut [f32]) -> T) -> T {
    with(&OPERAND, len, f)
}

fn with<T>(
    slot: &'static std::thread::LocalKey<Cell<Vec<f32>>>,
    len: usize,
    f: impl FnOnce(&mut [f32]) -> T,
) -> T {
    // Taken out rather than borrowed: a thread that waits for its tasks may begin another call in between.
    let mut memory = slot.take();
    if memory.len() < len {
        memory.resize(len, 0.0);
    }
    let result = f(&mut memory[..len]);
    slot.set(memory);
    result
}
