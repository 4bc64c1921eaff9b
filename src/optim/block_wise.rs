//! Block-wise quantisation of an optimiser's state to eight bits.
//!
//! `x_i ≈ map[q_i] · a_k`, `a_k = max |x_j|` over the 256 consecutive values of block `k = i / 256`, `q_i` the code of the value of
//! the [dynamic map](super::dynamic_map) nearest to `x_i / a_k`, where the quotient is rounded to f32. One value out of the ordinary
//! costs its own block precision, and no other. A value takes 1 + 4/256 bytes.
//!
//! Source: T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization", <https://arxiv.org/abs/2110.02861>, section 2.
//! Codes are the nearest ones, as the paper and bitsandbytes' implementation in torch have them; what bitsandbytes 0.50.2 runs
//! on a CPU takes a neighbour now and then.

use super::dynamic_map::DynamicMap;

/// Values that share one scale.
pub(crate) const BLOCK: usize = 256;
/// Words of 32 bits that hold the codes of a block, four a word, the first in the lowest bits.
pub(crate) const WORDS: usize = BLOCK / 4;

/// The values of a block: `map[code] · absmax`, rounded once.
#[inline(always)]
pub(crate) fn dequantize(map: &DynamicMap, words: &[i32; WORDS], absmax: f32) -> [f32; BLOCK] {
    let mut values = [0.0; BLOCK];
    for (values, word) in values.chunks_exact_mut(4).zip(words) {
        for (value, code) in values.iter_mut().zip(word.to_le_bytes()) {
            *value = map.values[usize::from(code)] * absmax;
        }
    }
    values
}

/// Stores a block; the result is its scale. A block of zeros has scale 0, one with a value that is not finite has scale NaN: it
/// would make any other scale meaningless, and a NaN goes on to be seen.
#[inline(always)]
pub(crate) fn quantize(map: &DynamicMap, values: &[f32; BLOCK], words: &mut [i32; WORDS]) -> f32 {
    // Bits of magnitudes are ordered as magnitudes are, those of infinity and NaN above all.
    let magnitude = |value: &f32| value.to_bits() & (u32::MAX >> 1);
    let bits = values.iter().map(magnitude).fold(0, u32::max);
    let absmax = f32::from_bits(bits);
    if !absmax.is_finite() {
        words.fill(0);
        return f32::NAN;
    }
    let divisor = if absmax == 0.0 { 1.0 } else { absmax };
    let mut quotients = [0.0; BLOCK];
    for (quotient, value) in quotients.iter_mut().zip(values) {
        *quotient = value / divisor;
    }
    for (word, quotients) in words.iter_mut().zip(quotients.as_chunks::<4>().0) {
        *word = i32::from_le_bytes(quotients.map(|s| map.nearest(s)));
    }
    absmax
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::dynamic_map::{SIGNED, UNSIGNED};
    use super::*;

    #[test]
    fn a_hand_made_block_is_coded_and_restored() {
        let mut values = [0.0; BLOCK];
        [values[0], values[1], values[2]] = [-2.0, 4.0, 2e-6];
        let mut words = [0; WORDS];
        let absmax = quantize(&SIGNED, &values, &mut words);
        assert_eq!(absmax, 4.0);
        // -0.5 lies next to the signed map's -0.50078; 5e-7 next to 5.5e-7, the lowest.
        assert_eq!(words[0].to_le_bytes()[1..], [255, 128, 127]);
        let restored = dequantize(&SIGNED, &words, absmax);
        assert!((restored[0] + 2.0).abs() < 0.03, "{}", restored[0]);
        assert_eq!(restored[1..4], [4.0, 4.0 * 5.5000004e-7, 0.0]);
        assert_eq!(restored[4..], values[4..]);
    }

    #[test]
    fn zeros_and_what_is_not_finite_are_what_they_were() {
        for map in [&SIGNED, &UNSIGNED] {
            let mut words = [7; WORDS];
            assert_eq!(quantize(map, &[0.0; BLOCK], &mut words), 0.0);
            assert_eq!(dequantize(map, &words, 0.0), [0.0; BLOCK]);
            for bad in [f32::NAN, f32::INFINITY] {
                let mut values = [1.0; BLOCK];
                values[77] = bad;
                let absmax = quantize(map, &values, &mut words);
                assert!(dequantize(map, &words, absmax).iter().all(|x| x.is_nan()));
            }
        }
    }

    proptest! {
        /// The error of a value is half of the gap that it lies in, at most.
        #[test]
        fn errors_are_half_a_gap(
            values in proptest::collection::vec(-1e3f32..1e3, BLOCK), power in -30i32..30, positive: bool,
        ) {
            let map = if positive { &UNSIGNED } else { &SIGNED };
            let mut block: [f32; BLOCK] = values.try_into().unwrap();
            for value in &mut block {
                *value *= 2f32.powi(power);
                if positive {
                    *value = value.abs();
                }
            }
            let mut words = [0; WORDS];
            let absmax = quantize(map, &block, &mut words);
            let restored = dequantize(map, &words, absmax);
            for (x, y) in block.into_iter().zip(restored) {
                let above = map.values.partition_point(|&value| value * absmax < x).min(255);
                let gap = map.values[above] - map.values[above.saturating_sub(1)];
                // Roundings of the quotient, the product and the threshold; the signed map ends before -1.
                let end = if x < map.values[0] * absmax { (1.0 + map.values[0]) * absmax } else { 0.0 };
                let bound = gap * absmax / 2.0 + end + 4.0 * f32::EPSILON * x.abs();
                prop_assert!((x - y).abs() <= bound, "{x}: {y}, {bound}");
            }
        }
    }
}
