//! Tests of `burn_peft`'s rollout for alignment.
