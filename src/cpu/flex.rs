//! Burn's tensors in and out of kernels, f32 or bf16, and the products with low-rank factors on them.
//!
//! A tensor of Burn is a view of memory: offset, narrowed, transposed, expanded (strides of zero) or flipped (negative ones). Every
//! kernel takes its operands by one of these, which read a view where it lies if the kernel can, and copy it otherwise:
//!
//! | as | read where it lies | for |
//! |---|---|---|
//! | [`contiguous`] | row-major without gaps, from any offset | activations and their gradients |
//! | [`with_whole_lines`], [`lines`] | row-major or column-major without gaps | weights |
//! | [`with_whole_rows`], [`heads`](crate::fused::cpu) | the last dimension contiguous, any other strides that are not negative | queries, keys, values |
//! | [`with_forward_strides`], [`factor`] | any strides that are not negative | factors of a low rank |
//!
//! Operands may have a side of zero: a sum of no products is zero.

use std::mem::MaybeUninit;

use burn::backend::{Flex, tensor::FloatTensor};
use burn::tensor::{DType, Shape, TensorData};

use super::matmul::factor::Factor;
use super::matmul::skinny;
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

/// The number of rows, each as long as the last dimension.
pub(crate) fn rows(tensor: &Float) -> usize {
    let shape = tensor.layout().shape();
    shape[..shape.num_dims() - 1].iter().product()
}

pub(crate) fn is_empty(tensor: &Float) -> bool {
    tensor.layout().num_elements() == 0
}

/// Zeros of the dtype of `like`.
pub(crate) fn zeros(shape: impl Into<Shape>, like: &Float) -> Float {
    Float::zeros(shape.into(), like.dtype())
}

/// A copy, row-major without gaps. Burn's own copy panics on an empty tensor that was narrowed or flipped.
fn copied(tensor: &Float) -> Float {
    match is_empty(tensor) {
        true => zeros(tensor.layout().shape().clone(), tensor),
        false => tensor.to_contiguous(),
    }
}

/// Row-major without gaps: itself, or a copy.
pub(crate) fn contiguous(tensor: &Float) -> Float {
    into_contiguous(tensor.clone())
}

/// [`contiguous`] of a tensor that is not needed any more.
pub(crate) fn into_contiguous(tensor: Float) -> Float {
    match tensor.is_contiguous() && !is_empty(&tensor) {
        true => tensor,
        false => copied(&tensor),
    }
}

/// The values of a contiguous tensor.
pub(crate) fn slice<V: Value>(contiguous: &Float) -> &[V] {
    let values = contiguous.as_slice();
    values.expect("contiguous, and of this dtype")
}

/// A matrix of which either rows or columns are contiguous and without gaps: itself, or a copy.
pub(crate) fn with_whole_lines(matrix: &Float) -> Float {
    let [rows, columns] = shape(matrix);
    if is_empty(matrix) {
        return copied(matrix);
    }
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

/// A tensor `[batch, heads, seq, d]` whose rows are contiguous and whose strides are not negative: itself, or a copy.
pub(crate) fn with_whole_rows(tensor: Float) -> Float {
    match tensor.layout().strides()[3] == 1 && is_forward(&tensor) {
        true => tensor,
        false => copied(&tensor),
    }
}

/// A tensor without negative strides: itself, or a copy.
pub(crate) fn with_forward_strides(tensor: &Float) -> Float {
    match is_forward(tensor) {
        true => tensor.clone(),
        false => copied(tensor),
    }
}

fn is_forward(tensor: &Float) -> bool {
    tensor.layout().strides().iter().all(|&stride| stride >= 0)
}

/// A matrix of f32 without negative strides, where it lies.
pub(crate) fn factor(matrix: &Float) -> Factor<'_> {
    let layout = matrix.layout();
    let strides = [0, 1].map(|axis| layout.strides()[axis]);
    let strides = strides.map(|stride| usize::try_from(stride).expect("no negative stride"));
    let values = match is_empty(matrix) {
        true => &[],
        false => &matrix.storage()[layout.start_offset()..],
    };
    Factor::new(values, shape(matrix), strides)
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
    matches!(x.dtype(), DType::F32 | DType::BF16) && factor.dtype() == DType::F32
}

/// `scale · x · a`: `[…, d] · [d, r] -> [rows, r]`.
pub(crate) fn to_rank(x: &Float, a: &Float, scale: f64) -> Float {
    fn of<V: Value>(x: &Float, a: Factor, [rows, rank]: [usize; 2], scale: f32) -> Float {
        let write = |[out]: [&mut [_]; 1]| {
            skinny::to_rank(Isa::best(), slice::<V>(x), a, scale, out);
        };
        // SAFETY: all is written.
        let [u] = unsafe { written([rows * rank], write) };
        Float::from_data(TensorData::new(u, [rows, rank]))
    }
    let dims @ [_, rank] = [rows(x), last(a)];
    if is_empty(x) || rank == 0 {
        return zeros(dims, a);
    }
    let (x, a) = (contiguous(x), with_forward_strides(a));
    of_dtype!(x, of(&x, factor(&a), dims, scale as f32))
}

/// `uᵀ · y`: `u [rows, r]`, `y […, d]`, the result `[r, d]`, or `[d, r]` if `turned`.
pub(crate) fn over_rows(u: &Float, y: &Float, turned: bool) -> Float {
    fn of<V: Value>(u: &Float, y: &Float, turned: bool, shape: [usize; 2]) -> Float {
        let rank = last(u);
        let write = |[out]: [&mut [_]; 1]| {
            skinny::over_rows(Isa::best(), slice(u), slice::<V>(y), rank, turned, out);
        };
        // SAFETY: all is written.
        let [gradient] = unsafe { written([shape[0] * shape[1]], write) };
        Float::from_data(TensorData::new(gradient, shape))
    }
    let (rank, d) = (last(u), last(y));
    let shape = if turned { [d, rank] } else { [rank, d] };
    if is_empty(u) || is_empty(y) {
        return zeros(shape, u);
    }
    let (u, y) = (contiguous(u), contiguous(y));
    of_dtype!(y, of(&u, &y, turned, shape))
}
