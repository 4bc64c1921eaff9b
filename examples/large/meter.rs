//! Time, live bytes and peak bytes of each phase of the run.

use std::io::Write;
use std::time::{Duration, Instant};

use crate::ALLOCATOR;

/// What one phase took.
#[derive(Clone, Debug)]
pub struct Phase {
    /// Its name.
    pub name: String,
    /// How long it took.
    pub time: Duration,
    /// The most bytes that were live in it, of this run's.
    pub peak: usize,
    /// The bytes that were live when it ended, of this run's.
    pub live: usize,
}

/// Measures phase after phase.
pub struct Meter {
    /// What was live before the run.
    before: usize,
    /// What was measured.
    pub phases: Vec<Phase>,
}

impl Meter {
    /// Counts from what is live now.
    pub fn new() -> Self {
        Self {
            before: ALLOCATOR.current_usage(),
            phases: Vec::new(),
        }
    }

    /// Runs a phase. Its value lives on: its bytes are of those that are live afterwards.
    pub fn phase<T>(&mut self, name: impl Into<String>, run: impl FnOnce() -> T) -> T {
        let name = name.into();
        // Before it runs: the first one takes half a minute.
        print!("{name:<38}");
        std::io::stdout().flush().ok();
        ALLOCATOR.reset_peak_usage();
        let start = Instant::now();
        let value = run();
        let phase = Phase {
            name,
            time: start.elapsed(),
            peak: ALLOCATOR.peak_usage().saturating_sub(self.before),
            live: self.live(),
        };
        println!(
            " {:>8.1} s  live {:>8.3} GB  peak {:>8.3} GB",
            phase.time.as_secs_f64(),
            gb(phase.live),
            gb(phase.peak)
        );
        self.phases.push(phase);
        value
    }

    /// The bytes that are live now, of this run's.
    pub fn live(&self) -> usize {
        ALLOCATOR.current_usage().saturating_sub(self.before)
    }
}

/// Gigabytes of 10⁹.
pub fn gb(bytes: usize) -> f64 {
    bytes as f64 / 1e9
}

/// The most memory that the whole process ever held, as the system counts it, if it says.
pub fn process_peak() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(1024 * kib)
}
