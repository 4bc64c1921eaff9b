//! The tests of the public interface that can share a process.
//!
//! One program for all of them: most of what a test program costs is compiling and linking it. Tests that count allocations or
//! seed the device's random numbers are in `alone`, and those of hostile files in `hostile`.

mod adamw_8bit;
mod arguments;
mod base;
mod bitsandbytes;
mod devices;
mod files;
mod finetune;
mod first_hour;
mod fuzz;
mod half_adapters;
mod head;
mod initialisations;
#[path = "golden/kinds/model.rs"]
mod kinds_model;
mod layers;
mod llama_model;
mod lora_fa;
mod memory_claims;
mod model;
mod nf4;
mod optim;
mod outside;
mod sft;
mod targets;
mod views;

use std::path::{Path, PathBuf};

/// The repository's root.
fn repository() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("the tests are in the repository")
}

/// The path of golden data.
fn golden(name: &str) -> PathBuf {
    repository().join("tests/golden").join(name)
}
