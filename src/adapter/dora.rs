//! DoRA, weight-decomposed low-rank adaptation: `W' = m ∘ (W + s·A·B) / n`.
//!
//! `n [d_out]` holds the norms of the columns of `W + s·A·B` (rows, in PyTorch's layout) and is a constant for the
//! gradient; `m [d_out]` is trained, and begins as the norms of the columns of `W`. The bias is not scaled.
//!
//! `n` is computed anew in every forward pass, from
//!
//! ```text
//! n² = ‖W_j‖² + 2s·⟨W_j, (A·B)_j⟩ + s²·‖(A·B)_j‖²
//!    = ‖W_j‖² + 2s·Σ_k (Aᵀ·W ∘ B)_kj + s²·Σ_k ((Aᵀ·A)·B ∘ B)_kj
//! ```
//!
//! which takes one pass over `W`, a product of `W` with `r` rows, and no `[d_in, d_out]` temporary. The relative error of `n²` is
//! that of f32 sums times `(‖W_j‖ + s·‖A‖·‖B_j‖)² / n_j²`: large only where the change cancels a column of the weight.
//!
//! Source: DoRA, arXiv:2402.09353, with the detached norm of its section 4.3.

use burn::tensor::{FloatDType, Tensor};

use super::cast;
use crate::tensor::{matmul, reshape};

/// Rows of a dense weight that are squared at a time.
const RUN: usize = 64;

/// `‖W_j‖²` of the columns of a dense `W [d_in, d_out]`, in f32: `[d_out]`.
pub(crate) fn column_norms_squared(weight: &Tensor<2>) -> Tensor<1> {
    let [d_in, d_out] = weight.dims();
    let zero = Tensor::zeros([1, d_out], (&weight.device(), FloatDType::F32.into()));
    let norms = (0..d_in).step_by(RUN).fold(zero, |norms, first| {
        let run = weight.clone().narrow(0, first, RUN.min(d_in - first));
        norms + cast(run, FloatDType::F32).square().sum_dim(0)
    });
    reshape(norms, [d_out])
}

/// `n²` from `‖W_j‖² [d_out]`, `Aᵀ·W [r, d_out]`, `A [d_in, r]` and `B [r, d_out]`, in f32: `[d_out]`.
///
/// Rounding could make it negative where `W + s·A·B` vanishes: it is kept above zero.
pub(crate) fn changed_norms_squared(
    norms: Tensor<1>,
    a_w: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Tensor<1> {
    let [a_w, a, b] = [a_w, a, b].map(|factor| cast(factor, FloatDType::F32));
    let d_out = b.dims()[1];
    let gram = matmul(a.clone().transpose(), a);
    let change = a_w.mul_scalar(2.0 * scale) + matmul(gram, b.clone()).mul_scalar(scale * scale);
    let change = reshape((change * b).sum_dim(0), [d_out]);
    (norms + change).clamp_min(f32::MIN_POSITIVE)
}

/// A constant: the same values without their place in the graph.
pub(crate) fn constant<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.detach().set_require_grad(false)
}

/// `W' = m ∘ W / n` for the changed weight `W [d_in, d_out]`, f32, `n` its own norms.
pub(super) fn rescale(weight: Tensor<2>, magnitude: Tensor<1>) -> Tensor<2> {
    let norms = column_norms_squared(&constant(weight.clone())).clamp_min(f32::MIN_POSITIVE);
    weight * (cast(magnitude, FloatDType::F32) / norms.sqrt()).unsqueeze()
}
