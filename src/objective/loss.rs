//! A loss as a sum with the count that divides it.

use burn::tensor::Tensor;

use crate::{PeftError, Result};

/// The loss of one (micro-)batch, before it is divided.
///
/// The mean of the micro-batches' means is not the mean over the step where their counts differ. Dividing every sum by the count of
/// the whole step is:
///
/// ```text
/// for micro-batch i of a step:  backward(sum_i / Σ_j count_j)
/// ```
#[derive(Clone, Debug)]
pub struct Loss {
    /// The sum over what is counted; `[1]`, differentiable.
    pub sum: Tensor<1>,
    /// How many terms the sum has: pairs, sequences or tokens, as the function that made it says; at least one.
    pub count: usize,
}

impl Loss {
    /// The mean over this batch. Right for a step of one batch.
    pub fn mean(&self) -> Tensor<1> {
        divided(&self.sum, self.count)
    }

    /// This batch's part of the mean over `total` terms, for a step of several micro-batches: the sum of all parts, and the sum of
    /// their gradients, is that of one large batch.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] when `total` is less than this batch's own count.
    pub fn over(&self, total: usize) -> Result<Tensor<1>> {
        if total < self.count {
            return Err(PeftError::config(
                "total",
                total,
                format!("at least the {} terms of this batch", self.count),
            ));
        }
        Ok(divided(&self.sum, total))
    }
}

/// Multiplied by the reciprocal: the gradient of Burn's division by a number is rounded to f32, also in f64.
fn divided(sum: &Tensor<1>, count: usize) -> Tensor<1> {
    sum.clone() * (1.0 / count as f64)
}
