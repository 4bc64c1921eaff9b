//! Rotary position embedding in Hugging Face's half-split form.
//!
//! A head of width `d` is split into halves `x1 = x[..d/2]`, `x2 = x[d/2..]`, and at position `p`
//!
//! `y1 = x1·cos(p·f) − x2·sin(p·f)`, `y2 = x2·cos(p·f) + x1·sin(p·f)`, `f_i = theta^(−2i/d)`, `i < d/2`.
//!
//! Su et al., "RoFormer" (2021), rotate the interleaved pairs `(x_2i, x_2i+1)`, as `burn::nn::RotaryEncoding` does;
//! Hugging Face's checkpoints have their q and k rows permuted for the halves. Stretching: Llama 3.1.

use std::f32::consts::PI;

use burn::tensor::{Int, Tensor};
use burn_peft::fused::rotate;

use super::config::RopeConfig;

/// The frequencies `f`, of length `head_dim / 2`.
pub fn inverse_frequencies(config: &RopeConfig, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|i| {
            let frequency = 1.0 / config.theta.powf(2.0 * i as f32 / head_dim as f32);
            let Some(scaling) = &config.scaling else {
                return frequency;
            };
            let wavelength = 2.0 * PI / frequency;
            let context = scaling.original_max_position_embeddings as f32;
            let (low, high) = (scaling.low_freq_factor, scaling.high_freq_factor);
            if wavelength > context / low {
                frequency / scaling.factor
            } else if wavelength < context / high {
                frequency
            } else {
                let ramp = (context / wavelength - low) / (high - low);
                (1.0 - ramp) * frequency / scaling.factor + ramp * frequency
            }
        })
        .collect()
}

/// The cosines and sines of one forward pass, computed once and used by every layer.
#[derive(Clone, Debug)]
pub struct Rotation {
    /// `[batch or 1, 1, seq, head_dim / 2]`.
    cos: Tensor<4>,
    /// `[batch or 1, 1, seq, head_dim / 2]`.
    sin: Tensor<4>,
}

impl Rotation {
    /// The rotation at `positions`, of shape `[batch or 1, seq]`.
    pub fn new(frequencies: &[f32], positions: Tensor<2, Int>) -> Self {
        let frequencies = Tensor::<1>::from_floats(frequencies, &positions.device());
        let angles = positions.float().unsqueeze_dims::<4>(&[1, 3]) * frequencies.unsqueeze::<4>();
        Self {
            cos: angles.clone().cos(),
            sin: angles.sin(),
        }
    }

    /// Rotates queries or keys of shape `[batch, heads, seq, head_dim]`.
    pub fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        rotate(x, self.cos.clone(), self.sin.clone())
    }
}
