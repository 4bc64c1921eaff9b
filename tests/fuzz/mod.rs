//! Inputs made by chance from real ones: configurations, files of tensors, states of NF4 as bitsandbytes stores them.
//!
//! Each target says what must hold of any bytes: an error, or the same as another reader understands, and back again.
//! A failing input is kept under `tests/fuzz/found/`, all of which run first, so a case once found is a test from then on.
//! `scripts/fuzz SECONDS` runs for longer than a test should; `BURN_PEFT_FUZZ_SECONDS` and `BURN_PEFT_FUZZ_SEED` are what
//! it sets.

mod config;
mod driver;
mod file;
mod mutate;
mod state;

use driver::{Target, run};

#[test]
fn adapter_config() {
    run(&Target {
        name: "adapter_config",
        seeds: config::seeds(),
        mutate: mutate::json,
        check: config::check,
    });
}

#[test]
fn adapter_file() {
    let seeds = file::seeds();
    let of_every_kind = file::check(seeds.last().unwrap());
    assert!(
        of_every_kind.ends_with("read, 1 copies, 1 rows"),
        "{of_every_kind}"
    );
    run(&Target {
        name: "adapter_file",
        seeds,
        mutate: mutate::safetensors,
        check: file::check,
    });
}

#[test]
fn nf4_state() {
    run(&Target {
        name: "nf4_state",
        seeds: state::seeds(),
        mutate: mutate::numbers,
        check: state::check,
    });
}
