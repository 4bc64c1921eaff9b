//! NF4 on a CPU.
//!
//! * [`packed`]: a packed weight as the kernels read it; dequantising any part of it, in a [`precision`];
//! * [`quantize`], [`columns`] of a transposed weight; [`dequantize`]; all for whole weights, on all threads;
//! * [`few_rows`]: the product with few rows, over a [`lookup`]; [`codes`]: what those with many rows need of a packed weight;
//! * [`row_norms`] of a weight;
//! * [`flex`]: Burn's tensors in and out.
#![allow(unsafe_code)]
// Without Burn's CPU backend there is only quantising and dequantising for others to upload.
#![cfg_attr(not(feature = "flex"), allow(dead_code))]

mod codes;
mod columns;
mod dequantize;
mod few_rows;
#[cfg(feature = "flex")]
pub(crate) mod flex;
mod lookup;
mod packed;
mod precision;
mod quantize;
#[cfg(test)]
mod quantize_tests;
mod row_norms;
#[cfg(test)]
mod tests;

pub(super) use crate::cpu::simd::Isa;
pub(super) use columns::Columns;
pub(super) use dequantize::{Rounded, dequantize};
pub(crate) use packed::{Packed, Scales};
#[cfg(feature = "flex")]
pub(crate) use precision::Precision;
pub(super) use quantize::{Widened, quantize, run as quantize_here};
