//! Several deltas on one frozen map: `y = x·W + b + Σ_i w_i·Δ_i(x)`.
//!
//! `Δ_i` is what the delta `i` alone adds to the map's output, `w_i` its weight. The sum of low-rank products is one low-rank
//! product of the factors side by side, `Σ_i w_i·s_i·A_i·B_i = [A_1 … A_n]·[w_1·s_1·B_1; …; w_n·s_n·B_n]`.

use burn::tensor::{FloatDType, IndexingUpdateOp, Int, Tensor};

use super::{Delta, FrozenMap, Lora, cast};

/// The map changed by all `deltas` at once, each with its weight: `[..., d_in] -> [..., d_out]`.
pub(crate) fn forward_sum<const D: usize>(
    x: Tensor<D>,
    base: &impl FrozenMap,
    deltas: &[(&Lora, f64)],
) -> Tensor<D> {
    if let [(delta, 1.0)] = deltas {
        return delta.forward(x, base);
    }
    let plain = |delta: &Lora| delta.magnitude.is_none() && !delta.drops(&x);
    if !deltas.is_empty() && deltas.iter().all(|(delta, _)| plain(delta)) {
        let (a, b) = side_by_side(deltas);
        let y = base.apply_low_rank(x, a, b, 1.0);
        return deltas
            .iter()
            .fold(y, |y, (delta, weight)| delta.shifted(y, *weight));
    }
    let y = base.apply(x.clone());
    deltas.iter().fold(y.clone(), |sum, (delta, weight)| {
        sum + delta.change(x.clone(), &y, base).mul_scalar(*weight)
    })
}

/// The map with the rows of `x [batch, ..., d_in]` under deltas of their own. A row appears once at most; one that does not is
/// the frozen map's.
pub(crate) fn forward_rows<const D: usize>(
    x: Tensor<D>,
    base: &impl FrozenMap,
    groups: &[(&Lora, Vec<usize>)],
) -> Tensor<D> {
    let y = base.apply(x.clone());
    groups.iter().fold(y, |y, (delta, rows)| {
        let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let rows = Tensor::<1, Int>::from_data(rows.as_slice(), &x.device());
        let part = y.clone().select(0, rows.clone());
        let change = delta.change(x.clone().select(0, rows.clone()), &part, base);
        y.select_assign(0, rows, change, IndexingUpdateOp::Add)
    })
}

/// The weight of the map of [`forward_sum`], for the weight `[d_in, d_out]` of the frozen one, both f32.
pub(crate) fn merge_sum(weight: Tensor<2>, deltas: &[(&Lora, f64)]) -> Tensor<2> {
    if let [(delta, 1.0)] = deltas {
        return delta.merge(weight);
    }
    deltas.iter().fold(weight.clone(), |sum, (delta, factor)| {
        sum + change_of(delta, &weight).mul_scalar(*factor)
    })
}

/// What the delta alone adds to the weight `[d_in, d_out]`, both f32.
pub(crate) fn change_of(delta: &Lora, weight: &Tensor<2>) -> Tensor<2> {
    match delta.magnitude {
        None => delta.delta_weight(),
        Some(_) => delta.merge(weight.clone()) - weight.clone(),
    }
}

/// `[A_1 … A_n]` and `[w_1·s_1·B_1; …]`, in the dtype that all have, or f32.
pub(crate) fn side_by_side(deltas: &[(&Lora, f64)]) -> (Tensor<2>, Tensor<2>) {
    let dtypes = deltas
        .iter()
        .map(|(delta, _)| FloatDType::from(delta.a.val().dtype()));
    let dtype = dtypes
        .reduce(|one, other| if one == other { one } else { FloatDType::F32 })
        .unwrap_or(FloatDType::F32);
    let (a, b) = deltas
        .iter()
        .map(|(delta, weight)| {
            let (a, b) = delta.factors();
            let b = cast(b, dtype).mul_scalar(weight * delta.scale());
            (cast(a, dtype), b)
        })
        .unzip();
    (Tensor::cat(a, 1), Tensor::cat(b, 0))
}
