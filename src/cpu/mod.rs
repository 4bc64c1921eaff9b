//! What kernels on a CPU share.
//!
//! * [`simd`]: the instruction sets they are compiled for, chosen at run time;
//! * [`output`]: memory for results;
//! * [`parallel`]: threads;
//! * [`scratch`]: memory that outlives a call.
#![allow(unsafe_code)]

pub(crate) mod output;
pub(crate) mod parallel;
pub(crate) mod scratch;
pub(crate) mod simd;
