//! Low-rank changes of layers that are linear in a weight `W [d_in, d_out]` but do not multiply rows by it: embeddings and
//! convolutions.
//!
//! With `f(x; W)` the layer without its bias `b`, and `f` linear in `W`:
//!
//! ```text
//! LoRA  y = f(x; W) + Σ_i w_i·s_i·(f(drop(x); A_i·B_i) + β_i) + b
//! DoRA  y = f(x; W) + Σ_i w_i·((f(x; W) + s_i·f(x; A_i·B_i)) ∘ m_i/n_i - f(x; W)) + b
//! ```
//!
//! `f(x; A·B)` is `f(x; A)`, of `r` features, times `B`. `n_i` are the norms of the columns of `W + s_i·A_i·B_i`.

use burn::module::Param;
use burn::tensor::{FloatDType, IndexingUpdateOp, Int, Tensor};

use super::{Lora, cast};

/// A frozen layer with outputs of `D` axes.
pub(crate) trait FrozenLayer<const D: usize> {
    /// What it is called with.
    type Input: Clone;

    /// `f(x; W)`.
    fn apply(&self, x: Self::Input) -> Tensor<D>;

    /// `f(x; A·B)`, `A [d_in, r]`, `B [r, d_out]`, in their dtype.
    fn low_rank(&self, x: Self::Input, a: Tensor<2>, b: Tensor<2>) -> Tensor<D>;

    /// The input under the adapter's dropout, if that acts on it.
    fn dropped(&self, x: &Self::Input, lora: &Lora) -> Option<Self::Input>;

    /// The norms of the columns of `W + s·A·B`, `[d_out]`, in f32; a constant for the gradient.
    fn column_norms(&self, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<1>;

    /// One value for each output feature, in a shape that broadcasts to the output's.
    fn along_outputs(&self, values: Tensor<1>) -> Tensor<D>;

    /// These rows of a batch.
    fn rows(x: &Self::Input, rows: Tensor<1, Int>) -> Self::Input;
}

/// The layer changed by all `loras` at once, each with its weight.
pub(crate) fn layer_sum<const D: usize, L: FrozenLayer<D>>(
    layer: &L,
    x: L::Input,
    loras: &[(&Lora, f64)],
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    let y = layer.apply(x.clone());
    let changed = loras.iter().fold(y.clone(), |sum, (lora, weight)| {
        let change = change(layer, &x, &y, lora);
        sum + match weight {
            1.0 => change,
            weight => change.mul_scalar(*weight),
        }
    });
    with_bias(layer, changed, bias)
}

/// The layer with the rows of a batch under changes of their own.
pub(crate) fn layer_rows<const D: usize, L: FrozenLayer<D>>(
    layer: &L,
    x: L::Input,
    groups: &[(&Lora, Vec<usize>)],
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    let y = layer.apply(x.clone());
    let changed = groups.iter().fold(y.clone(), |sum, (lora, rows)| {
        let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let rows = Tensor::<1, Int>::from_data(rows.as_slice(), &y.device());
        let x = L::rows(&x, rows.clone());
        let change = change(layer, &x, &y.clone().select(0, rows.clone()), lora);
        sum.select_assign(0, rows, change, IndexingUpdateOp::Add)
    });
    with_bias(layer, changed, bias)
}

/// What one change adds to `y = f(x; W)`, in the dtype of `y`.
fn change<const D: usize, L: FrozenLayer<D>>(
    layer: &L,
    x: &L::Input,
    y: &Tensor<D>,
    lora: &Lora,
) -> Tensor<D> {
    let ((a, b), scale) = (lora.factors(), lora.scale());
    let dtype = y.dtype().into();
    let dropped = layer.dropped(x, lora);
    let seen = dropped.clone().unwrap_or_else(|| x.clone());
    let low = layer.low_rank(seen, a.clone(), b.clone()).mul_scalar(scale);
    match &lora.magnitude {
        None => {
            let low = match lora.shift() {
                None => low,
                Some(shift) => low + layer.along_outputs(shift),
            };
            cast(low, dtype)
        }
        Some(magnitude) => {
            let base = dropped.map_or_else(|| y.clone(), |x| layer.apply(x));
            let gain = gain(magnitude, layer.column_norms(a, b, scale));
            let gain = layer.along_outputs(cast(gain, dtype));
            (base.clone() + cast(low, dtype)) * gain - base
        }
    }
}

/// `m/n`.
pub(super) fn gain(magnitude: &Param<Tensor<1>>, norms: Tensor<1>) -> Tensor<1> {
    cast(magnitude.val(), FloatDType::F32) / norms
}

fn with_bias<const D: usize, L: FrozenLayer<D>>(
    layer: &L,
    y: Tensor<D>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    match bias {
        None => y,
        Some(bias) => {
            let bias = cast(bias, y.dtype().into());
            y + layer.along_outputs(bias)
        }
    }
}
