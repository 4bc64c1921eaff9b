//! A Llama of stock Burn layers that reads and writes Hugging Face directories.
//!
//! One model for the examples, tests and benchmarks. It needs one change for adapters: `forward_peft` of
//! [`burn_peft::model::PeftForward`] in place of `forward` at each linear layer.

pub mod arguments;
pub mod attention;
pub mod block;
pub mod cache;
pub mod config;
pub mod error;
pub mod estimate;
pub mod generate;
pub mod load;
pub mod model;
pub mod names;
pub mod open;
pub mod progress;
pub mod rope;
pub mod save;
pub mod text;
pub mod tokenizer;
