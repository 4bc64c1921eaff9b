//! Products with a packed NF4 weight as operations of a Burn backend.
//!
//! With `W = dequantize(codes, scales)` of shape `[d_out, d_in]`:
//!
//! * dequantise: `W`
//! * product: `y = x · Wᵀ`, `[rows, d_in] -> [rows, d_out]`, the forward of a linear layer;
//! * transposed product: `dx = dy · W`, `[rows, d_out] -> [rows, d_in]`, its backward;
//! * the product with a low-rank change of the weight, `y = x · (Wᵀ + s·A·B)`, with `A [d_in, r]` and `B [r, d_out]`.
//!
//! What they are under autodiff stands in [`autodiff`](super::autodiff).

// `backend_extension` checks the features of this crate and of Burn in what it generates.
#![allow(unexpected_cfgs)]
// Burn deprecates its ndarray backend; it is served for as long as Burn has it.
#![cfg_attr(feature = "ndarray", allow(deprecated))]

use burn::backend::{
    Backend, Dispatch, DispatchTensorKind, ExtensionType, backend_extension,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{FloatDType, Int, Tensor};

#[cfg(feature = "flex")]
use super::cpu::flex;
use super::portable;
#[cfg(feature = "flex")]
use crate::cpu::flex as low_rank;
use crate::tensor::matmul as multiply;

/// The tensors of one packed weight on a backend; see [`Nf4Weight`](super::Nf4Weight) for what they hold.
#[derive(Clone, Debug, ExtensionType)]
pub struct Nf4Tensors<B: Backend> {
    /// Packed codes as little-endian 32-bit words, `[ceil(ceil(n / 2) / 4)]`.
    pub codes: IntTensor<B>,
    /// The scales of the blocks.
    #[extension_type]
    pub scales: Nf4ScaleTensors<B>,
    /// Shape `[d_out, d_in]` of the weight.
    pub shape: [usize; 2],
    /// Consecutive values, row-major, that share a scale.
    pub block_size: usize,
}

/// The scales of a packed weight on a backend.
#[derive(Clone, Debug, ExtensionType)]
pub enum Nf4ScaleTensors<B: Backend> {
    /// The bits of one f32 a block, `[blocks]`.
    Plain(IntTensor<B>),
    /// Doubly quantised: four 8-bit codes a word, `[ceil(blocks / 4)]`; then the bits of one f32 for each group of 256
    /// blocks and of the f32 offset, `[ceil(blocks / 256) + 1]`.
    Double(IntTensor<B>, IntTensor<B>),
}

/// Operations on packed NF4 weights, for every backend this crate was built with.
///
/// The default bodies are composed of the backend's own tensor operations. While they run they hold one dense weight, and without
/// fusion of operations up to 12 bytes per value of it.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "cuda", feature = "rocm", feature = "wgpu")),
    Autodiff
)]
pub trait Nf4Ops: Backend {
    /// The dense weight `[d_out, d_in]`: one f32 product a value, then rounded once to `dtype`.
    fn nf4_dequantize(
        #[extension_type] weight: Nf4Tensors<Self>,
        dtype: FloatDType,
    ) -> FloatTensor<Self> {
        portable::dequantize::<Self>(weight, dtype)
    }

    /// `‖W_o‖²` of the rows of `W`, in f32: `[d_out]`.
    fn nf4_row_norms_squared(#[extension_type] weight: Nf4Tensors<Self>) -> FloatTensor<Self> {
        portable::row_norms_squared::<Self>(weight)
    }

    /// `x · Wᵀ`: `[rows, d_in] -> [rows, d_out]`, in the dtype of `x`.
    fn nf4_matmul(
        x: FloatTensor<Self>,
        #[extension_type] weight: Nf4Tensors<Self>,
    ) -> FloatTensor<Self> {
        let weight = Self::nf4_dequantize(weight, portable::float_dtype::<Self>(&x));
        portable::matmul::<Self>(x, Self::float_transpose(weight))
    }

    /// `y · W`: `[rows, d_out] -> [rows, d_in]`, in the dtype of `y`.
    fn nf4_matmul_transposed(
        y: FloatTensor<Self>,
        #[extension_type] weight: Nf4Tensors<Self>,
    ) -> FloatTensor<Self> {
        let weight = Self::nf4_dequantize(weight, portable::float_dtype::<Self>(&y));
        portable::matmul::<Self>(y, weight)
    }

