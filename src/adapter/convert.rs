//! Any change of a weight as a LoRA: `Δ ≈ s·A·B`.
//!
//! With `Δ [d_in, d_out] = U·diag(σ)·Vᵀ`, the product of rank `r` nearest to `Δ` in the Frobenius norm is that of its first `r`
//! singular values (Eckart and Young, 1936), and what it misses is `√(Σ_{j ≥ r} σ_j²)`.

use burn::tensor::Tensor;

use super::decompose::{Svd, svd, to_device, to_host};
use super::init::balanced;
use super::{Lora, LoraConfig};
use crate::{PeftError, Result};

/// What a LoRA keeps of the change it stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeltaReport {
    /// The rank `r`.
    pub rank: usize,
    /// `‖Δ - s·A·B‖ / ‖Δ‖`, Frobenius, before the factors are rounded to their dtype; 0 for a change of zero.
    pub relative_error: f64,
}

impl LoraConfig {
    /// The LoRA of this rank, scale and dtype that is nearest to the change `delta [d_in, d_out]` of a weight, on the device of
    /// `delta`. It has no magnitude and no initial factors.
    ///
    /// An SVD of the dense change on the host, in f32: a few times the memory of `delta` meanwhile.
    ///
    /// # Errors
    ///
    /// As [`validate`](Self::validate); [`PeftError::Config`] for a rank above `min(d_in, d_out)` or an `α` that is not
    /// above 0; [`PeftError::NotFinite`] and [`PeftError::Decomposition`].
    pub fn from_delta(&self, delta: &Tensor<2>) -> Result<(Lora, DeltaReport)> {
        self.check_delta()?;
        let svd = svd("delta", to_host("delta", delta)?.as_ref())?;
        self.truncated(&svd, delta)
    }

    /// As [`from_delta`](Self::from_delta), of the smallest rank whose relative error is at most `bound`, and at least 1;
    /// this configuration's own rank does not matter. `α` is kept, so the scale is that of the rank found.
    ///
    /// # Errors
    ///
    /// As [`from_delta`](Self::from_delta), and [`PeftError::Config`] for a bound that is not in `[0, 1]`.
    pub fn from_delta_within(&self, delta: &Tensor<2>, bound: f64) -> Result<(Lora, DeltaReport)> {
        self.check_delta()?;
        if !(0.0..=1.0).contains(&bound) {
            return Err(PeftError::Config {
                name: "bound".into(),
                value: bound.to_string(),
                expected: "a relative error in [0, 1]".into(),
            });
        }
        let svd = svd("delta", to_host("delta", delta)?.as_ref())?;
        let most = svd.values.len();
        let rank = (1..most).find(|&rank| missed(&svd.values, rank) <= bound);
        let mut config = self.clone();
        config.rank = rank.unwrap_or(most);
        config.truncated(&svd, delta)
    }

    fn check_delta(&self) -> Result<()> {
        self.validate()?;
        if self.alpha <= 0.0 {
            return Err(PeftError::Config {
                name: "alpha".into(),
                value: self.alpha.to_string(),
                expected: "above 0".into(),
            });
        }
        Ok(())
    }

    fn truncated(&self, svd: &Svd, delta: &Tensor<2>) -> Result<(Lora, DeltaReport)> {
        let rank = self.rank;
        if rank > svd.values.len() {
            return Err(PeftError::Config {
                name: "rank".into(),
                value: rank.to_string(),
                expected: format!("at most that of the change {:?}", delta.dims()),
            });
        }
        let (a, b) = balanced(svd, rank, self.scale());
        let device = &delta.device();
        let [a, b] = [a, b].map(|factor| to_device(factor.as_ref(), device));
        let report = DeltaReport {
            rank,
            relative_error: missed(&svd.values, rank),
        };
        Ok((self.with_persistent(a, b, device)?, report))
    }
}

/// The relative error of the first `rank` singular values.
fn missed(values: &[f32], rank: usize) -> f64 {
    let squares = |values: &[f32]| -> f64 { values.iter().map(|&v| f64::from(v).powi(2)).sum() };
    match squares(values) {
        0.0 => 0.0,
        all => (squares(&values[rank..]) / all).sqrt(),
    }
}
