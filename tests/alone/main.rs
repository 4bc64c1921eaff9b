//! Tests that need a process to themselves, one after the other: they count the bytes that the process allocates, or seed the
//! random numbers of Flex, which has one generator per process.

mod checkpointing;
mod head_memory;
mod load_memory;
mod memory_plan;
mod optimizer_memory;
mod resume;
mod training_memory;

use std::process::Command;
use std::sync::{Mutex, PoisonError};

use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Set in a child process to the name of the test that it runs.
const CHILD: &str = "BURN_PEFT_TEST_ALONE";

/// Whether this process is the one in which `test` runs alone. In any other process, starts that one and waits for it.
///
/// ```ignore
/// #[test]
/// fn name() {
///     if !alone(name) {
///         return;
///     }
///     // The test.
/// }
/// ```
///
/// # Panics
///
/// Panics if the test fails in its process.
fn alone<T: Fn()>(_test: T) -> bool {
    static TURN: Mutex<()> = Mutex::new(());
    // The path of the function, after the name of the crate.
    let (_, name) = std::any::type_name::<T>().split_once("::").unwrap();
    if std::env::var_os(CHILD).is_some_and(|child| child == name) {
        return true;
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let output = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(CHILD, name)
        .output()
        .unwrap();
    print!("{}", String::from_utf8_lossy(&output.stdout));
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "`{name}` failed in its process");
    false
}
