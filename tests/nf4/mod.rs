//! NF4 on the host against bitsandbytes 0.50.2, against published error statistics and against its own laws.
//!
//! The golden data lie in tests/golden/nf4, beside the script that made them.

mod double;
mod errors;
mod golden;
mod laws;
mod plain;
