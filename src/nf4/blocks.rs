//! Quantising slices to NF4 in blocks that share a scale, and back: the plain reference that every kernel is
//! tested against.
//!
//! For a block of values `x_i`: `a = max |x_i|`, `q_i = nearest(x_i / a)`, restored as `x'_i = CODEBOOK[q_i] · a`,
//! where `a` is the block's scale ("absmax", f32), `q_i` the 4-bit code of value `i` ([`nearest`]) and the division is
//! done the way bitsandbytes does it: a product by the reciprocal in full blocks, a true division in a partial last
//! block. Two codes share a byte, the first in the high nibble.
//!
//! Sources: QLoRA, <https://arxiv.org/abs/2305.14314>; the bits are those of bitsandbytes 0.50.2 on a CPU.

use super::codebook::{CODEBOOK, nearest};
use crate::{PeftError, Result};

/// The block sizes NF4 has, in values.
pub const BLOCK_SIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// The floor bitsandbytes puts under the scale that it divides by. It is itself subnormal, and nothing is flushed.
pub(super) const SMALLEST_SCALE: f32 = 1e-38;

/// The code that fills the last low nibble of an odd count: that of zero.
const PADDING_CODE: u8 = 7;

/// How many consecutive values share one scale: one of [`BLOCK_SIZES`]; 64 by default, as in QLoRA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize(usize);

impl BlockSize {
    /// Checks a block size.
    ///
    /// # Errors
    ///
    /// [`PeftError::BlockSize`] for anything that [`BLOCK_SIZES`] does not hold.
    pub fn new(block_size: usize) -> Result<Self> {
        match BLOCK_SIZES.contains(&block_size) {
            true => Ok(Self(block_size)),
            false => Err(PeftError::BlockSize { found: block_size }),
        }
    }

    /// The number of values in a block; always even, so that every block begins on a byte.
    pub const fn get(self) -> usize {
        self.0
    }

    /// How many blocks `n` values make, a partial last one included.
    pub const fn blocks(self, n: usize) -> usize {
        n.div_ceil(self.0)
    }
}

impl Default for BlockSize {
    fn default() -> Self {
        Self(64)
    }
}

/// How many bytes the codes of `n` values take.
pub const fn packed_len(n: usize) -> usize {
    n.div_ceil(2)
}

/// Quantises `values`, a weight `[d_out, d_in]` flattened row-major, to NF4.
///
/// Values are widened to f32 first, so f32, bf16 and f16 go through the same arithmetic. Returns the packed codes,
/// [`packed_len`]`(n)` bytes, and one scale per block, [`BlockSize::blocks`]`(n)` of them. Of an odd count the last low
/// nibble holds the code of zero.
///
/// A full block of zeros gets scale 0; a partial last block gets no scale below `1e-38`. A full block whose largest
/// magnitude is below `1e-38` is quantised against `1e-38`, so it loses precision down to all zeros.
///
/// # Errors
///
/// [`PeftError::NotFinite`] at the first NaN or infinity, naming `tensor_name`.
pub fn quantize_blocks<T: Copy + Into<f32>>(
    tensor_name: &str,
    values: &[T],
    block_size: BlockSize,
) -> Result<(Vec<u8>, Vec<f32>)> {
    let mut packed = vec![0; packed_len(values.len())];
    let mut absmax = vec![0.0; block_size.blocks(values.len())];
    match quantize_blocks_into(values, block_size, &mut packed, &mut absmax) {
        Ok(()) => Ok((packed, absmax)),
        Err(index) => Err(not_finite(tensor_name, index, values[index])),
    }
}

