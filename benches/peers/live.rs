//! Live bytes of one case by a counting allocator: `peers_live CASE` answers with one line of JSON.
//!
//! A program of its own, because the counting allocator makes zeroed memory and reallocation slower.

mod case;
#[path = "../common/mod.rs"]
mod common;
mod subject;

use peak_alloc::PeakAlloc;
use serde_json::json;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Runs that are looked at.
const RUNS: usize = 3;

fn main() {
    let name = std::env::args().nth(1).expect("a case");
    let case: case::Case = name.parse().unwrap_or_else(|error| panic!("{error}"));
    if let Some(small) = case.small() {
        subject::build(&small).unwrap_or_else(|error| panic!("{error}"))();
    }
    let before = ALLOCATOR.current_usage();
    let mut run = subject::build(&case).unwrap_or_else(|error| panic!("{error}"));
    ALLOCATOR.reset_peak_usage();
    (0..RUNS).for_each(|_| run());
    let peak = ALLOCATOR.peak_usage().saturating_sub(before);
    println!("{}", json!({ "case": name, "live": peak }));
}
