//! NF4 on a CPU.
//!
//! * [`packed`]: a packed weight as the kernels read it; dequantising any part of it;
//! * [`few_rows`], [`many_rows`], [`transposed`]: the products;
//! * [`simd`]: the instruction sets they are compiled for, chosen at run time;
//! * [`flex`]: Burn's tensors in and out.
#![allow(unsafe_code)]

mod dequantize;
mod element;
mod few_rows;
#[cfg(feature = "flex")]
pub(super) mod flex;
mod low_rank;
mod many_rows;
mod packed;
mod parallel;
mod scratch;
mod simd;
#[cfg(test)]
mod tests;
mod transposed;