/// [`quantize_blocks`] into given memory of the right lengths; the error is the index of the first value that is not
/// finite. The blocks do not depend on each other, so a caller may hand out runs of whole blocks to threads.
pub(super) fn quantize_blocks_into<T: Copy + Into<f32>>(
    values: &[T],
    block_size: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> std::result::Result<(), usize> {
    let size = block_size.get();
    let mut widened = vec![0.0; size.min(values.len())];
    let blocks = values.chunks(size).zip(packed.chunks_mut(size / 2));
    for (index, ((block, packed), absmax)) in blocks.zip(absmax).enumerate() {
        let scaled = &mut widened[..block.len()];
        for (s, &x) in scaled.iter_mut().zip(block) {
            *s = x.into();
        }
        // The bits of |x| are ordered as |x| is, with infinity and NaN above every number.
        let largest = scaled.iter().map(|x| x.abs().to_bits()).max().unwrap_or(0);
        let largest = f32::from_bits(largest);
        if !largest.is_finite() {
            let within = scaled.iter().position(|x| !x.is_finite()).unwrap_or(0);
            return Err(index * size + within);
        }
        // A quotient may round to a little beyond ±1; `nearest` has the codes of ±1 there.
        if block.len() == size {
            *absmax = largest;
            let reciprocal = 1.0 / largest.max(SMALLEST_SCALE);
            scaled.iter_mut().for_each(|s| *s *= reciprocal);
        } else {
            *absmax = largest.max(SMALLEST_SCALE);
            scaled.iter_mut().for_each(|s| *s /= *absmax);
        }
        let (pairs, last) = scaled.as_chunks();
        for (byte, &[high, low]) in packed.iter_mut().zip(pairs) {
            *byte = nearest(high) << 4 | nearest(low);
        }
        if let [high] = last {
            packed[pairs.len()] = nearest(*high) << 4 | PADDING_CODE;
        }
    }
    Ok(())
}

/// The error for a value that is not finite.
pub(super) fn not_finite(tensor_name: &str, index: usize, value: impl Into<f32>) -> PeftError {
    PeftError::NotFinite {
        tensor: tensor_name.into(),
        index,
        value: value.into(),
    }
}

/// Restores `n` values: one f32 product `CODEBOOK[code] * absmax[block]` each.
///
/// `packed` holds [`packed_len`]`(n)` bytes, `absmax` [`BlockSize::blocks`]`(n)` scales. For bf16 or f16, cast the
/// result once, to nearest even; that is what bitsandbytes gives.
///
/// # Panics
///
/// If `packed` or `absmax` have other lengths.
pub fn dequantize_blocks(
    packed: &[u8],
    absmax: &[f32],
    n: usize,
    block_size: BlockSize,
) -> Vec<f32> {
    let mut values = vec![0.0; n];
    dequantize_blocks_into(packed, absmax, block_size, &mut values);
    values
}

/// [`dequantize_blocks`] into given memory; `n` is the length of `values`.
///
/// # Panics
///
/// If `packed` or `absmax` have other lengths than `values` demands.
pub fn dequantize_blocks_into(
    packed: &[u8],
    absmax: &[f32],
    block_size: BlockSize,
    values: &mut [f32],
) {
    assert_eq!(
        packed.len(),
        packed_len(values.len()),
        "bytes of codes for {} values",
        values.len()
    );
    assert_eq!(
        absmax.len(),
        block_size.blocks(values.len()),
        "scales for {} values",
        values.len()
    );
    let size = block_size.get();
    let blocks = values.chunks_mut(size).zip(packed.chunks(size / 2));
    for ((values, packed), &absmax) in blocks.zip(absmax) {
        let table = CODEBOOK.map(|value| value * absmax);
        let (pairs, last) = values.as_chunks_mut();
        for ([high, low], &byte) in pairs.iter_mut().zip(packed) {
            *high = table[usize::from(byte >> 4)];
            *low = table[usize::from(byte & 15)];
        }
        if let ([high], Some(&byte)) = (last, packed.last()) {
            *high = table[usize::from(byte >> 4)];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    fn sizes() -> impl Iterator<Item = BlockSize> {
        BLOCK_SIZES.into_iter().map(BlockSize)
    }

    #[test]
    fn only_the_eight_block_sizes_pass() {
        for size in BLOCK_SIZES {
            assert_eq!(BlockSize::new(size).unwrap().get(), size);
        }
        for size in [0, 1, 16, 33, 63, 65, 8192, usize::MAX] {
            let error = BlockSize::new(size).unwrap_err();
            assert!(matches!(error, PeftError::BlockSize { found } if found == size));
        }
        assert_eq!(BlockSize::default().get(), 64);
    }

    #[test]
    fn the_first_code_is_in_the_high_nibble() {
        let values = [CODEBOOK, CODEBOOK].concat();
        let (packed, absmax) = quantize_blocks("w", &values, BlockSize(32)).unwrap();
        let bytes = [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef];
        assert_eq!(packed, [bytes, bytes].concat());
        assert_eq!(absmax, [1.0]);
        assert_eq!(
            dequantize_blocks(&packed, &absmax, 32, BlockSize(32)),
            values
        );
    }

    #[test]
    fn an_odd_count_ends_with_the_code_of_zero() {
        for size in sizes() {
            let quantized = quantize_blocks("w", &[1.0_f32, -1.0, 0.5], size).unwrap();
            assert_eq!(quantized, (vec![0xf0, 0xc7], vec![1.0]));
            let restored = dequantize_blocks(&[0xf0, 0xc7], &[2.0], 3, size);
            assert_eq!(restored, [2.0, -2.0, 2.0 * CODEBOOK[12]]);
        }
        assert_eq!(
            quantize_blocks::<f32>("w", &[], BlockSize(64)).unwrap(),
            (vec![], vec![])
        );
        assert!(dequantize_blocks(&[], &[], 0, BlockSize(64)).is_empty());
    }

    #[test]
    fn every_block_has_its_own_scale_and_the_last_may_be_partial() {
        for size in sizes() {
            let n = 3 * size.get() + 1;
            let scale = |i: usize| [1e-6_f32, -1e3, 7.0, -0.5][i / size.get()];
            let values: Vec<_> = (0..n).map(scale).collect();
            let (packed, absmax) = quantize_blocks("w", &values, size).unwrap();
            assert_eq!(absmax, [1e-6, 1e3, 7.0, 0.5]);
            let half = size.get() / 2;
            let codes = [
                vec![0xff; half],
                vec![0x00; half],
                vec![0xff; half],
                vec![0x07],
            ];
            assert_eq!(packed, codes.concat());
            assert_eq!(dequantize_blocks(&packed, &absmax, n, size), values);
        }
    }

    #[test]
    fn zeros_have_scale_zero_but_for_a_partial_block() {
        let quantized = quantize_blocks("w", &[-0.0_f32; 34], BlockSize(32)).unwrap();
        assert_eq!(quantized, (vec![0x77; 17], vec![0.0, 1e-38]));
    }

    #[test]
    fn subnormal_blocks_are_divided_by_the_floor() {
        // Of 1e-39 / 1e-38 = 0.1 the nearest is code 8, though it is the largest of its block.
        let quantized = quantize_blocks("w", &[1e-39_f32; 34], BlockSize(32)).unwrap();
        assert_eq!(quantized, (vec![0x88; 17], vec![1e-39, 1e-38]));
        let least = f32::from_bits(1);
        let quantized = quantize_blocks("w", &[least; 32], BlockSize(32)).unwrap();
        assert_eq!(quantized, (vec![0x77; 16], vec![least]));
    }

    #[test]
    fn half_precision_is_widened_first() {
        let values = [0.1_f32, -0.2, 3.0, 1.5, 0.0, -3.0, 2.2, 0.7, -1.1];
        let bf16s = values.map(bf16::from_f32);
        let f16s = values.map(f16::from_f32);
        let size = BlockSize(32);
        let quantized = quantize_blocks("w", &bf16s, size).unwrap();
        assert_eq!(
            quantized,
            quantize_blocks("w", &bf16s.map(f32::from), size).unwrap()
        );
        let quantized = quantize_blocks("w", &f16s, size).unwrap();
        assert_eq!(
            quantized,
            quantize_blocks("w", &f16s.map(f32::from), size).unwrap()
        );
    }

    #[test]
    fn the_first_value_that_is_not_finite_is_named() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 31, 32, 69] {
                let mut values = [1.0; 70];
                values[at] = bad;
                values[69] = bad;
                let error = quantize_blocks("layer.weight", &values, BlockSize(32)).unwrap_err();
                let PeftError::NotFinite {
                    tensor,
                    index,
                    value,
                } = error
                else {
                    panic!("{error}");
                };
                assert_eq!((tensor.as_str(), index), ("layer.weight", at));
                assert_eq!(value.to_bits(), bad.to_bits());
            }
        }
    }

    #[test]
    #[should_panic(expected = "scales for 65 values")]
    fn a_missing_scale_is_a_bug_of_the_caller() {
        dequantize_blocks(&[0; 33], &[1.0], 65, BlockSize(64));
    }
}
