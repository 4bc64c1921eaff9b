//! The tests of what alignment needs: objectives, rollouts, and the data for both.

mod data;
mod log_probs;
mod objective;
mod rollout;
mod stored;

use std::path::{Path, PathBuf};

/// The path of golden data.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(name)
}
