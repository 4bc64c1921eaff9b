//! Tests of `burn_peft`'s objective for alignment.
