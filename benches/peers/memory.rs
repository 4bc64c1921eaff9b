//! Resident memory of one case in a process of its own, as Linux counts it.
//!
//! Dense weights that exist only while a packed one is made would hide what training needs, so that two peaks are
//! given: of building, and of running what was built.

use std::fs;

use serde_json::{Value, json};

use crate::case::Case;
use crate::subject;

/// Runs that are looked at, after which a peak does not grow any more.
const RUNS: usize = 3;

/// Peaks of the resident set, less the resident set before anything is built.
///
/// # Errors
///
/// When there is no such case, or `/proc` does not tell.
pub fn measure(name: &str) -> Result<Value, String> {
    let case: Case = name.parse()?;
    if let Some(small) = case.small() {
        subject::build(&small)?();
    }
    let before = resident("VmRSS")?;
    reset_peak()?;
    let mut run = subject::build(&case)?;
    let build = resident("VmHWM")?;
    reset_peak()?;
    (0..RUNS).for_each(|_| run());
    let peak = resident("VmHWM")?;
    Ok(json!({
        "before": before,
        "build": build.saturating_sub(before),
        "peak": peak.saturating_sub(before),
    }))
}

/// A line of this process's status, in bytes.
fn resident(field: &str) -> Result<u64, String> {
    let status = fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.map(|kib| kib << 10)
        .ok_or_else(|| format!("no {field} in /proc/self/status"))
}

/// Lets the peak begin again at the present resident set.
fn reset_peak() -> Result<(), String> {
    fs::write("/proc/self/clear_refs", "5").map_err(|error| format!("clear_refs: {error}"))
}
