//! A dense weight of a linear layer, `[d_in, d_out]`, read where it lies: quantising `W`, its transpose.
//!
//! On Burn's CPU backend the kernels read the tensor itself, in either order; elsewhere, and in any other layout, strips
//! of about a mebibyte are copied to the host. No second dense copy ever exists.

use burn::tensor::{DType, Tensor};

use super::blocks::{BlockSize, packed_len};
use super::cpu::{Columns, Isa};

/// Values copied from the device at a time: a mebibyte of f32.
const STRIP: usize = 1 << 18;

/// Quantises `W = weightᵀ` into memory of the right lengths; the error is the first value that is not finite, with its
/// row-major index in `W`.
pub(super) fn quantize(
    weight: Tensor<2>,
    block_size: BlockSize,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Result<(), (usize, f32)> {
    let weight = weight.without_autodiff();
    #[cfg(feature = "flex")]
    if let Some(result) = flex::quantize(&weight, block_size, codes, absmax) {
        return result;
    }
    let d_in = weight.dims()[0];
    for (first, values) in strips(weight, block_size) {
        let d_out = values.len() / d_in;
        let columns = Columns::new(&values, d_out, [d_out, d_in]);
        let codes = &mut codes[first / 2..][..packed_len(values.len())];
        let blocks = block_size.blocks(values.len());
        let absmax = &mut absmax[first / block_size.get()..][..blocks];
        columns
            .quantize(Isa::best(), block_size, codes, absmax)
            .map_err(|index| (first + index, columns.at(index)))?;
    }
    Ok(())
}

/// The first value that is not finite, with its row-major index in `W = weightᵀ`.
pub(super) fn check_finite(weight: Tensor<2>) -> Result<(), (usize, f32)> {
    let weight = weight.without_autodiff();
    #[cfg(feature = "flex")]
    if flex::is_finite(&weight) == Some(true) {
        return Ok(());
    }
    let d_in = weight.dims()[0];
    for (first, values) in strips(weight, BlockSize::default()) {
        let d_out = values.len() / d_in;
        if !values.iter().all(|value| value.is_finite()) {
            let columns = Columns::new(&values, d_out, [d_out, d_in]);
            let bad = |&index: &usize| !columns.at(index).is_finite();
            let index = (0..values.len()).find(bad).unwrap_or(0);
            return Err((first + index, columns.at(index)));
        }
    }
    Ok(())
}

/// The values of a weight in f32, `[d_in, rows]` at a time, for so many whole rows of `W` as fill whole blocks; each
/// with the row-major index in `W` of its first value.
fn strips(weight: Tensor<2>, block_size: BlockSize) -> impl Iterator<Item = (usize, Vec<f32>)> {
    let [d_in, d_out] = weight.dims();
    let whole = block_size.get() / gcd(d_in.max(1), block_size.get());
    let rows = (STRIP / (whole * d_in).max(1)).max(1) * whole;
    let end = if d_in == 0 { 0 } else { d_out };
    (0..end).step_by(rows).map(move |first| {
        let last = (first + rows).min(d_out);
        let strip = weight.clone().slice([0..d_in, first..last]);
        let data = strip.into_data().convert_dtype(DType::F32);
        let values = data.try_into_vec();
        (
            first * d_in,
            values.expect("the data was just converted to f32"),
        )
    })
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Tensors of Burn's CPU backend, whose memory is at hand.
#[cfg(feature = "flex")]
mod flex {
    use burn::backend::{DispatchTensorKind, Flex, tensor::FloatTensor};
    use burn::tensor::{DType, Element, Tensor};
    use half::{bf16, f16};
    use rayon::prelude::*;

    use super::super::blocks::BlockSize;
    use super::super::cpu::{self, Columns, Isa};
    use super::super::float::Nf4Float;

    /// None if the tensor is of another backend, dtype or layout.
    pub(super) fn quantize(
        weight: &Tensor<2>,
        block_size: BlockSize,
        codes: &mut [u8],
        absmax: &mut [f32],
    ) -> Option<Result<(), (usize, f32)>> {
        with_tensor(weight, |tensor| match tensor.dtype() {
            DType::F32 => quantize_as::<f32>(tensor, block_size, codes, absmax),
            DType::BF16 => quantize_as::<bf16>(tensor, block_size, codes, absmax),
            DType::F16 => quantize_as::<f16>(tensor, block_size, codes, absmax),
            _ => None,
        })
    }

    fn quantize_as<T: Nf4Float + Element + bytemuck::Pod>(
        tensor: &FloatTensor<Flex>,
        block_size: BlockSize,
        codes: &mut [u8],
        absmax: &mut [f32],
    ) -> Option<Result<(), (usize, f32)>> {
        let layout = tensor.layout();
        let (&[d_in, d_out], &[by_in, by_out]) = (&layout.shape()[..], layout.strides()) else {
            return None;
        };
        let values = tensor.storage::<T>().get(layout.start_offset()..)?;
        match [usize::try_from(by_in).ok()?, usize::try_from(by_out).ok()?] {
            // `W` itself, row-major.
            [1, stride] if stride == d_in => {
                let values = values.get(..d_in * d_out)?;
                let result = cpu::quantize(Isa::best(), values, block_size, codes, absmax);
                Some(result.map_err(|index| (index, values[index].into())))
            }
            // Its transpose, perhaps a part of a wider one.
            [stride, 1] if stride >= d_out => {
                let columns = Columns::new(values, stride, [d_out, d_in]);
                let result = columns.quantize(Isa::best(), block_size, codes, absmax);
                Some(result.map_err(|index| (index, columns.at(index))))
            }
            _ => None,
        }
    }

    /// Whether all of the tensor's memory is finite, which is more than its values where it is part of another; None if
    /// the tensor is of another backend or dtype.
    pub(super) fn is_finite(weight: &Tensor<2>) -> Option<bool> {
        fn all<T: Nf4Float + Element + bytemuck::Pod>(tensor: &FloatTensor<Flex>) -> Option<bool> {
            let chunks = tensor.storage::<T>().par_chunks(1 << 16);
            Some(chunks.all(|values| {
                // Not `all`, which would leave early and not be vectorised.
                let bad = values.iter().map(|&x| u32::from(!x.into().is_finite()));
                bad.fold(0, |any, bad| any | bad) == 0
            }))
        }
        with_tensor(weight, |tensor| match tensor.dtype() {
            DType::F32 => all::<f32>(tensor),
            DType::BF16 => all::<bf16>(tensor),
            DType::F16 => all::<f16>(tensor),
            _ => None,
        })
    }

    fn with_tensor<T>(
        weight: &Tensor<2>,
        f: impl FnOnce(&FloatTensor<Flex>) -> Option<T>,
    ) -> Option<T> {
        if !weight.dtype().is_float() {
            return None;
        }
        match weight.clone().into_dispatch().kind {
            DispatchTensorKind::Flex(tensor) => f(tensor.as_float()),
            #[allow(unreachable_patterns)]
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device, FloatDType, Tensor};
    use half::{bf16, f16};

    use crate::PeftError;
    use crate::nf4::{BlockSize, Nf4Config, Nf4Data, Nf4Weight};

    /// `[d_in, d_out]` of no structure.
    fn weight(d_in: usize, d_out: usize) -> Tensor<2> {
        let values: Vec<f32> = (0..d_in * d_out)
            .map(|i| (i as f32 * 0.7).sin() * (1 + i / 61 % 7) as f32)
            .collect();
        Tensor::<1>::from_floats(values.as_slice(), &Device::default()).reshape([d_in, d_out])
    }

    /// One weight in every layout and dtype that a tensor can have.
    fn tensors(d_in: usize, d_out: usize) -> Vec<Tensor<2>> {
        let plain = weight(d_in, d_out);
        let transposed = weight(d_out, d_in).transpose();
        let wide = weight(d_in + 3, d_out + 5);
        let rows = wide.clone().slice([2..d_in + 2, 0..d_out + 5]);
        let part = rows.clone().slice([0..d_in, 4..d_out + 4]);
        let part_transposed = weight(d_out + 1, d_in + 2)
            .slice([1..d_out + 1, 1..d_in + 1])
            .transpose();
        let flipped = plain.clone().flip([0, 1]);
        let layouts = [plain, transposed, part, part_transposed, flipped];
        let dtypes = [
            FloatDType::F32,
            FloatDType::BF16,
            FloatDType::F16,
            FloatDType::F64,
        ];
        let cast = |tensor: &Tensor<2>| dtypes.map(|dtype| tensor.clone().cast(dtype));
        // A cast may lay a tensor out anew; for f32 it does not.
        layouts.iter().flat_map(cast).collect()
    }

    /// The host's way: transposed by Burn, quantised as a slice.
    fn reference(weight: &Tensor<2>, config: &Nf4Config) -> Nf4Data {
        let [d_in, d_out] = weight.dims();
        let data = weight.clone().transpose().into_data();
        let shape = [d_out, d_in];
        match weight.dtype() {
            DType::BF16 => {
                Nf4Data::quantize("w", &data.try_into_vec::<bf16>().unwrap(), shape, config)
            }
            DType::F16 => {
                Nf4Data::quantize("w", &data.try_into_vec::<f16>().unwrap(), shape, config)
            }
            _ => {
                let data = data.convert_dtype(DType::F32);
                Nf4Data::quantize("w", &data.try_into_vec::<f32>().unwrap(), shape, config)
            }
        }
        .unwrap()
    }

    #[test]
    fn every_layout_and_dtype_gives_what_the_host_gives() {
        for (d_in, d_out) in [(128, 40), (70, 33), (1, 90), (90, 1), (640, 700)] {
            for (size, double_quant) in [(32, true), (64, false), (4096, false)] {
                let config = Nf4Config::new()
                    .with_block_size(BlockSize::new(size).unwrap())
                    .with_double_quant(double_quant);
                for (i, tensor) in tensors(d_in, d_out).into_iter().enumerate() {
                    let expected = reference(&tensor, &config);
                    let found = Nf4Weight::quantize("w", tensor, &config).unwrap().to_data();
                    assert_eq!(found, expected, "tensor {i} of [{d_in}, {d_out}], {size}");
                }
            }
        }
    }

    #[test]
    fn a_bad_value_is_named_by_its_place_in_the_transpose() {
        let plain = weight(128, 40);
        let bad = Tensor::full([1, 1], f32::NAN, &plain.device());
        // Element [100, 7] and a later one, [3, 30].
        let plain = plain.slice_assign([100..101, 7..8], bad.clone());
        let plain = plain.slice_assign([3..4, 30..31], bad);
        let transposed = plain.clone().transpose().mul_scalar(1.0).transpose();
        for tensor in [
            plain.clone(),
            transposed,
            plain.clone().cast(FloatDType::F64),
            plain.flip([0, 1]).flip([0, 1]),
        ] {
            let checked = Nf4Weight::check_finite("w", tensor.clone()).unwrap_err();
            let quantized = Nf4Weight::quantize("w", tensor, &Nf4Config::new()).unwrap_err();
            for error in [checked, quantized] {
                assert!(
                    matches!(error, PeftError::NotFinite { index, value, .. }
                        if index == 7 * 128 + 100 && value.is_nan()),
                    "{error}"
                );
            }
        }
        assert!(Nf4Weight::check_finite("w", weight(3, 5)).is_ok());
    }
}
