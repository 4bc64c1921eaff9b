//! A Llama of stock Burn layers that reads and writes Hugging Face directories.
//!
//! One model for the examples, tests and benches, included by `#[path = "../llama/mod.rs"] mod llama;`. Nothing in it
//! knows of adapters or quantisation, but for `forward_peft` of [`burn_peft::model::PeftForward`] at each linear layer.

// Each example uses its own part of this.
#![allow(dead_code)]

pub mod attention;
pub mod block;
pub mod config;
pub mod error;
pub mod generate;
pub mod load;
pub mod model;
pub mod names;
pub mod progress;
pub mod rope;
pub mod save;
pub mod tokenizer;