    /// `x · Wᵀ + u · v`, in the dtype of `x`: `u [rows, r]`, `v [r, d_out]`, both of one dtype.
    fn nf4_matmul_add(
        x: FloatTensor<Self>,
        #[extension_type] weight: Nf4Tensors<Self>,
        u: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let y = Self::nf4_matmul(x, weight);
        let term = portable::matmul::<Self>(u, v);
        let term = portable::cast::<Self>(term, portable::float_dtype::<Self>(&y));
        Self::float_add(y, term)
    }

    /// `y · W + u · v`, in the dtype of `y`: `u [rows, r]`, `v [r, d_in]`, both of one dtype.
    fn nf4_matmul_transposed_add(
        y: FloatTensor<Self>,
        #[extension_type] weight: Nf4Tensors<Self>,
        u: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let x = Self::nf4_matmul_transposed(y, weight);
        let term = portable::matmul::<Self>(u, v);
        let term = portable::cast::<Self>(term, portable::float_dtype::<Self>(&x));
        Self::float_add(x, term)
    }

    /// `x · (Wᵀ + scale · a · b)`, in the dtype of `x`: `a [d_in, r]`, `b [r, d_out]`, both of one dtype, in which the
    /// low-rank part is computed.
    fn nf4_matmul_low_rank(
        x: FloatTensor<Self>,
        #[extension_type] weight: Nf4Tensors<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self> {
        let u = Self::low_rank_input(x.clone(), a, scale);
        Self::nf4_matmul_add(x, weight, u, b)
    }

    /// `scale · x · a`: `[rows, d] · [d, r] -> [rows, r]`, in the dtype of `a`.
    fn low_rank_input(x: FloatTensor<Self>, a: FloatTensor<Self>, scale: f64) -> FloatTensor<Self> {
        portable::scaled_matmul::<Self>(x, a, scale)
    }

    /// The gradient of `a`, `xᵀ · v`: `[rows, d]`, `[rows, r] -> [d, r]`, in the dtype of `v`.
    fn low_rank_gradient_a(x: FloatTensor<Self>, v: FloatTensor<Self>) -> FloatTensor<Self> {
        portable::gradient_a::<Self>(x, v)
    }

    /// The gradient of `b`, `uᵀ · dy`: `[rows, r]`, `[rows, d] -> [r, d]`, in the dtype of `u`.
    fn low_rank_gradient_b(u: FloatTensor<Self>, dy: FloatTensor<Self>) -> FloatTensor<Self> {
        portable::gradient_b::<Self>(u, dy)
    }
}

// Words are read as bytes by the kernels; elsewhere the composed operations serve.
#[cfg(all(feature = "flex", target_endian = "little"))]
impl Nf4Ops for burn::backend::Flex {
    fn nf4_dequantize(weight: Nf4Tensors<Self>, dtype: FloatDType) -> FloatTensor<Self> {
        flex::dequantize(weight, dtype)
    }

    fn nf4_row_norms_squared(weight: Nf4Tensors<Self>) -> FloatTensor<Self> {
        flex::row_norms_squared(weight)
    }

    fn nf4_matmul(x: FloatTensor<Self>, weight: Nf4Tensors<Self>) -> FloatTensor<Self> {
        flex::matmul(x, weight, None)
    }

    fn nf4_matmul_transposed(y: FloatTensor<Self>, weight: Nf4Tensors<Self>) -> FloatTensor<Self> {
        flex::matmul_transposed(y, weight, None)
    }

    fn nf4_matmul_add(
        x: FloatTensor<Self>,
        weight: Nf4Tensors<Self>,
        u: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        flex::matmul(x, weight, Some((u, v)))
    }

    fn nf4_matmul_transposed_add(
        y: FloatTensor<Self>,
        weight: Nf4Tensors<Self>,
        u: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        flex::matmul_transposed(y, weight, Some((u, v)))
    }

    fn low_rank_input(x: FloatTensor<Self>, a: FloatTensor<Self>, scale: f64) -> FloatTensor<Self> {
        match low_rank::serves(&x, &a) {
            true => low_rank::to_rank(&x, &a, scale),
            false => portable::scaled_matmul::<Self>(x, a, scale),
        }
    }

