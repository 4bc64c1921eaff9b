//! The operations of [`Nf4Ops`](crate::nf4::Nf4Ops) on the tensors of Burn's CPU backend.

use burn::backend::{
    Flex,
    ops::FloatTensorOps,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{DType, Element, FloatDType, TensorData};
use half::slice::HalfFloatSliceExt;
use half::vec::HalfFloatVecExt;
use half::{bf16, f16};

use super::dequantize::{self, Rounded};
use super::packed::{Packed, Scales};
use super::simd::Isa;
use super::{few_rows, many_rows, transposed};
use crate::nf4::ops::{Nf4ScaleTensors, Nf4Tensors};

type Float = FloatTensor<Flex>;

/// The dense weight `[d_out, d_in]`.
pub(in crate::nf4) fn dequantize(weight: Nf4Tensors<Flex>, dtype: FloatDType) -> Float {
    fn data<T: Rounded + Element>(w: &Packed, zero: T) -> TensorData {
        let mut values = vec![zero; w.len()];
        dequantize::dequantize(Isa::best(), w, &mut values);
        TensorData::new(values, w.shape)
    }
    Float::from_data(with_packed(&weight, |w| match dtype {
        FloatDType::F32 | FloatDType::Flex32 => data(w, 0_f32),
        FloatDType::BF16 => data(w, bf16::ZERO),
        FloatDType::F16 => data(w, f16::ZERO),
        FloatDType::F64 => data(w, 0_f64),
    }))
}

/// `x · Wᵀ`: `[rows, d_in] -> [rows, d_out]`.
pub(in crate::nf4) fn matmul(x: Float, weight: Nf4Tensors<Flex>) -> Float {
    if x.dtype() == DType::F64 {
        let weight = dequantize(weight, FloatDType::F64);
        return Flex::float_matmul(x, Flex::float_transpose(weight));
    }
    let [d_out, d_in] = weight.shape;
    product(x, [d_in, d_out], |x, y| {
        with_packed(&weight, |w| match y.len() / d_out <= few_rows::MOST {
            true => few_rows::product(Isa::best(), w, x, y),
            false => many_rows::product(Isa::best(), w, x, y),
        })
    })
}

/// `y · W`: `[rows, d_out] -> [rows, d_in]`.
pub(in crate::nf4) fn matmul_transposed(y: Float, weight: Nf4Tensors<Flex>) -> Float {
    if y.dtype() == DType::F64 {
        return Flex::float_matmul(y, dequantize(weight, FloatDType::F64));
    }
    let [d_out, d_in] = weight.shape;
    product(y, [d_out, d_in], |y, x| {
        with_packed(&weight, |w| transposed::product(Isa::best(), w, y, x))
    })
}

/// A product from `[rows, from]` to `[rows, to]` in f32, whose result is rounded to the dtype of `input`.
fn product(input: Float, [from, to]: [usize; 2], kernel: impl Fn(&[f32], &mut [f32])) -> Float {
    let input = input.to_contiguous();
    let rows = input.layout().shape()[0];
    debug_assert_eq!(input.layout().shape()[1], from);
    let run = |input: &[f32]| {
        let mut output = vec![0.0; rows * to];
        if !input.is_empty() && !output.is_empty() {
            kernel(input, &mut output);
        }
        output
    };
    let shape = [rows, to];
    Float::from_data(match input.dtype() {
        DType::BF16 => {
            let input = run(&slice::<bf16>(&input).to_f32_vec());
            TensorData::new(Vec::<bf16>::from_f32_slice(&input), shape)
        }
        DType::F16 => {
            let input = run(&slice::<f16>(&input).to_f32_vec());
            TensorData::new(Vec::<f16>::from_f32_slice(&input), shape)
        }
        _ => TensorData::new(run(slice(&input)), shape),
    })
}

fn slice<T: Element + bytemuck::Pod>(tensor: &Float) -> &[T] {
    tensor.as_slice().expect("contiguous, and of this dtype")
}

/// The 32-bit words of a contiguous tensor, seen as something else.
fn words<T: bytemuck::Pod>(tensor: &IntTensor<Flex>) -> &[T] {
    let words: &[i32] = tensor.as_slice().expect("contiguous 32-bit words");
    bytemuck::cast_slice(words)
}

/// Lends the tensors of a weight to a kernel.
fn with_packed<T>(weight: &Nf4Tensors<Flex>, f: impl FnOnce(&Packed) -> T) -> T {
    let contiguous = |tensor: &IntTensor<Flex>| tensor.to_contiguous();
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
