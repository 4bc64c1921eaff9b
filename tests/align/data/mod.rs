//! Tests of `burn_peft`'s data for alignment.
