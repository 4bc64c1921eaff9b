//! The sixteen values of bitsandbytes' FP4, and the weights that codes stand for.
//!
//! `W[o, i] = CODEBOOK[code] · a`, where `a` is the scale of the block of the row-major `[d_out, d_in]` matrix in which the
//! value lies, and the first of two codes of a byte is in its high half; the product is rounded to f32. A code is a float of
//! one sign bit, two bits of exponent and one of mantissa, in which the exponents stand in an order of their own. It is read
//! only: this crate packs in NF4, whose kernels know no other codebook.
//!
//! Source: `get_4bit_type` of bitsandbytes 0.50.2, whose values, twelfths, are divided in f32.

/// The value of code `c` is `CODEBOOK[c]`; codes 0 and 8 are both +0.
pub(super) const CODEBOOK: [f32; 16] = [
    f32::from_bits(0x0000_0000), // 0
    f32::from_bits(0x3baa_aaab), // 0.0625 / 12
    f32::from_bits(0x3f2a_aaab), // 8 / 12
    f32::from_bits(0x3f80_0000), // 1
    f32::from_bits(0x3eaa_aaab), // 4 / 12
    f32::from_bits(0x3f00_0000), // 6 / 12
    f32::from_bits(0x3e2a_aaab), // 2 / 12
    f32::from_bits(0x3e80_0000), // 3 / 12
    f32::from_bits(0x0000_0000), // 0
    f32::from_bits(0xbbaa_aaab), // -0.0625 / 12
    f32::from_bits(0xbf2a_aaab), // -8 / 12
    f32::from_bits(0xbf80_0000), // -1
    f32::from_bits(0xbeaa_aaab), // -4 / 12
    f32::from_bits(0xbf00_0000), // -6 / 12
    f32::from_bits(0xbe2a_aaab), // -2 / 12
    f32::from_bits(0xbe80_0000), // -3 / 12
];

/// Restores `out`, values from index `first` on, of which `codes` and `scales` begin with the byte of that value and the
/// scale of its block.
pub(super) fn dequantize(
    first: usize,
    codes: &[u8],
    scales: &[f32],
    block_size: usize,
    out: &mut [f32],
) {
    let (first_byte, first_block) = (first / 2, first / block_size);
    for (index, value) in (first..).zip(out) {
        let byte = codes[index / 2 - first_byte];
        let code = match index % 2 {
            0 => byte >> 4,
            _ => byte & 15,
        };
        *value = CODEBOOK[usize::from(code)] * scales[index / block_size - first_block];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_values_are_twelfths_rounded_once() {
        let twelfths = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0_f32];
        for (code, twelfth) in twelfths.iter().enumerate() {
            assert_eq!(CODEBOOK[code].to_bits(), (twelfth / 12.0).to_bits());
            assert_eq!(CODEBOOK[code + 8], -CODEBOOK[code]);
        }
        assert!(CODEBOOK[8].is_sign_positive());
    }

    #[test]
    fn any_range_is_restored_as_the_whole_is() {
        let codes: Vec<u8> = (0..50).map(|i| (i * 37 + 11) as u8).collect();
        let scales = [1.0, -2.0, 0.5, 3.0];
        let mut whole = [0.0; 99];
        dequantize(0, &codes, &scales, 32, &mut whole);
        // 11 is 0x0b: the first value is code 0, the second code 11.
        assert_eq!(whole[..2], [0.0, -1.0]);
        assert_eq!(whole[33], -2.0 * CODEBOOK[usize::from(codes[16] & 15)]);
        for first in 0..99 {
            for last in first..99 {
                let mut part = vec![0.0; last - first];
                dequantize(
                    first,
                    &codes[first / 2..],
                    &scales[first / 32..],
                    32,
                    &mut part,
                );
                assert_eq!(part, whole[first..last]);
            }
        }
    }
}
