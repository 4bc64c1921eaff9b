//! Tests of `burn_peft`'s objectives for alignment: against TRL's own functions (`tests/golden/objectives`), and against identities.

mod errors;
mod golden;
mod identities;
mod log_probs;
mod policy;
mod ppo;
mod preference;
mod unpaired;
