//! NF4 dequantisation in a backend's ordinary tensor operations, for devices without a kernel of their own.
//!
//! `W[i] = codebook[code[i]] · scale[i / block_size]`, with codes and scales unpacked from 32-bit words by shifts and
//! masks. No operation of Burn reinterprets an integer's bits as a float, so a scale is rebuilt from its fields:
//! `±(mantissa + hidden bit) · 2^-23 · 2^(exponent - 127)`, every step exact (a subnormal scale may be flushed to zero
//! by a GPU).
//!
//! # Memory
//!
//! A backend that fuses operations may make the weight in one pass. Without fusion each operation has its result in memory. For a
//! weight of `n` values that is at one moment `n` integers of single codes and their concatenation, and at another `n` values, `n`
//! repeated scales and their product: 12 bytes per value at the most, where the dense weight takes 4 in f32 and 2 in bf16. (Where
//! integers have 64 bits, 16.)

use burn::backend::{
    Backend, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{FloatDType, Shape, Slice, TensorData};

use super::codebook::CODEBOOK;
use super::double::{DYNAMIC_MAP, NESTED_BLOCK_SIZE};
use super::ops::{Nf4ScaleTensors, Nf4Tensors};
use super::words::{BYTE_SHIFTS, CODE_SHIFTS};

/// The dtype of a float primitive.
pub(crate) fn float_dtype<B: Backend>(tensor: &FloatTensor<B>) -> FloatDType {
    tensor.dtype().into()
}

/// The dense weight `[d_out, d_in]`, computed in f32 and rounded once to `dtype`.
pub(super) fn dequantize<B: Backend>(weight: Nf4Tensors<B>, dtype: FloatDType) -> FloatTensor<B> {
    let [d_out, d_in] = weight.shape;
    let n = d_out * d_in;
    let blocks = n.div_ceil(weight.block_size);

    let codes = unpack::<B>(weight.codes, &CODE_SHIFTS, 15, n);
    let values = lookup::<B>(&CODEBOOK, codes);
    let scales = match weight.scales {
        Nf4ScaleTensors::Plain(bits) => float_from_bits::<B>(bits),
        Nf4ScaleTensors::Double(codes, nested) => {
            let groups = blocks.div_ceil(NESTED_BLOCK_SIZE);
            let nested = float_from_bits::<B>(nested);
            let absmax = B::float_slice(nested.clone(), &[Slice::from(0..groups)]);
            let offset = B::float_slice(nested, &[Slice::from(groups..groups + 1)]);
            let codes = unpack::<B>(codes, &BYTE_SHIFTS, 255, blocks);
            let scaled = B::float_mul(
                lookup::<B>(&DYNAMIC_MAP, codes),
                repeat_each::<B>(absmax, NESTED_BLOCK_SIZE, blocks),
            );
            B::float_add(scaled, B::float_expand(offset, Shape::from([blocks])))
        }
    };
    let dense = B::float_mul(values, repeat_each::<B>(scales, weight.block_size, n));
    let dense = B::float_reshape(dense, Shape::from([d_out, d_in]));
    match dtype {
        FloatDType::F32 => dense,
        dtype => B::float_cast(dense, dtype),
    }
}

/// The first `n` fields of `words` at the given bit positions: `[words] -> [n]`.
fn unpack<B: Backend>(words: IntTensor<B>, shifts: &[i32], mask: i32, n: usize) -> IntTensor<B> {
    let len = words.shape().num_elements();
    let words = B::int_reshape(words, Shape::from([len, 1]));
    let fields = shifts
        .iter()
        .map(|&shift| {
            let shifted = B::bitwise_right_shift_scalar(words.clone(), shift.into());
            B::bitwise_and_scalar(shifted, mask.into())
        })
        .collect();
    let fields = B::int_reshape(B::int_cat(fields, 1), Shape::from([len * shifts.len()]));
    B::int_slice(fields, &[Slice::from(0..n)])
}

/// `table[index]` for every index: `[n] -> [n]`, f32.
fn lookup<B: Backend>(table: &[f32], index: IntTensor<B>) -> FloatTensor<B> {
    let table = TensorData::new(table.to_vec(), [table.len()]);
    let table = B::float_from_data(table, &index.device());
    B::float_select(table, 0, index)
}

/// Every value `times` times in a row, cut to `n`: `[k] -> [n]`.
fn repeat_each<B: Backend>(values: FloatTensor<B>, times: usize, n: usize) -> FloatTensor<B> {
    let len = values.shape().num_elements();
    let column = B::float_reshape(values, Shape::from([len, 1]));
    let repeated = B::float_repeat_dim(column, 1, times);
    let flat = B::float_reshape(repeated, Shape::from([len * times]));
    B::float_slice(flat, &[Slice::from(0..n)])
}

/// The f32 whose bits each word holds, which is finite.
///
/// A scale that quantising gives is not negative, but double quantisation may restore one a little below zero, and a file may
/// hold any.
fn float_from_bits<B: Backend>(bits: IntTensor<B>) -> FloatTensor<B> {
    let sign = B::bitwise_and_scalar(
        B::bitwise_right_shift_scalar(bits.clone(), 31.into()),
        1.into(),
    );
    let exponent = B::bitwise_and_scalar(
        B::bitwise_right_shift_scalar(bits.clone(), 23.into()),
        255.into(),
    );
    let mantissa = B::bitwise_and_scalar(bits, 0x7f_ffff.into());
    let mantissa = B::int_into_float(mantissa, FloatDType::F32);
    let hidden: Vec<f32> = (0..256)
        .map(|e| if e == 0 { 0.0 } else { 8_388_608.0 })
        .collect();
    let power: Vec<f32> = (0..256u32)
        .map(|e| f32::from_bits(e.clamp(1, 254) << 23))
        .collect();
    let significand = B::float_add(mantissa, lookup::<B>(&hidden, exponent.clone()));
    let significand = B::float_mul_scalar(significand, (1.0f32 / 8_388_608.0).into());
    let magnitude = B::float_mul(significand, lookup::<B>(&power, exponent));
    B::float_mul(magnitude, lookup::<B>(&[1.0, -1.0], sign))
}

/// A cast, where there is anything to cast.
pub(crate) fn cast<B: Backend>(x: FloatTensor<B>, dtype: FloatDType) -> FloatTensor<B> {
    match float_dtype::<B>(&x) == dtype {
        true => x,
        false => B::float_cast(x, dtype),
    }
}

/// `a · b`, of which any side may be zero. Burn's CPU backend crashes on some of these: docs/upstream/flex-empty-matmul.md.
pub(crate) fn matmul<B: Backend>(a: FloatTensor<B>, b: FloatTensor<B>) -> FloatTensor<B> {
    let ([m, k], [_, n]): ([usize; 2], [usize; 2]) = (a.shape().dims(), b.shape().dims());
    match [m, k, n].contains(&0) {
        true => B::float_zeros([m, n].into(), &a.device(), float_dtype::<B>(&a)),
        false => B::float_matmul(a, b),
    }
}

/// `‖W_o‖²` of the rows of the weight, in f32: `[d_out]`.
pub(super) fn row_norms_squared<B: Backend>(weight: Nf4Tensors<B>) -> FloatTensor<B> {
    let rows = weight.shape[0];
    let dense = dequantize::<B>(weight, FloatDType::F32);
    let squares = B::float_mul(dense.clone(), dense);
    B::float_reshape(B::float_sum_dim(squares, 1), [rows].into())
}

/// `scale · x · a`, in the dtype of `a`.
pub(super) fn scaled_matmul<B: Backend>(
    x: FloatTensor<B>,
    a: FloatTensor<B>,
    scale: f64,
) -> FloatTensor<B> {
    let x = cast::<B>(x, float_dtype::<B>(&a));
    B::float_mul_scalar(matmul::<B>(x, a), scale.into())
}

/// `xᵀ · v`, in the dtype of `v`.
pub(super) fn gradient_a<B: Backend>(x: FloatTensor<B>, v: FloatTensor<B>) -> FloatTensor<B> {
    let x = cast::<B>(x, float_dtype::<B>(&v));
    matmul::<B>(B::float_transpose(x), v)
}

/// `uᵀ · dy`, in the dtype of `u`.
pub(super) fn gradient_b<B: Backend>(u: FloatTensor<B>, dy: FloatTensor<B>) -> FloatTensor<B> {
    let dy = cast::<B>(dy, float_dtype::<B>(&u));
    matmul::<B>(B::float_transpose(u), dy)
}

#[cfg(test)]
mod tests {
    use burn::backend::Dispatch;
    use burn::tensor::{Device, Distribution, FloatDType, Tensor, Tolerance};
    use proptest::prelude::*;

    use super::*;
    use crate::nf4::{
        BLOCK_SIZES, BlockSize, DoubleAbsmax, Nf4Config, Nf4Data, Nf4Scales, Nf4Weight,
    };

    /// Scales and offsets of any sign, as a file may hold them.
    #[test]
    fn a_scale_keeps_its_sign() {
        let device = Device::default();
        let codes = || (0..32).map(|i| (i * 37) as u8).collect::<Vec<_>>();
        let double = |absmax, offset| {
            DoubleAbsmax::from_parts("w", vec![0, 255], vec![absmax], offset).unwrap()
        };
        for scales in [
            Nf4Scales::Plain(vec![-0.75, 3.0]),
            Nf4Scales::Plain(vec![-0.0, -1e-39]),
            Nf4Scales::Double(double(2.0, 0.5)),
            Nf4Scales::Double(double(-2.0, -0.5)),
            Nf4Scales::Double(double(1.0, -3.0)),
        ] {
            let block = BlockSize::new(32).unwrap();
            let data = Nf4Data::from_parts("w", [2, 32], block, codes(), scales).unwrap();
            let weight = Nf4Weight::from_data(&data, &device);
            let portable = dequantize::<Dispatch>(weight.tensors(), FloatDType::F32);
            let portable = Tensor::<2>::from_dispatch(portable).into_data();
            let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            let expected = bits(data.dequantize());
            assert_eq!(bits(portable.try_into_vec().unwrap()), expected);
            let kernel = weight.dequantize(FloatDType::F32).into_data();
            assert_eq!(bits(kernel.try_into_vec().unwrap()), expected);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// What a device gets that this crate has no implementation for.
        #[test]
        fn equals_the_host_reference(
            (d_out, d_in) in (1usize..60, 1usize..90),
            block in 0usize..BLOCK_SIZES.len(),
            double in any::<bool>(),
            magnitude in -30i32..30,
        ) {
            let device = Device::default();
            let block = BlockSize::new(BLOCK_SIZES[block]).unwrap();
            let config = Nf4Config::new().with_block_size(block).with_double_quant(double);
            let dense = Tensor::<2>::random([d_in, d_out], Distribution::Normal(0.0, 1.0), &device);
            let dense = dense.mul_scalar(2f64.powi(magnitude));
            let weight = Nf4Weight::quantize("w", dense, &config).unwrap();
            for dtype in [FloatDType::F32, FloatDType::BF16] {
                let portable = dequantize::<Dispatch>(weight.tensors(), dtype);
                let portable = Tensor::<2>::from_dispatch(portable).into_data();
                portable.assert_eq(&weight.dequantize(dtype).into_data(), true);
            }
            let portable = row_norms_squared::<Dispatch>(weight.tensors());
            let portable = Tensor::<1>::from_dispatch(portable).into_data();
            let found = weight.row_norms_squared().into_data();
            portable.assert_approx_eq::<f32>(&found, Tolerance::relative(1e-5));
            let expected = weight.to_data().dequantize();
            let found = weight.dequantize(FloatDType::F32).into_data().try_into_vec::<f32>().unwrap();
            prop_assert_eq!(found, expected, "the kernel and the host reference");
        }
    }
}
