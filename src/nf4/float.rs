//! The float types that weights are quantised from and restored to.

use half::{bf16, f16};

use super::cpu::{Rounded, Widened};

/// A float type of weights on the host: f32, bf16 or f16.
///
/// Quantising widens to f32 first, which is exact; restoring computes in f32 and rounds once, to nearest even. The trait
/// is sealed.
pub trait Nf4Float: Rounded + Widened {}

impl Nf4Float for f32 {}
impl Nf4Float for bf16 {}
impl Nf4Float for f16 {}
