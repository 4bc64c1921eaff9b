//! The operations of [`Nf4Ops`](crate::nf4::Nf4Ops) on the tensors of Burn's CPU backend.

use std::mem::MaybeUninit;

use burn::backend::{
    Flex,
    ops::FloatTensorOps,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{DType, FloatDType, TensorData};
use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::vec::HalfFloatVecExt;
use half::{bf16, f16};

use super::codes::Codes;
use super::dequantize::{self, Rounded};
use super::few_rows::{self, FewRows};
use super::packed::{Packed, Scales};
use super::precision::Precision;
use super::row_norms;
use crate::cpu::flex::into_contiguous;
use crate::cpu::matmul::element::{F32, Pairs};
use crate::cpu::matmul::low_rank::LowRank;
use crate::cpu::matmul::{many_rows, transposed};
use crate::cpu::output::written;
use crate::cpu::simd::Isa;
use crate::nf4::ops::{Nf4ScaleTensors, Nf4Tensors};
use crate::nf4::portable::matmul as multiply;

type Float = FloatTensor<Flex>;

/// The dense weight `[d_out, d_in]`.
pub(in crate::nf4) fn dequantize(weight: Nf4Tensors<Flex>, dtype: FloatDType) -> Float {
    fn data<T: Rounded + burn::tensor::Element + Pod>(w: &Packed) -> TensorData {
        let mut values = bytemuck::zeroed_vec::<T>(w.len());
        dequantize::dequantize(Isa::best(), w, &mut values);
        TensorData::new(values, w.shape)
    }
    Float::from_data(with_packed(&weight, |w| match dtype {
        FloatDType::F32 | FloatDType::Flex32 => data::<f32>(w),
        FloatDType::BF16 => data::<bf16>(w),
        FloatDType::F16 => data::<f16>(w),
        FloatDType::F64 => data::<f64>(w),
    }))
}

/// `‖W_o‖²` of the rows: `[d_out]`.
pub(in crate::nf4) fn row_norms_squared(weight: Nf4Tensors<Flex>) -> Float {
    let mut norms = vec![0.0; weight.shape[0]];
    with_packed(&weight, |w| row_norms::squared(Isa::best(), w, &mut norms));
    Float::from_data(TensorData::new(norms, [weight.shape[0]]))
}

/// `u · v`, of `[rows, r]` and `[r, columns]`.
type Term = Option<(Float, Float)>;

/// `x · Wᵀ + u · v`: `[rows, d_in] -> [rows, d_out]`.
pub(in crate::nf4) fn matmul(x: Float, weight: Nf4Tensors<Flex>, term: Term) -> Float {
    let [d_out, d_in] = weight.shape;
    product::<Forward>(x, weight, [d_in, d_out], term)
}

/// `y · W + u · v`: `[rows, d_out] -> [rows, d_in]`.
pub(in crate::nf4) fn matmul_transposed(y: Float, weight: Nf4Tensors<Flex>, term: Term) -> Float {
    let [d_out, d_in] = weight.shape;
    product::<Transposed>(y, weight, [d_out, d_in], term)
}

/// A product, from and to rows of one dtype.
trait Product {
    /// Writes every value of the output.
    fn run<E: Codes + FewRows>(
        w: &Packed,
        input: &[E::Value],
        term: LowRank,
        output: &mut [MaybeUninit<E::Value>],
    );

    /// The same with a dense weight `[d_out, d_in]`.
    fn dense(w: Float) -> Float;
}

struct Forward;

impl Product for Forward {
    fn run<E: Codes + FewRows>(
        w: &Packed,
        x: &[E::Value],
        term: LowRank,
        y: &mut [MaybeUninit<E::Value>],
    ) {
        match y.len() / w.shape[0] <= few_rows::MOST {
            true => E::product(Isa::best(), w, x, term, y),
            false => many_rows::product::<E, _>(Isa::best(), w, x, term, y),
        }
    }

    fn dense(w: Float) -> Float {
        Flex::float_transpose(w)
    }
}

struct Transposed;

impl Product for Transposed {
    fn run<E: Codes + FewRows>(
        w: &Packed,
        y: &[E::Value],
        term: LowRank,
        x: &mut [MaybeUninit<E::Value>],
    ) {
        transposed::product::<E, _>(Isa::best(), w, y, term, x)
    }

    fn dense(w: Float) -> Float {
        w
    }
}

/// The product of `input [rows, from]` with a weight: `[rows, to]`, in the dtype of `input`.
///
/// The weight is rounded to the dtype of `input`, as bitsandbytes does it; sums and the low-rank term are f32. bf16 is
/// multiplied in pairs; what has no pairs, f16 and bf16 of an odd length, is widened to f32. f64 takes a dense weight.
fn product<P: Product>(
    input: Float,
    weight: Nf4Tensors<Flex>,
    [from, to]: [usize; 2],
    term: Term,
) -> Float {
    if input.dtype() == DType::F64 {
        let weight = P::dense(dequantize(weight, FloatDType::F64));
        let output = multiply::<Flex>(input, weight);
        return match term {
            None => output,
            Some((u, v)) => {
                let [u, v] = [u, v].map(|factor| Flex::float_cast(factor, FloatDType::F64));
                Flex::float_add(output, multiply::<Flex>(u, v))
            }
        };
    }
    let input = into_contiguous(input);
    let rows = input.layout().shape()[0];
    debug_assert_eq!(input.layout().shape()[1], from);
    let term = term.map(|(u, v)| {
        [u, v].map(|factor| match factor.dtype() {
            DType::F32 => into_contiguous(factor),
            _ => into_contiguous(Flex::float_cast(factor, FloatDType::F32)),
        })
    });
    let term = match &term {
        None => LowRank::NONE,
        Some([u, v]) => LowRank {
            rank: v.layout().shape()[0],
            u: slice(u),
            v: slice(v),
        },
    };
    let len = rows * to;
    let widened = |input: &[f32], precision| run::<P, F32>(&weight, precision, input, term, len);
    let shape = [rows, to];
    Float::from_data(match input.dtype() {
        DType::BF16 => {
            let (input, precision) = (slice::<bf16>(&input), Precision::Bf16);
            let output = match from.is_multiple_of(2) {
                true => run::<P, Pairs>(&weight, precision, input, term, len),
                false => Vec::from_f32_slice(&widened(&input.to_f32_vec(), precision)),
            };
            TensorData::new(output, shape)
        }
        DType::F16 => {
            let input = slice::<f16>(&input).to_f32_vec();
            let output = widened(&input, Precision::F16);
            TensorData::new(Vec::<f16>::from_f32_slice(&output), shape)
        }
        _ => TensorData::new(widened(slice(&input), Precision::F32), shape),
    })
}

fn run<P: Product, E: Codes + FewRows>(
    weight: &Nf4Tensors<Flex>,
    precision: Precision,
    input: &[E::Value],
    term: LowRank,
    len: usize,
) -> Vec<E::Value> {
    if input.is_empty() || len == 0 {
        return vec![E::round(0.0); len];
    }
    let write = |[output]: [&mut [_]; 1]| {
        with_packed(weight, |w| {
            P::run::<E>(&w.rounded_to(precision), input, term, output);
        });
    };
    // SAFETY: a product writes every value.
    let [output] = unsafe { written([len], write) };
    output
}

fn slice<T: burn::tensor::Element + Pod>(tensor: &Float) -> &[T] {
    tensor.as_slice().expect("contiguous, and of this dtype")
}

/// The 32-bit words of a contiguous tensor, seen as something else.
fn words<T: Pod>(tensor: &IntTensor<Flex>) -> &[T] {
    let words: &[i32] = tensor.as_slice().expect("contiguous 32-bit words");
    bytemuck::cast_slice(words)
}

/// Lends the tensors of a weight to a kernel.
pub(crate) fn with_packed<T>(weight: &Nf4Tensors<Flex>, f: impl FnOnce(&Packed) -> T) -> T {
    let contiguous = |tensor: &IntTensor<Flex>| match tensor.is_contiguous() {
        true => tensor.clone(),
        false => tensor.to_contiguous(),
    };
    let codes = contiguous(&weight.codes);
    let pack = |scales| Packed::new(words(&codes), scales, weight.shape, weight.block_size);
    match &weight.scales {
        Nf4ScaleTensors::Plain(absmax) => f(&pack(Scales::Plain(words(&contiguous(absmax))))),
        Nf4ScaleTensors::Double(scales, nested) => {
            let (scales, nested) = (contiguous(scales), contiguous(nested));
            let (&offset, absmax) = words(&nested).split_last().expect("an offset");
            f(&pack(Scales::Double(words(&scales), absmax, offset)))
        }
    }
}
