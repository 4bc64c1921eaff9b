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
