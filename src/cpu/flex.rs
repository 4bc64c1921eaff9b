//! Burn's tensors in and out of kernels, f32 or bf16, and the products with low-rank factors on them.

use std::mem::MaybeUninit;

use burn::backend::{Flex, tensor::FloatTensor};
use burn::tensor::{DType, TensorData};

use super::matmul::skinny::{self, Factor};
use super::output::written;
use super::simd::Isa;
use super::value::Value;

pub(crate) type Float = FloatTensor<Flex>;

/// Calls a function with the type of the values of a tensor, f32 or bf16.
macro_rules! of_dtype {
    ($tensor:expr, $function:ident($($argument:expr),* $(,)?)) => {
        match $tensor.dtype() {
            burn::tensor::DType::BF16 => $function::<half::bf16>($($argument),*),
            _ => $function::<f32>($($argument),*),
        }
    };
}
pub(crate) use of_dtype;

pub(crate) fn shape<const D: usize>(tensor: &Float) -> [usize; D] {
    tensor.layout().shape().dims()
}

/// The length of the last dimension.
pub(crate) fn last(tensor: &Float) -> usize {
    let shape = tensor.layout().shape();
    shape[shape.num_dims() - 1]
}

pub(crate) fn slice<V: Value>(contiguous: &Float) -> &[V] {
    let values = contiguous.as_slice();
    values.expect("contiguous, and of this dtype")
}

/// A matrix of which either rows or columns are contiguous and without gaps: itself, or a copy.
pub(crate) fn with_whole_lines(matrix: &Float) -> Float {
    let [rows, columns] = shape(matrix);
    match *matrix.layout().strides() {
        [stride, 1] if stride == columns as isize => matrix.clone(),
        [1, stride] if stride == rows as isize => matrix.clone(),
        _ => matrix.to_contiguous(),
    }
}

/// The values of such a matrix, as they lie.
pub(crate) fn lines<V: Value>(matrix: &Float) -> &[V] {
    let layout = matrix.layout();
    &matrix.storage()[layout.start_offset()..][..layout.num_elements()]
}

/// Tensors of the shapes of `like`, their values written by `f`.
///
/// # Safety
///
/// `f` writes every value.
pub(crate) unsafe fn filled<V: Value, const N: usize>(
    like: [&Float; N],
    f: impl FnOnce([&mut [MaybeUninit<V>]; N]),
) -> [Float; N] {
    let mut shapes = like
        .map(|tensor| tensor.layout().shape().clone())
        .into_iter();
    // SAFETY: as above.
    let vectors = unsafe { written(like.map(|tensor| tensor.layout().num_elements()), f) };
    vectors.map(|values| {
        let shape = shapes.next().expect("a shape for each");
        Float::from_data(TensorData::new(values, shape))
    })
}

/// Whether the products below are for these activations and this factor.
pub(crate) fn serves(x: &Float, factor: &Float) -> bool {
    matches!(x.dtype(), DType::F32 | DType::BF16)
        && factor.dtype() == DType::F32
        && factor.layout().strides().iter().all(|&stride| stride >= 0)
        && x.layout().num_elements() > 0
        && factor.layout().num_elements() > 0
}

/// `scale · x · a`: `[…, d] · [d, r] -> [rows, r]`.
pub(crate) fn to_rank(x: &Float, a: &Float, scale: f64) -> Float {
    fn of<V: Value>(x: &Float, a: Factor, scale: f32) -> Float {
        let [d, rank] = a.shape;
        let x = slice::<V>(x);
        let rows = x.len() / d;
        let write = |[out]: [&mut [_]; 1]| skinny::to_rank(Isa::best(), x, a, scale, out);
        // SAFETY: all is written.
        let [u] = unsafe { written([rows * rank], write) };
        Float::from_data(TensorData::new(u, [rows, rank]))
    }
    let strides = a.layout().strides();
    let factor = Factor {
        values: &a.storage()[a.layout().start_offset()..],
        shape: shape(a),
        strides: [0, 1].map(|axis| strides[axis] as usize),
    };
    let x = x.to_contiguous();
    of_dtype!(x, of(&x, factor, scale as f32))
}

/// `uᵀ · y`: `u [rows, r]`, `y […, d]`, the result `[r, d]`, or `[d, r]` if `turned`.
pub(crate) fn over_rows(u: &Float, y: &Float, turned: bool) -> Float {
    fn of<V: Value>(u: &Float, y: &Float, turned: bool) -> Float {
        let (rank, d) = (last(u), last(y));
        let write = |[out]: [&mut [_]; 1]| {
            skinny::over_rows(Isa::best(), slice(u), slice::<V>(y), rank, turned, out);
        };
        // SAFETY: all is written.
        let [gradient] = unsafe { written([rank * d], write) };
        let shape = if turned { [d, rank] } else { [rank, d] };
        Float::from_data(TensorData::new(gradient, shape))
    }
    let (u, y) = (u.to_contiguous(), y.to_contiguous());
    of_dtype!(y, of(&u, &y, turned))
}
