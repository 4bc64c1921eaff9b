//! Memory that a thread keeps from call to call, so that no product pays for fresh pages. What is larger than a thread may keep is
//! given back when the call ends.

use std::cell::Cell;
use std::thread::LocalKey;

use bytemuck::{Pod, Zeroable};

/// A cache line: a vector that lies across two costs twice.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Bytes of scratch that a thread keeps, at most, and of operands.
const KEPT_SCRATCH: usize = 8 << 20;
const KEPT_OPERAND: usize = 16 << 20;

thread_local! {
    static SCRATCH: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    static OPERAND: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Runs `f` with `len` floats of no particular value, this thread's own, which begin with a cache line.
pub(crate) fn with_scratch<T>(len: usize, f: impl FnOnce(&mut [f32]) -> T) -> T {
    with(&SCRATCH, KEPT_SCRATCH, len, f)
}

/// As [`with_scratch`], for what a whole call shares while its tasks use their scratch.
pub(crate) fn with_operand<T>(len: usize, f: impl FnOnce(&mut [f32]) -> T) -> T {
    with(&OPERAND, KEPT_OPERAND, len, f)
}

fn with<T>(
    slot: &'static LocalKey<Cell<Vec<Line>>>,
    kept: usize,
    len: usize,
    f: impl FnOnce(&mut [f32]) -> T,
) -> T {
    let lines = len.div_ceil(16);
    let is_kept = lines * size_of::<Line>() <= kept;
    // Taken out rather than borrowed: a thread that waits for its tasks may begin another call in between.
    let mut memory = match is_kept {
        true => slot.take(),
        false => Vec::new(),
    };
    if memory.len() < lines {
        // Not more than is asked for, as a vector that grows would have it.
        memory = bytemuck::zeroed_vec(lines);
    }
    let result = f(&mut bytemuck::cast_slice_mut(&mut memory)[..len]);
    if is_kept {
        slot.set(memory);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(slot: &'static LocalKey<Cell<Vec<Line>>>) -> usize {
        let memory = slot.take();
        let bytes = memory.capacity() * size_of::<Line>();
        slot.set(memory);
        bytes
    }

    #[test]
    fn a_thread_keeps_no_more_than_it_may() {
        for (slot, most) in [(&SCRATCH, KEPT_SCRATCH), (&OPERAND, KEPT_OPERAND)] {
            for len in [17, most / 4, most / 4 + 1, 10 * most / 4] {
                with(slot, most, len, |memory| {
                    assert_eq!(memory.len(), len);
                    memory.fill(1.0);
                });
                assert!(kept(slot) <= most, "{} bytes", kept(slot));
            }
            assert_eq!(kept(slot), most);
        }
    }
}
