//! Small things about tensors that Burn says otherwise than this crate means them.

use burn::backend::{Dispatch, ops::FloatTensorOps, ops::IntTensorOps};
use burn::tensor::{Bool, FloatDType, Int, Shape, Tensor, module};

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

/// A reshape to these sides, of which any may be zero. To Burn's own reshape a zero means the tensor's own side.
pub(crate) fn reshape<const D: usize, const D2: usize>(
    x: Tensor<D>,
    dims: [usize; D2],
) -> Tensor<D2> {
    let values = dims.iter().product::<usize>();
    assert_eq!(
        x.shape().num_elements(),
        values,
        "values of a reshaped tensor"
    );
    let x = Dispatch::float_reshape(x.into_dispatch(), Shape::from(dims));
    Tensor::from_dispatch(x)
}

/// [`reshape`] of integers.
pub(crate) fn reshape_int<const D: usize, const D2: usize>(
    x: Tensor<D, Int>,
    dims: [usize; D2],
) -> Tensor<D2, Int> {
    let values = dims.iter().product::<usize>();
    assert_eq!(
        x.shape().num_elements(),
        values,
        "values of a reshaped tensor"
    );
    let x = Dispatch::int_reshape(x.into_dispatch(), Shape::from(dims));
    Tensor::from_dispatch(x)
}

/// `a · b` of the last two axes, of which any side may be zero.
///
/// A sum of no products is zero. Burn's CPU backend crashes on some products with a side of zero: docs/upstream/flex-empty-matmul.md.
pub(crate) fn matmul<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    if !is_empty(&a) && !is_empty(&b) {
        return a.matmul(b);
    }
    assert_eq!(
        a.dims()[D - 1],
        b.dims()[D - 2],
        "inner dimensions of a product"
    );
    let mut dims = [0; D];
    for (axis, dim) in dims.iter_mut().enumerate() {
        let [a, b] = [a.dims()[axis], b.dims()[axis]];
        *dim = match axis {
            _ if axis == D - 2 => a,
            _ if axis == D - 1 => b,
            _ if a == 1 => b,
            _ => a,
        };
    }
    let zeros = Tensor::zeros(dims, (&a.device(), a.dtype()));
    let zeros = plus_nothing(zeros, a.is_tracked(), || a.sum_dim(D - 1));
    plus_nothing(zeros, b.is_tracked(), || b.sum_dim(D - 2))
}

/// `x · W + b` over the last axis of `x`, `W [d_in, d_out]`, of which any side may be zero. See [`matmul`].
pub(crate) fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    let [d_in, d_out] = weight.dims();
    if !is_empty(&x) && !is_empty(&weight) {
        return module::linear(x, weight, bias);
    }
    let mut dims = x.dims();
    assert_eq!(dims[D - 1], d_in, "inner dimensions of x and the weight");
    dims[D - 1] = d_out;
    let y = Tensor::zeros(dims, (&x.device(), x.dtype()));
    let y = plus_nothing(y, x.is_tracked(), || x.sum_dim(D - 1));
    let y = plus_nothing(y, weight.is_tracked(), || {
        let mut columns = [1; D];
        columns[D - 1] = d_out;
        reshape(weight.sum_dim(0), columns)
    });
    match bias {
        None => y,
        Some(bias) => y + row(bias),
    }
}

/// A vector as the last axis of a tensor of `D` axes. Burn's own `unsqueeze` panics on a vector of no values.
pub(crate) fn row<const D: usize>(vector: Tensor<1>) -> Tensor<D> {
    let mut dims = [1; D];
    dims[D - 1] = vector.dims()[0];
    reshape(vector, dims)
}

/// An empty product, and an empty sum of one of its operands, if that is tracked: the gradient of the operand is zero then, and not
/// missing. Either the result is empty, or the sum has no terms.
fn plus_nothing<const D: usize>(
    product: Tensor<D>,
    is_tracked: bool,
    sum: impl FnOnce() -> Tensor<D>,
) -> Tensor<D> {
    match is_tracked {
        true => product + sum(),
        false => product,
    }
}

/// Zeros in place of the values, whatever they are, and a gradient of zeros.
pub(crate) fn cleared<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if is_empty(&x) {
        return x;
    }
    let all = Tensor::<D, Bool>::full(x.shape(), true, &x.device());
    x.mask_fill(all, 0.0)
}

/// Whether a side is zero.
pub(crate) fn is_empty<const D: usize>(x: &Tensor<D>) -> bool {
    x.dims().contains(&0)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device, Distribution};

    use super::*;

    /// Every side of `[batch, m, k] · [batch or 1, k, n]` and of `[batch, m, k] · [k, n]`, zero or not.
    #[test]
    fn products_with_a_side_of_zero_are_empty_sums() {
        let device = Device::default().autodiff();
        let random = |dims: [usize; 3], dtype: DType| {
            let x = Tensor::<3>::random(dims, Distribution::Default, &device);
            x.cast(dtype).detach().require_grad()
        };
        let sides = [0, 1, 3];
        for dtype in [DType::F32, DType::BF16] {
            for [batch, m] in sides.map(|batch| sides.map(|m| [batch, m])).concat() {
                for [k, n] in sides.map(|k| sides.map(|n| [k, n])).concat() {
                    for shared in [false, true] {
                        let a = random([batch, m, k], dtype);
                        let b = random([if shared { 1 } else { batch }, k, n], dtype);
                        let y = matmul(a.clone(), b.clone());
                        check(y, [batch, m, n], [&a, &b]);
                    }
                    let x = random([batch, m, k], dtype);
                    let weight = random([1, k, n], dtype);
                    let own = reshape(weight.clone(), [k, n]);
                    let y = linear(x.clone(), own, None);
                    check(y, [batch, m, n], [&x, &weight]);
                }
            }
        }
    }

    fn check(y: Tensor<3>, dims: [usize; 3], operands: [&Tensor<3>; 2]) {
        assert_eq!(y.dims(), dims);
        let empty = operands.iter().any(|operand| is_empty(operand));
        let values: Vec<f32> = y.clone().try_into_vec_as().unwrap();
        assert!(
            !empty || values.iter().all(|value| *value == 0.0),
            "{values:?}"
        );
        let gradients = y.sum().backward();
        for operand in operands {
            let gradient = operand.grad(&gradients).expect("a gradient");
            assert_eq!(gradient.dims(), operand.dims());
            let values: Vec<f32> = gradient.try_into_vec_as().unwrap();
            assert!(
                !empty || values.iter().all(|value| *value == 0.0),
                "{values:?}"
            );
        }
    }

    #[test]
    fn a_reshape_takes_zeros_for_zeros() {
        let device = Device::default();
        let x = Tensor::<3>::zeros([2, 0, 64], &device);
        assert_eq!(reshape(x.clone(), [0, 64]).dims(), [0, 64]);
        assert_eq!(reshape(x, [64, 3, 0, 5]).dims(), [64, 3, 0, 5]);
        let x = Tensor::<2, Int>::zeros([0, 3], &device);
        assert_eq!(reshape_int(x, [0]).dims(), [0]);
    }
}
