//! The f-divergences that DPO can hold a policy near its reference by.

use burn::tensor::activation::log_sigmoid;
use burn::tensor::{DType, Tensor};

use crate::{PeftError, Result};

/// A divergence from the reference, and with it a score of a completion: `s = f'(π/π_ref)`, up to a constant that the difference of
/// two scores has not ([Wang et al. 2024](https://arxiv.org/abs/2309.16240)).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum FDivergence {
    /// `KL(π‖π_ref)`, the usual one: `s = u`, the log-ratio itself.
    #[default]
    ReverseKl,
    /// `KL(π_ref‖π)`: `s = 1 − e^(−u)`.
    ForwardKl,
    /// Jensen and Shannon's: `s = ln 2 + ln σ(u)`.
    JensenShannon,
    /// `s = (e^((α−1)u) − 1)/(α−1)`; α = 1 is the reverse KL. The exponent is at most 80 (11 in f16), so that the score is finite.
    Alpha(f64),
}

impl FDivergence {
    pub(super) fn check(self) -> Result<()> {
        match self {
            Self::Alpha(alpha) if !alpha.is_finite() => Err(PeftError::config(
                "divergence.alpha",
                alpha,
                "a finite number",
            )),
            _ => Ok(()),
        }
    }

    /// Whether the score is the log-ratio.
    pub(super) fn is_reverse_kl(self) -> bool {
        match self {
            Self::ReverseKl => true,
            Self::Alpha(alpha) => (alpha - 1.0).abs() < 1e-6,
            _ => false,
        }
    }

    /// The scores of log-ratios.
    pub(super) fn score(self, u: Tensor<1>) -> Tensor<1> {
        if self.is_reverse_kl() {
            return u;
        }
        match self {
            Self::ReverseKl => u,
            Self::ForwardKl => (-u).exp().neg() + 1.0,
            Self::JensenShannon => log_sigmoid(u) + std::f64::consts::LN_2,
            Self::Alpha(alpha) => {
                let most = match u.dtype() {
                    DType::F16 => 11.0,
                    _ => 80.0,
                };
                let exponent = (u * (alpha - 1.0)).clamp_max(most);
                (exponent.exp() - 1.0) * (1.0 / (alpha - 1.0))
            }
        }
    }
}
