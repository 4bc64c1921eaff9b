//! What kernels on a CPU share.
//!
//! * [`simd`]: the instruction sets they are compiled for, chosen at run time;
//! * [`parallel`]: threads;
//! * [`scratch`]: memory that outlives a call.
#![allow(unsafe_code)]

pub(crate) mod parallel;
pub(crate) mod scratch;
pub(crate) mod simd;
