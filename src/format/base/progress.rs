//! How far loading is: tensors, bytes, rate.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::options::OnProgress;

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Tensors that are done.
    pub tensors: usize,
    /// Tensors in all.
    pub total_tensors: usize,
    /// Bytes read from the files.
    pub bytes: u64,
    /// Bytes to be read in all.
    pub total_bytes: u64,
    /// Time since loading began.
    pub elapsed: Duration,
}

impl LoadProgress {
    /// Bytes read per second so far.
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Counts what was read, by any thread, and tells of it.
pub(super) struct Meter<'a> {
    on_progress: Option<&'a OnProgress>,
    tensors: AtomicUsize,
    bytes: AtomicU64,
    total_tensors: usize,
    total_bytes: u64,
    start: Instant,
}

impl<'a> Meter<'a> {
    pub fn new(
        on_progress: Option<&'a OnProgress>,
        total_tensors: usize,
        total_bytes: u64,
    ) -> Self {
        Self {
            on_progress,
            tensors: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
            total_tensors,
            total_bytes,
            start: Instant::now(),
        }
    }

    /// So many bytes more were read.
    pub fn add_bytes(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.tell();
    }

    /// One tensor more is done.
    pub fn add_tensor(&self) {
        self.tensors.fetch_add(1, Ordering::Relaxed);
        self.tell();
    }

    /// How far loading is now.
    pub fn progress(&self) -> LoadProgress {
        LoadProgress {
            tensors: self.tensors.load(Ordering::Relaxed),
            total_tensors: self.total_tensors,
            bytes: self.bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes,
            elapsed: self.start.elapsed(),
        }
    }

    fn tell(&self) {
        if let Some(on_progress) = self.on_progress {
            on_progress(&self.progress());
        }
    }
}
