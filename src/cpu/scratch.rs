//! Memory that a thread keeps from call to call, so that no product pays for fresh pages.

use std::cell::Cell;
use std::thread::LocalKey;

use bytemuck::{Pod, Zeroable};

/// A cache line: a vector that lies across two costs twice.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

thread_local! {
    static SCRATCH: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    static OPERAND: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Runs `f` with `len` floats of no particular value, this thread's own, which begin with a cache line.
pub(crate) fn with_scratch<T>(len: usize, f: impl FnOnce(&mut [f32]) -> T) -> T {
    with(&SCRATCH, len, f)
}

/// As [`with_scratch`], for what a whole call shares while its tasks use their scratch.
pub(crate) fn with_operand<T>(len: usize, f: impl FnOnce(&mut [f32]) -> T) -> T {
    with(&OPERAND, len, f)
}

fn with<T>(
    slot: &'static LocalKey<Cell<Vec<Line>>>,
    len: usize,
    f: impl FnOnce(&mut [f32]) -> T,
) -> T {
    // Taken out rather than borrowed: a thread that waits for its tasks may begin another call in between.
    let mut memory = slot.take();
    let lines = len.div_ceil(16);
    if memory.len() < lines {
        memory.resize(lines, Line([0.0; 16]));
    }
    let result = f(&mut bytemuck::cast_slice_mut(&mut memory)[..len]);
    slot.set(memory);
    result
}
