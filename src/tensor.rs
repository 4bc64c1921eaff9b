//! Small things about tensors that Burn says otherwise than this crate means them.

use burn::tensor::{FloatDType, Tensor};

/// A cast that costs nothing, and leaves no node in the graph, where there is nothing to do.
pub(crate) fn cast<const D: usize>(x: Tensor<D>, dtype: FloatDType) -> Tensor<D> {
    match FloatDType::from(x.dtype()) == dtype {
        true => x,
        false => x.cast(dtype),
    }
}

/// The value alone. A `detach` of Burn's leaves a leaf that requires a gradient as it is, and records what is computed from it.
pub(crate) fn constant<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.detach().set_require_grad(false)
}
