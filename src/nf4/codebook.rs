//! The sixteen values of NF4 and the thresholds between them.
//!
//! `code(s) = #{ i : t_i < s }`, `t_i = (c_i + c_{i+1}) / 2`, where `s` in `[-1, 1]` is a weight divided by the
//! largest magnitude of its block, `c_0 < … < c_15` is the codebook (quantiles of a normal distribution, scaled to
//! `[-1, 1]`, with an exact zero) and `t_0 < … < t_14` are the midpoints, in f32.
//!
//! Source: T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", appendix E,
//! <https://arxiv.org/abs/2305.14314>; the bits are those of bitsandbytes 0.50.2.

/// The sixteen values of NF4, ascending; the value of code `c` is `CODEBOOK[c]`.
///
/// Given as bit patterns, since decimal literals would hide which f32 is meant.
pub const CODEBOOK: [f32; 16] = [
    f32::from_bits(0xbf80_0000), // -1
    f32::from_bits(0xbf32_39b1), // -0.6961928
    f32::from_bits(0xbf06_6b30), // -0.52507305
    f32::from_bits(0xbeca_32a0), // -0.3949175
    f32::from_bits(0xbe91_a24d), // -0.28444138
    f32::from_bits(0xbe3d_353f), // -0.18477343
    f32::from_bits(0xbdba_7871), // -0.091050036
    f32::from_bits(0x0000_0000), // 0
    f32::from_bits(0x3da2_faff), // 0.0795803
    f32::from_bits(0x3e24_cae3), // 0.1609302
    f32::from_bits(0x3e7c_04dd), // 0.2461123
    f32::from_bits(0x3ead_033a), // 0.33791524
    f32::from_bits(0x3ee1_a4b8), // 0.44070983
    f32::from_bits(0x3f10_07ab), // 0.562617
    f32::from_bits(0x3f39_13b3), // 0.72295684
    f32::from_bits(0x3f80_0000), // 1
];

/// The fifteen thresholds between neighbouring codes, ascending: `(CODEBOOK[i] + CODEBOOK[i + 1]) / 2` in f32.
pub const THRESHOLDS: [f32; 15] = {
    let mut thresholds = [0.0; 15];
    let mut i = 0;
    while i < thresholds.len() {
        thresholds[i] = (CODEBOOK[i] + CODEBOOK[i + 1]) / 2.0;
        i += 1;
    }
    thresholds
};

/// The code, 0 to 15, of the value of [`CODEBOOK`] nearest to `s`: the number of [`THRESHOLDS`] below `s`.
///
/// A tie goes to the lower code. Values beyond ±1 get the outermost codes; a NaN, which quantising never passes on,
/// gets code 0.
#[inline]
pub fn nearest(s: f32) -> u8 {
    THRESHOLDS.iter().map(|&t| u8::from(t < s)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thresholds_have_the_bits_of_bitsandbytes() {
        let bits = [
            0xbf591cd8, 0xbf1c5270, 0xbeeb8480, 0xbeadea76, 0xbe703cec, 0xbe0d38bc, 0xbd3a7871,
            0x3d22faff, 0x3df64862, 0x3e5067e0, 0x3e9582d4, 0x3ec753f9, 0x3f006d04, 0x3f248daf,
            0x3f5c89da,
        ];
        assert_eq!(THRESHOLDS.map(f32::to_bits), bits);
    }

    #[test]
    fn a_tie_goes_to_the_lower_code_and_one_ulp_more_to_the_upper() {
        for (code, &threshold) in (0u8..).zip(&THRESHOLDS) {
            assert_eq!(nearest(threshold.next_down()), code);
            assert_eq!(nearest(threshold), code);
            assert_eq!(nearest(threshold.next_up()), code + 1);
        }
    }

    #[test]
    fn every_codebook_value_has_its_own_code() {
        for (code, &value) in (0u8..).zip(&CODEBOOK) {
            assert_eq!(nearest(value), code);
        }
    }

    #[test]
    fn both_zeros_and_subnormals_are_zero_and_the_ends_hold() {
        for s in [
            0.0,
            -0.0,
            f32::from_bits(1),
            -f32::from_bits(1),
            f32::MIN_POSITIVE,
        ] {
            assert_eq!(nearest(s), 7);
        }
        for (s, code) in [(1.0, 15), (-1.0, 0), (1.5, 15), (-1.5, 0)] {
            assert_eq!(nearest(s), code);
        }
    }
}
