//! Initialisations of LoRA's factors, those of Hugging Face PEFT 0.21.
//!
//! With the frozen `W [d_in, d_out]`, `s` the scale and `r` the rank:
//!
//! ```text
//! orthogonal  A = N₁·Q_odd / 10, B = Q_evenᵀ·N₂ / 10, Q [r, r] orthogonal, N₁ [d_in, r/2], N₂ [r/2, d_out] normal: A·B = 0
//! PiSSA       W = U·diag(σ)·Vᵀ;  A = U_r·diag(√(σ_r/s)), B = diag(√(σ_r/s))·V_rᵀ
//! OLoRA       Wᵀ = Q·R;          A = (R's first r rows)ᵀ, B = (Q's first r columns)ᵀ
//! ```
//!
//! Sources: PiSSA, arXiv:2404.02948; OLoRA, arXiv:2406.01775; orthogonal,
//! <https://datta0.github.io/posts/rethink-lora-init>.

use burn::config::Config;

use crate::{PeftError, Result};

/// How the factors of a fresh adapter are filled.
///
/// A fresh adapter changes nothing, except with [`Random`](Self::Random): `B` is zero, or `A·B` is, or the initial product is
/// left out of the change (see [`folds`](Self::folds)). In the last two cases up to rounding.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum LoraInit {
    /// `A ~ U(-1/√d_in, 1/√d_in)`: kaiming-uniform with `a = √5`, PEFT's default.
    Kaiming,
    /// `A ~ N(0, 1/r)`, of standard deviation `1/r`: PEFT's `"gaussian"`.
    Gaussian,
    /// `A ~ U(-1/√d_in, 1/√d_in)` and `B ~ U(-1/√r, 1/√r)`, as fresh linear layers: PEFT's `false`. A fresh adapter changes
    /// the model, which is of use in tests.
    Random,
    /// Factors that are not zero and whose product is: PEFT's `"orthogonal"`. The rank must be even. Needs the feature
    /// `faer`.
    Orthogonal,
    /// The `r` largest singular values and vectors of the weight, [PiSSA](https://arxiv.org/abs/2404.02948): PEFT's
    /// `"pissa"`. An SVD of the dense weight on the host. Needs the feature `faer`.
    Pissa,
    /// The same by a randomised SVD, many times faster for a small rank: PEFT's `"pissa_niter_N"`. Needs the feature `faer`.
    PissaFast {
        /// Power iterations; 16 is near the exact one in PiSSA's paper.
        iterations: usize,
    },
    /// The first `r` columns and rows of a QR of the weight, [OLoRA](https://arxiv.org/abs/2406.01775): PEFT's `"olora"`.
    /// Needs the feature `faer`.
    Olora,
}

impl LoraInit {
    /// Whether the factors begin with a part of the weight, which is then left out of the change: the adapter is
    /// `s·(A·B - A₀·B₀)` of constant `A₀`, `B₀`, costs what one of rank `2r` does, and is saved as such.
    pub fn folds(self) -> bool {
        matches!(self, Self::Pissa | Self::PissaFast { .. } | Self::Olora)
    }

    /// Checks what does not depend on the weight.
    pub(super) fn validate(self, rank: usize, alpha: f64) -> Result<()> {
        let error = |name: &str, value: String, expected: &str| {
            Err(PeftError::config(name, value, expected))
        };
        let decomposes = self == Self::Orthogonal || self.folds();
        if decomposes && cfg!(not(feature = "faer")) {
            return error(
                "init",
                format!("{self:?}"),
                "the feature `faer`, which this build lacks",
            );
        }
        if self == Self::Orthogonal && !rank.is_multiple_of(2) {
            return error("rank", rank.to_string(), "an even number for `Orthogonal`");
        }
        if self.folds() && alpha <= 0.0 {
            return error(
                "alpha",
                alpha.to_string(),
                "above 0 for a part of the weight",
            );
        }
        Ok(())
    }
}

#[cfg(feature = "faer")]
pub(super) use decomposed::{balanced, beside, of_weight, orthogonal};

