//! The element types of adapter files: F32, BF16 and F16, little-endian in the file, host-endian in memory.

use std::borrow::Cow;

use burn::tensor::{DType, TensorData};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::View;

use crate::{PeftError, Result};

/// Burn's name of a file's element type.
///
/// # Errors
///
/// [`PeftError::DType`] that names `tensor`, for every type but the three.
pub(crate) fn from_file(tensor: &str, dtype: Dtype) -> Result<DType> {
    match dtype {
        Dtype::F32 => Ok(DType::F32),
        Dtype::BF16 => Ok(DType::BF16),
        Dtype::F16 => Ok(DType::F16),
        other => Err(unsupported(tensor, other.to_string())),
    }
}

/// The file's name of an element type of Burn's.
///
/// # Errors
///
/// [`PeftError::DType`] that names `tensor`, for every type but the three.
pub(super) fn to_file(tensor: &str, dtype: DType) -> Result<Dtype> {
    match dtype {
        DType::F32 => Ok(Dtype::F32),
        DType::BF16 => Ok(Dtype::BF16),
        DType::F16 => Ok(Dtype::F16),
        other => Err(unsupported(tensor, format!("{other:?}"))),
    }
}

fn unsupported(tensor: &str, found: String) -> PeftError {
    PeftError::DType {
        tensor: tensor.to_owned(),
        expected: "F32, BF16 or F16".to_owned(),
        found,
    }
}

/// The first value that is NaN or infinite is an error.
///
/// # Errors
///
/// [`PeftError::NotFinite`] that names `tensor`, the row-major index and the value.
pub(super) fn check_finite(tensor: &str, data: &TensorData) -> Result<()> {
    match data
        .iter::<f32>()
        .enumerate()
        .find(|(_, value)| !value.is_finite())
    {
        None => Ok(()),
        Some((index, value)) => Err(PeftError::NotFinite {
            tensor: tensor.to_owned(),
            index,
            value,
        }),
    }
}

/// The same values in another element type.
///
/// # Errors
///
/// [`PeftError::Overflow`] that names `tensor` and the first finite value that is infinite in that type.
pub(super) fn converted(tensor: &str, data: TensorData, dtype: DType) -> Result<TensorData> {
    if data.dtype() == dtype {
        return Ok(data);
    }
    let overflows = |value: f32| match dtype {
        DType::F16 => f16::from_f32(value).is_infinite(),
        DType::BF16 => bf16::from_f32(value).is_infinite(),
        _ => false,
    };
    let mut values = data.iter::<f32>().enumerate();
    let first = values.find(|(_, value)| value.is_finite() && overflows(*value));
    drop(values);
    match first {
        None => Ok(data.convert_dtype(dtype)),
        Some((index, value)) => Err(PeftError::Overflow {
            tensor: tensor.to_owned(),
            index,
            value: value.into(),
            dtype: format!("{dtype:?}"),
            way_out: "choose F32, or BF16, which has the range of F32",
        }),
    }
}

/// Values on a side of the tiles that a transpose goes by.
const TILE: usize = 64;

/// The transpose of a matrix, its values laid out row-major.
///
/// Of a transposed view on a device, products add up in another order than of the tensor that was saved, and a reloaded
/// adapter would give other last bits than the trained one.
pub(super) fn transposed(data: &TensorData) -> TensorData {
    let [rows, columns] = data.shape().dims();
    let (values, size) = (data.as_bytes(), data.dtype().size());
    // Tiles of a side of 64 values stay in cache: read by columns, each value of a wide matrix would be a line of its own.
    let mut bytes = vec![0; values.len()];
    for top in (0..rows).step_by(TILE) {
        for left in (0..columns).step_by(TILE) {
            for row in top..rows.min(top + TILE) {
                for column in left..columns.min(left + TILE) {
                    let from = (row * columns + column) * size;
                    let to = (column * rows + row) * size;
                    bytes[to..to + size].copy_from_slice(&values[from..from + size]);
                }
            }
        }
    }
    TensorData::from_bytes_vec(bytes, [columns, rows], data.dtype())
}

/// A factor `B` of experts apart, `[E, d_out, r]`, rank by rank: `[d_out, r·E]`.
pub(super) fn by_rank(data: &TensorData) -> TensorData {
    let [experts, d_out, rank] = data.shape().dims();
    let (values, size) = (data.as_bytes(), data.dtype().size());
    let mut bytes = Vec::with_capacity(values.len());
    for row in 0..d_out {
        for place in 0..rank {
            for expert in 0..experts {
                let start = ((expert * d_out + row) * rank + place) * size;
                bytes.extend_from_slice(&values[start..start + size]);
            }
        }
    }
    TensorData::from_bytes_vec(bytes, [d_out, rank * experts], data.dtype())
}

/// The same values in another shape.
///
/// # Panics
///
/// Panics if the shape has another number of elements.
pub(super) fn reshaped(data: TensorData, shape: &[usize]) -> TensorData {
    let (bytes, _, dtype) = data.into_parts();
    TensorData::from_bytes(bytes, shape.to_vec(), dtype)
}

/// Turns little-endian values into host-endian ones, or back.
pub(crate) fn swap_to_host(bytes: &mut [u8], dtype: DType) {
    if cfg!(target_endian = "big") {
        bytes
            .chunks_exact_mut(dtype.size())
            .for_each(<[u8]>::reverse);
    }
}

/// A tensor as the `safetensors` crate writes it: its bytes are borrowed on a little-endian host.
pub(crate) struct Stored<'a> {
    data: &'a TensorData,
    dtype: Dtype,
}

impl<'a> Stored<'a> {
    /// # Errors
    ///
    /// [`PeftError::DType`] that names `tensor`.
    pub(crate) fn new(tensor: &str, data: &'a TensorData) -> Result<Self> {
        let dtype = to_file(tensor, data.dtype())?;
        Ok(Self { data, dtype })
    }

    /// Values of a checkpoint, which may be words of 32 bits too.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    #[cfg(feature = "optim")]
    pub(crate) fn or_words(tensor: &str, data: &'a TensorData) -> Result<Self> {
        let dtype = match data.dtype() {
            DType::I32 => Dtype::I32,
            dtype => to_file(tensor, dtype)?,
        };
        Ok(Self { data, dtype })
    }
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        self.data.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = Cow::Borrowed(self.data.as_bytes());
        if cfg!(target_endian = "big") {
            swap_to_host(bytes.to_mut(), self.data.dtype());
        }
        bytes
    }

    fn data_len(&self) -> usize {
        self.data.as_bytes().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transpose_moves_values_of_any_size() {
        let data = TensorData::from([[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]]);
        let expected = TensorData::from([[1f32, 4.0], [2.0, 5.0], [3.0, 6.0]]);
        assert_eq!(transposed(&data), expected);
        let half = |data: TensorData| data.convert::<bf16>();
        assert_eq!(transposed(&half(data)), half(expected));
        let empty = TensorData::new(Vec::<f32>::new(), [0, 3]);
        assert_eq!(transposed(&empty).shape().as_slice(), [3, 0]);
    }
}
