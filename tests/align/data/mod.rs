//! Tests of `burn_peft`'s data for alignment.

mod batches;
mod chat_template;
mod curate;
mod packed_model;
mod packing;
mod rows;
mod tokens;

use std::convert::Infallible;

/// One token per byte.
fn bytes(text: &str) -> Result<Vec<u32>, Infallible> {
    Ok(text.bytes().map(u32::from).collect())
}
