//! Tests of sampling from models, and of rewards.

mod errors;
mod llama_rollout;
mod logits;
mod recurrent;
mod repeatable;
mod rewards;
mod sampler;
mod stops;

use std::path::{Path, PathBuf};

/// The path of golden data.
fn golden(name: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.join("golden").join(name)
}