    fn low_rank_gradient_a(x: FloatTensor<Self>, v: FloatTensor<Self>) -> FloatTensor<Self> {
        match low_rank::serves(&x, &v) {
            true => low_rank::over_rows(&v, &x, true),
            false => portable::gradient_a::<Self>(x, v),
        }
    }

    fn low_rank_gradient_b(u: FloatTensor<Self>, dy: FloatTensor<Self>) -> FloatTensor<Self> {
        match low_rank::serves(&dy, &u) {
            true => low_rank::over_rows(&u, &dy, false),
            false => portable::gradient_b::<Self>(u, dy),
        }
    }
}

#[cfg(all(feature = "flex", target_endian = "big"))]
impl Nf4Ops for burn::backend::Flex {}

#[cfg(feature = "ndarray")]
impl Nf4Ops for burn::backend::NdArray {}

// The alias is the plain or the fusing backend, whichever Burn was built with, so that a user's own `fusion` feature
// cannot leave it without an implementation.
#[cfg(any(feature = "cuda", feature = "rocm", feature = "wgpu"))]
impl Nf4Ops for burn::backend::Cube {}

/// Whether this crate was built with an implementation of [`Nf4Ops`] for the backend of `tensor`.
///
/// The user's own Burn may hold a backend that this crate's features do not name; a call on it must not enter the
/// extension, whose generated routing panics there.
fn has_implementation(tensor: &Tensor<1, Int>) -> bool {
    match tensor.clone().into_dispatch().kind {
        #[cfg(feature = "flex")]
        DispatchTensorKind::Flex(_) => true,
        #[cfg(feature = "ndarray")]
        DispatchTensorKind::NdArray(_) => true,
        #[cfg(any(feature = "cuda", feature = "rocm", feature = "wgpu"))]
        DispatchTensorKind::Cube(_) => true,
        #[allow(unreachable_patterns)]
        _ => false,
    }
}

pub(super) fn dequantize(
    routing: &Tensor<1, Int>,
    weight: Nf4Tensors<Dispatch>,
    dtype: FloatDType,
) -> Tensor<2> {
    Tensor::from_dispatch(if has_implementation(routing) {
        <Dispatch as Nf4Ops>::nf4_dequantize(weight, dtype)
    } else {
        portable::dequantize::<Dispatch>(weight, dtype)
    })
}

pub(super) fn row_norms_squared(
    routing: &Tensor<1, Int>,
    weight: Nf4Tensors<Dispatch>,
) -> Tensor<1> {
    Tensor::from_dispatch(if has_implementation(routing) {
        <Dispatch as Nf4Ops>::nf4_row_norms_squared(weight)
    } else {
        portable::row_norms_squared::<Dispatch>(weight)
    })
}

pub(super) fn matmul(
    routing: &Tensor<1, Int>,
    x: Tensor<2>,
    weight: Nf4Tensors<Dispatch>,
) -> Tensor<2> {
    if has_implementation(routing) {
        Tensor::from_dispatch(<Dispatch as Nf4Ops>::nf4_matmul(x.into_dispatch(), weight))
    } else {
        let dtype = FloatDType::from(x.dtype());
        multiply(x, dequantize(routing, weight, dtype).transpose())
    }
}

pub(super) fn matmul_transposed(
    routing: &Tensor<1, Int>,
    y: Tensor<2>,
    weight: Nf4Tensors<Dispatch>,
) -> Tensor<2> {
    if has_implementation(routing) {
        Tensor::from_dispatch(<Dispatch as Nf4Ops>::nf4_matmul_transposed(
            y.into_dispatch(),
            weight,
        ))
    } else {
        let dtype = FloatDType::from(y.dtype());
        multiply(y, dequantize(routing, weight, dtype))
    }
}

pub(super) fn matmul_low_rank(
    routing: &Tensor<1, Int>,
    x: Tensor<2>,
    weight: Nf4Tensors<Dispatch>,
    [a, b]: [Tensor<2>; 2],
    scale: f64,
) -> Tensor<2> {
    if has_implementation(routing) {
        Tensor::from_dispatch(<Dispatch as Nf4Ops>::nf4_matmul_low_rank(
            x.into_dispatch(),
            weight,
            a.into_dispatch(),
            b.into_dispatch(),
            scale,
        ))
    } else {
        let dtype = FloatDType::from(x.dtype());
        let u = multiply(x.clone().cast(a.dtype()), a).mul_scalar(scale);
        matmul(routing, x, weight) + multiply(u, b).cast(dtype)
    }
}
