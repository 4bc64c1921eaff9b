//! What kernels on a CPU share.
//!
//! * [`simd`], the instruction sets they are compiled for, chosen at run time;
//! * [`matmul`], products of matrices;
//! * [`output`], memory for results;
//! * [`parallel`], the threads;
//! * [`scratch`], memory that outlives a call;
//! * [`value`], the dtypes, and `flex`, Burn's tensors.
#![allow(unsafe_code)]
// Without Burn's CPU backend there is only quantising and dequantising for others to upload.
#![cfg_attr(not(feature = "flex"), allow(dead_code))]

#[cfg(feature = "flex")]
pub(crate) mod flex;
pub(crate) mod matmul;
pub(crate) mod output;
pub(crate) mod parallel;
pub(crate) mod scratch;
pub(crate) mod simd;
pub(crate) mod value;
