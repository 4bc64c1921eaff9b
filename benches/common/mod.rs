//! What the benchmarks measure: tensors, layers and the whole training step, the same in all of them.

// Each benchmark uses its own part of this.
#![allow(dead_code)]

pub mod layer;
pub mod train_step;

use burn::tensor::{DType, Device, Distribution, Tensor};

/// Values of a normal distribution; activations have a standard deviation of 1.
pub fn activations(shape: [usize; 2], dtype: DType, device: &Device) -> Tensor<2> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), (device, dtype))
}

/// A frozen weight of the scale that trained models have.
pub fn weight(shape: [usize; 2], dtype: DType, device: &Device) -> Tensor<2> {
    Tensor::random(shape, Distribution::Normal(0.0, 0.02), (device, dtype))
}
