//! Values as they are stored.

use burn::tensor::Element;
use bytemuck::Pod;
use half::bf16;

/// A dtype that kernels read and write: widened to f32 exactly, rounded once.
pub(crate) trait Value: Pod + Element + Into<f32> + Send + Sync {
    fn round(value: f32) -> Self;
}

impl Value for f32 {
    #[inline(always)]
    fn round(value: f32) -> Self {
        value
    }
}

impl Value for bf16 {
    #[inline(always)]
    fn round(value: f32) -> Self {
        bf16::from_f32(value)
    }
}
