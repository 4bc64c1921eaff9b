//! Any change of a weight as a LoRA: `Δ ≈ s·A·B`.
//!
//! With `Δ [d_in, d_out] = U·diag(σ)·Vᵀ`, the product of rank `r` nearest to `Δ` in the Frobenius norm is that of its first `r`
//! singular values (Eckart and Young, 1936), and what it misses is `√(Σ_{j ≥ r} σ_j²)`.

use burn::tensor::{Device, Tensor};

use super::decompose::{Svd, svd, to_device, to_host};
use super::init::balanced;
use super::{Lora, LoraConfig, Slices};
use crate::{PeftError, Result};

/// What a LoRA keeps of the change it stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeltaReport {
    /// The rank `r`.
    pub rank: usize,
    /// `‖Δ - s·A·B‖ / ‖Δ‖`, Frobenius, before the factors are rounded to their dtype; 0 for a change of zero.
    pub relative_error: f64,
}

/// How many of the singular values of a change its LoRA keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Truncation {
    /// As many as the largest rank among the adapters that it is made of, module by module: PEFT's default.
    #[default]
    LargestRank,
    /// This many, at least 1; all where a weight has fewer.
    Rank(usize),
    /// The fewest, at least 1, whose relative error `‖Δ - s·A·B‖ / ‖Δ‖` is at most this bound in `[0, 1]`.
    Within(f64),
}

impl Truncation {
    pub(super) fn check(self) -> Result<()> {
        let (name, value, expected) = match self {
            Self::Rank(0) => ("rank", "0".to_owned(), "at least 1"),
            Self::Within(bound) if !(0.0..=1.0).contains(&bound) => {
                ("bound", bound.to_string(), "a relative error in [0, 1]")
            }
            _ => return Ok(()),
        };
        Err(PeftError::config(name, value, expected))
    }

    /// How many of these singular values are kept, where `largest` is the largest rank of the adapters.
    pub(super) fn rank(self, values: &[f32], largest: usize) -> usize {
        match self {
            Self::LargestRank => largest.min(values.len()),
            Self::Rank(rank) => rank.min(values.len()),
            Self::Within(bound) => (1..values.len())
                .find(|&rank| missed(values, rank) <= bound)
                .unwrap_or(values.len()),
        }
    }
}

impl LoraConfig {
    /// The LoRA of this rank, scale and dtype that is nearest to the change `delta [d_in, d_out]` of a weight, on the device of
    /// `delta`. It has no magnitude and no initial factors.
    ///
    /// An SVD of the dense change on the host, in f32: a few times the memory of `delta` meanwhile.
    ///
    /// # Errors
    ///
    /// As [`validate`](Self::validate); [`PeftError::Config`] for a rank above `min(d_in, d_out)`, an `α` that is not
    /// above 0, or slices; [`PeftError::NotFinite`] and [`PeftError::Decomposition`].
    pub fn from_delta(&self, delta: &Tensor<2>) -> Result<(Lora, DeltaReport)> {
        self.check_delta()?;
        let svd = svd("delta", to_host("delta", delta)?.as_ref())?;
        self.truncated(&svd, &delta.device())
    }

    /// As [`from_delta`](Self::from_delta), of the smallest rank whose relative error is at most `bound`, and at least 1;
    /// this configuration's own rank does not matter. `α` is kept, so the scale is that of the rank found.
    ///
    /// # Errors
    ///
    /// As [`from_delta`](Self::from_delta), and [`PeftError::Config`] for a bound that is not in `[0, 1]`.
    pub fn from_delta_within(&self, delta: &Tensor<2>, bound: f64) -> Result<(Lora, DeltaReport)> {
        self.check_delta()?;
        let truncation = Truncation::Within(bound);
        truncation.check()?;
        let svd = svd("delta", to_host("delta", delta)?.as_ref())?;
        let mut config = self.clone();
        config.rank = truncation.rank(&svd.values, 0);
        config.truncated(&svd, &delta.device())
    }

    fn check_delta(&self) -> Result<()> {
        self.validate()?;
        let (name, value, expected) = if self.alpha <= 0.0 {
            ("alpha", self.alpha.to_string(), "above 0")
        } else if self.slices != Slices::Whole {
            let value = format!("{:?}", self.slices);
            ("slices", value, "none, for a change of all outputs")
        } else {
            return Ok(());
        };
        Err(PeftError::config(name, value, expected))
    }

    /// The LoRA of this rank and scale that is nearest to what was decomposed.
    pub(super) fn truncated(&self, svd: &Svd, device: &Device) -> Result<(Lora, DeltaReport)> {
        let rank = self.rank;
        if rank > svd.values.len() {
            return Err(PeftError::config(
                "rank",
                rank,
                format!(
                    "at most that of the change {:?}",
                    [svd.u.nrows(), svd.v.nrows()]
                ),
            ));
        }
        let (a, b) = balanced(svd, rank, self.scale());
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
