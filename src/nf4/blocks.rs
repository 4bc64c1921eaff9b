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
const SMALLEST_SCALE: f32 = 1e-38;

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
        if block.len() == size {
            *absmax = largest;
            let reciprocal = 1.0 / largest.max(SMALLEST_SCALE);
            scaled
                .iter_mut()
                .for_each(|s| *s = (*s * reciprocal).clamp(-1.0, 1.0));
        } else {
            *absmax = largest.max(SMALLEST_SCALE);
            scaled
                .iter_mut()
                .for_each(|s| *s = (*s / *absmax).clamp(-1.0, 1.0));
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