#[cfg(feature = "faer")]
mod decomposed {
    use std::ops::Range;

    use burn::tensor::{Device, Distribution, FloatDType, Tensor};
    use faer::{Mat, MatRef};

    use super::LoraInit;
    use crate::adapter::decompose::{Svd, qr, svd, svd_low_rank, to_device, to_host};
    use crate::{PeftError, Result};

    /// `A [d_in, r]` and `B [r, d_out]` of an even `r`, with `A·B = 0` up to rounding.
    pub(crate) fn orthogonal(
        [d_in, d_out]: [usize; 2],
        rank: usize,
        device: &Device,
    ) -> Result<(Tensor<2>, Tensor<2>)> {
        let normal = |rows, columns| {
            let any = Distribution::Normal(0.0, 1.0);
            Tensor::<2>::random([rows, columns], any, (device, FloatDType::F32.into()))
        };
        let (q, _) = qr(to_host("orthogonal", &normal(rank, rank))?.as_ref());
        let half = rank / 2;
        let rows = |first: usize| {
            to_device(
                Mat::from_fn(half, rank, |i, j| q[(2 * i + first, j)]).as_ref(),
                device,
            )
        };
        let a = normal(d_in, half).matmul(rows(0)).mul_scalar(0.1);
        let b = rows(1)
            .transpose()
            .matmul(normal(half, d_out))
            .mul_scalar(0.1);
        Ok((a, b))
    }

    /// The factors of every slice side by side: `[A_1 … A_k]` and `[B_1 … B_k]`.
    pub(crate) fn beside(
        slices: Vec<Range<usize>>,
        factors: impl Fn(Range<usize>) -> Result<(Tensor<2>, Tensor<2>)>,
    ) -> Result<(Tensor<2>, Tensor<2>)> {
        let pairs = slices
            .into_iter()
            .map(factors)
            .collect::<Result<Vec<_>>>()?;
        let (a, b) = pairs.into_iter().unzip();
        Ok((Tensor::cat(a, 1), Tensor::cat(b, 1)))
    }

    /// `A [d_in, r]` and `B [r, d_out]` from a part of the weight `[d_in, d_out]`, for an `init` that folds.
    pub(crate) fn of_weight(
        init: LoraInit,
        weight: &Tensor<2>,
        rank: usize,
        scale: f64,
        device: &Device,
    ) -> Result<(Tensor<2>, Tensor<2>)> {
        let dims = weight.dims();
        if rank > dims[0].min(dims[1]) {
            return Err(PeftError::config(
                "rank",
                rank,
                format!("at most that of the weight {dims:?}, of which `{init:?}` takes a part"),
            ));
        }
        let weight = to_host("weight", weight)?;
        let (a, b) = match init {
            LoraInit::Olora => {
                let (q, r) = qr(weight.transpose());
                (
                    r.get(0..rank, ..).transpose().to_owned(),
                    q.get(.., 0..rank).transpose().to_owned(),
                )
            }
            LoraInit::PissaFast { iterations } => {
                let svd = svd_low_rank("weight", weight.as_ref(), rank, iterations, device)?;
                balanced(&svd, rank, scale)
            }
            _ => balanced(&svd("weight", weight.as_ref())?, rank, scale),
        };
        Ok((to_device(a.as_ref(), device), to_device(b.as_ref(), device)))
    }

    /// `U_r·diag(√(σ_r/s))` and `diag(√(σ_r/s))·V_rᵀ`: the best product of rank `r`, times `1/s`, in equal parts.
    pub(crate) fn balanced(
        Svd { u, values, v }: &Svd,
        rank: usize,
        scale: f64,
    ) -> (Mat<f32>, Mat<f32>) {
        let root = |j: usize| (f64::from(values[j]) / scale).sqrt() as f32;
        let columns = |of: MatRef<f32>| Mat::from_fn(of.nrows(), rank, |i, j| of[(i, j)] * root(j));
        (
            columns(u.as_ref()),
            columns(v.as_ref()).transpose().to_owned(),
        )
    }
}
