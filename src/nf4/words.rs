//! How the bytes and floats of a packed weight lie in 32-bit words, the one integer that every backend has.
//!
//! Bytes are little-endian in a word: byte `j` of a word is `(word >> 8 j) & 255`, so that on a little-endian CPU the
//! words are bitsandbytes' bytes as they stand. The last word is filled with zero bytes.

use super::double::DoubleAbsmax;

/// Bit positions of the eight 4-bit codes of a word, first element first: bitsandbytes puts it in a byte's high half.
pub(super) const CODE_SHIFTS: [i32; 8] = [4, 0, 12, 8, 20, 16, 28, 24];
/// Bit positions of the four bytes of a word.
pub(super) const BYTE_SHIFTS: [i32; 4] = [0, 8, 16, 24];

pub(super) fn words_from_bytes(bytes: &[u8]) -> Vec<i32> {
    bytes
        .chunks(4)
        .map(|chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            i32::from_le_bytes(word)
        })
        .collect()
}

pub(super) fn bytes_from_words(words: &[i32], len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.truncate(len);
    bytes
}

/// In the memory of the values.
pub(super) fn bits_of_f32(values: Vec<f32>) -> Vec<i32> {
    bytemuck::cast_vec(values)
}

pub(super) fn f32_from_bits(bits: &[i32]) -> Vec<f32> {
    bits.iter()
        .map(|&bits| f32::from_bits(bits as u32))
        .collect()
}

/// The bits of the scales of the groups, and of the offset behind them.
pub(super) fn bits_from_nested(nested: &DoubleAbsmax) -> Vec<i32> {
    let mut bits = bits_of_f32(nested.absmax.clone());
    bits.push(nested.offset.to_bits() as i32);
    bits
}

/// The inverse of [`bits_from_nested`].
pub(super) fn nested_from_bits(codes: Vec<u8>, bits: &[i32]) -> DoubleAbsmax {
    let mut absmax = f32_from_bits(bits);
    let offset = absmax.pop().unwrap_or_default();
    DoubleAbsmax {
        codes,
        absmax,
        offset,
    }
}
