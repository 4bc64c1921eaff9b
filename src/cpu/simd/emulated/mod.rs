//! The kernels for AVX-512 on a processor that has none, for the tests: `avx512.rs` once more, over instructions in plain code.

mod instructions;

use instructions as arch;

#[path = "../avx512.rs"]
#[allow(unused_unsafe)]
pub(super) mod avx512;
