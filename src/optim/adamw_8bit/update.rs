//! One step of AdamW, on a value and on a tensor.
//!
//! ```text
//! m ← β₁·m + (1 - β₁)·g        v ← β₂·v + (1 - β₂)·g²
//! w ← (1 - η·λ)·w - η·√(1 - β₂ᵗ)/(1 - β₁ᵗ) · m / (√v + ε·√(1 - β₂ᵗ))
//! ```
//!
//! `w` the parameter, `g` its gradient, `m` and `v` the moments, `t` the number of the step from 1, `η` the learning rate, `λ` the
//! decay. This is `w ← (1 - η·λ)·w - η·m̂/(√v̂ + ε)` of the paper (arXiv:1711.05101) with one division.

use burn::tensor::Tensor;

/// The constants of a step, computed in f64 and rounded once to f32, in which all else is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Update {
    beta_1: f32,
    beta_2: f32,
    gain_1: f32,
    gain_2: f32,
    epsilon: f32,
    keep: f32,
    rate: f32,
}

impl Update {
    pub fn new(
        [beta_1, beta_2]: [f64; 2],
        epsilon: f64,
        weight_decay: f64,
        lr: f64,
        time: usize,
    ) -> Self {
        let time = i32::try_from(time).unwrap_or(i32::MAX);
        let correction = (1.0 - beta_2.powi(time)).sqrt();
        Self {
            beta_1: beta_1 as f32,
            beta_2: beta_2 as f32,
            gain_1: (1.0 - beta_1) as f32,
            gain_2: (1.0 - beta_2) as f32,
            epsilon: (epsilon * correction) as f32,
            keep: (1.0 - lr * weight_decay) as f32,
            rate: (lr * correction / (1.0 - beta_1.powi(time))) as f32,
        }
    }

    /// The parameter and its moments after the step.
    #[inline(always)]
    pub fn of_value(&self, w: f32, g: f32, m: f32, v: f32) -> [f32; 3] {
        let m = self.beta_1 * m + self.gain_1 * g;
        let v = self.beta_2 * v + self.gain_2 * (g * g);
        let w = self.keep * w - self.rate * (m / (v.sqrt() + self.epsilon));
        [w, m, v]
    }

    /// As [`of_value`](Self::of_value), of f32 tensors.
    pub fn of_tensor<const D: usize>(
        &self,
        w: Tensor<D>,
        g: Tensor<D>,
        m: Tensor<D>,
        v: Tensor<D>,
    ) -> [Tensor<D>; 3] {
        let m = m.mul_scalar(self.beta_1) + g.clone().mul_scalar(self.gain_1);
        let v = v.mul_scalar(self.beta_2) + (g.clone() * g).mul_scalar(self.gain_2);
        let step = m.clone() / v.clone().sqrt().add_scalar(self.epsilon);
        let w = w.mul_scalar(self.keep) - step.mul_scalar(self.rate);
        [w, m, v]
    }
}
