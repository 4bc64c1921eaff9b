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

/// For tests: values of no structure in `[-1, 1)`, rounded to the dtype.
#[cfg(test)]
pub(crate) fn noise<V: Value>(n: usize, seed: u64) -> Vec<V> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        V::round((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
    });
    values.take(n).collect()
}
