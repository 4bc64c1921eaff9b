//! One low-rank change from several by SVD: `Δ = Σ w_i·Δ_i`, or what a [`Combination`] makes of the `Δ_i [d_in, d_out]` value by value, cut
//! to its largest singular values.
//!
//! What is pruned and elected here are the changes, not their factors, so there are no mixed terms, ranks may differ, and the
//! result is the best of its rank: `A·B` with `A = U_r·diag(√σ_r)` and `B = diag(√σ_r)·V_rᵀ`. A sum of low-rank changes is
//! decomposed by its factors, `[A_1 … A_n]·[w_1·s_1·B_1; …]`, and never dense.
//!
//! These are PEFT's `svd`, `ties_svd`, `dare_linear_svd`, `dare_ties_svd` and `magnitude_prune_svd`, without their `svd_clamp`.

use burn::tensor::{FloatDType, Tensor};

use super::convert::{DeltaReport, Truncation};
use super::decompose::{Svd, svd, svd_of_product, to_host};
use super::{Combination, Lora, LoraConfig, cast};
use crate::{PeftError, Result};

impl Combination {
    /// Combines the changes of one module into the nearest one of a lower rank, of scale 1 and with the dropout and the dtype of
    /// the first. [`Cat`](Self::Cat) and [`Linear`](Self::Linear) are both the weighted sum; the others prune the changes.
    ///
    /// On the host. A sum of changes of the ranks `r_i` takes a QR of `[d_in, Σr_i]` and of `[d_out, Σr_i]`; the others an SVD of
    /// `[d_in, d_out]`, and every dense change meanwhile.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for no changes at all, for a weight that is not finite, for a density, a rank or a bound out of
    /// range, and for DoRA, whose change depends on the weight: see
    /// [`PeftModel::add_lora_of`](crate::model::PeftModel::add_lora_of). [`PeftError::Shape`] for changes of different maps;
    /// [`PeftError::NotFinite`], [`PeftError::Decomposition`].
    pub fn combine_svd(
        &self,
        changes: &[(&Lora, f64)],
        truncation: Truncation,
    ) -> Result<(Lora, DeltaReport)> {
        let plain = |lora: &Lora| lora.magnitude.is_none();
        if !changes.iter().all(|(lora, _)| plain(lora)) {
            return Err(PeftError::config(
                "dora",
                "true",
                "plain LoRA, a change without its weight",
            ));
        }
        self.nearest(changes, truncation, |lora| lora.delta_weight().detach())
    }

    /// As [`combine_svd`](Self::combine_svd), where `dense` gives the change `[d_in, d_out]`, f32, of an adapter that is no
    /// low-rank product.
    pub(crate) fn nearest(
        &self,
        changes: &[(&Lora, f64)],
        truncation: Truncation,
        dense: impl Fn(&Lora) -> Tensor<2>,
    ) -> Result<(Lora, DeltaReport)> {
        let Some((first, _)) = changes.first() else {
            return Err(PeftError::config(
                "adapters to combine",
                "none",
                "at least one",
            ));
        };
        truncation.check()?;
        self.check_numbers(changes.iter().map(|(_, weight)| *weight))?;
        if let Some((lora, _)) = changes.iter().find(|(lora, _)| lora.dims() != first.dims()) {
            return Err(PeftError::Shape {
                tensor: "s·A·B".into(),
                expected: first.dims().into(),
                found: lora.dims().into(),
            });
        }
        let low_rank = changes.iter().all(|(lora, _)| lora.magnitude.is_none());
        let svd = match self {
            Self::Cat | Self::Linear if low_rank => of_sum(changes)?,
            _ => {
                let changes = changes.iter().map(|(lora, weight)| (dense(lora), *weight));
                let change = self.of_values(changes.collect());
                svd("change", to_host("change", &change)?.as_ref())?
            }
        };
        let ranks = changes.iter().map(|(lora, _)| lora.converted().rank());
        let rank = truncation.rank(&svd.values, ranks.max().unwrap_or(1));
        LoraConfig::new(rank)
            .with_alpha(rank as f64)
            .with_dropout(first.dropout.prob)
            .with_dtype(first.config().dtype)
            .truncated(&svd, &first.a.val().device())
    }
}

/// Of `Σ w_i·s_i·A_i·B_i`.
fn of_sum(changes: &[(&Lora, f64)]) -> Result<Svd> {
    let factors = changes.iter().map(|(lora, weight)| {
        let (a, b) = lora.factors();
        let [a, b] = [a, b].map(|factor| cast(factor.detach(), FloatDType::F32));
        (a, b.mul_scalar(weight * lora.scale()))
    });
    let (a, b): (Vec<_>, Vec<_>) = factors.unzip();
    let a = to_host("A", &Tensor::cat(a, 1))?;
    let b = to_host("B", &Tensor::cat(b, 0))?;
    svd_of_product("change", a.as_ref(), b.as_ref())
}
