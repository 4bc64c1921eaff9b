//! The dtype that a packed weight's values are rounded to before a product takes them.
//!
//! bitsandbytes dequantises a weight to the dtype of the activations, `W = round(codebook · scale)`, and multiplies that.
//! Every kernel here multiplies the same numbers, whatever it sums them in. So the number of rows, the instruction set
//! and the backend change the order of sums and nothing else.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::nf4::codebook::CODEBOOK;

/// What the values of a weight are rounded to, once, to nearest even.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Precision {
    F32,
    Bf16,
    F16,
}

impl Precision {
    /// The sixteen values of a block of this scale.
    #[inline(always)]
    pub(super) fn table(self, scale: f32) -> [f32; 16] {
        let mut values = CODEBOOK;
        for value in &mut values {
            *value *= scale;
        }
        match self {
            Self::F32 => {}
            Self::Bf16 => {
                for value in &mut values {
                    *value = f32::from_bits(u32::from(bf16_bits(*value)) << 16);
                }
            }
            Self::F16 => {
                let mut rounded = [f16::ZERO; 16];
                rounded.convert_from_f32_slice(&values);
                rounded.convert_to_f32_slice(&mut values);
            }
        }
        values
    }

    /// One value.
    #[inline(always)]
    pub(super) fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => bf16::from_f32(value).into(),
            Self::F16 => f16::from_f32(value).into(),
        }
    }
}

/// The sixteen values of a block of this scale, as bits of bf16.
#[inline(always)]
pub(super) fn bf16_table(scale: f32) -> [u16; 16] {
    let mut bits = [0; 16];
    for (bits, value) in bits.iter_mut().zip(CODEBOOK) {
        *bits = bf16_bits(value * scale);
    }
    bits
}

/// The bits of a number, rounded to nearest even; of NaN, anything.
///
/// What the conversion of `half` does for every number, without its branches, so that it vectorises. Of the processors' own
/// instructions some flush subnormals.
#[inline(always)]
pub(super) fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_what_half_rounds_its_products_to() {
        let scales = [0.0, 1.0, 0.3, 7e4, 1e-6, 3e-39, f32::MAX, f32::MIN_POSITIVE];
        for scale in scales.into_iter().flat_map(|scale| [scale, -scale]) {
            let products = CODEBOOK.map(|value| value * scale);
            let expected = [
                (Precision::F32, products),
                (
                    Precision::Bf16,
                    products.map(|v| bf16::from_f32(v).to_f32()),
                ),
                (Precision::F16, products.map(|v| f16::from_f32(v).to_f32())),
            ];
            for (precision, expected) in expected {
                let found = precision.table(scale).map(f32::to_bits);
                assert_eq!(
                    found,
                    expected.map(f32::to_bits),
                    "{precision:?}, {scale:e}"
                );
                let found = products.map(|value| precision.round(value).to_bits());
                assert_eq!(
                    found,
                    expected.map(f32::to_bits),
                    "{precision:?}, {scale:e}"
                );
            }
            let expected = products.map(|value| bf16::from_f32(value).to_bits());
            assert_eq!(bf16_table(scale), expected, "{scale:e}");
        }
    }
}
