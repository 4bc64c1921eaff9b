//! The dynamic data type of 8-bit optimisers: 256 values of `[-1, 1]`, or of `[0, 1]`, dense towards zero.
//!
//! Decade `i` of 0 to 6 holds `2ⁱ` values of either sign in the signed map, `2ⁱ⁺¹` in the unsigned one: the midpoints of evenly
//! spaced points from 0.1 to 1, times `10^(i - 6)`. With 0 and 1 these are 256. A value `s` is stored as the code of the
//! nearest one, a tie going to the lower code.
//!
//! Source: T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization", <https://arxiv.org/abs/2110.02861>, section 1.3;
//! the values are those of bitsandbytes' `create_dynamic_map`, bit for bit.

use crate::nf4::double::{DYNAMIC_MAP, point};

/// Cells that the magnitudes of `[0, 1]` are cut into: 128 to each power of two down to `2⁻²³`, one for what is below, one for 1.
const CELLS: usize = 23 * 128 + 1;

/// A dynamic map, ascending, with what finds the nearest of its values.
pub(crate) struct DynamicMap {
    /// The value of each code.
    pub values: [f32; 256],
    /// The greatest f32 not above the midpoint of a value and the next, and +∞: an f32 is above the midpoint when it is above this.
    pub thresholds: [f32; 256],
    /// For each cell, negative ones first, the number of midpoints in the cells below it; itself, a cell holds one at most.
    bases: [u8; 2 * CELLS],
}

/// For first moments: of either sign, with 0 at code 127 and 1 at 255; the lowest is -0.99297.
pub(crate) static SIGNED: DynamicMap = DynamicMap::new(DYNAMIC_MAP);

/// For second moments: with 0 at code 0 and 1 at 255. The lowest above 0 is 3.25e-7.
pub(crate) static UNSIGNED: DynamicMap = DynamicMap::new(unsigned());

const fn unsigned() -> [f32; 256] {
    const POWERS: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut map = [0.0; 256];
    let mut code = 1;
    let mut i = 0;
    while i < POWERS.len() {
        let intervals = 2 << i;
        let mut j = 0;
        while j < intervals {
            let mean = (point(j, intervals) + point(j + 1, intervals)) / 2.0;
            map[code] = POWERS[i] * mean;
            code += 1;
            j += 1;
        }
        i += 1;
    }
    map[255] = 1.0;
    map
}

/// The cell of a value in `[-1, 1]`; it never falls while the value rises.
#[inline(always)]
const fn cell(s: f32) -> usize {
    // Exponent and seven bits of the significand.
    let magnitude = (s.abs().to_bits() >> 16) as usize;
    let distance = magnitude.saturating_sub((127 - 23) << 7);
    let distance = if distance < CELLS {
        distance
    } else {
        CELLS - 1
    };
    if s.is_sign_negative() {
        CELLS - 1 - distance
    } else {
        CELLS + distance
    }
}

impl DynamicMap {
    const fn new(values: [f32; 256]) -> Self {
        let mut thresholds = [f32::INFINITY; 256];
        let mut i = 0;
        while i < 255 {
            // Exact in f64: two f32 of a few powers of ten.
            let midpoint = (values[i] as f64 + values[i + 1] as f64) / 2.0;
            let rounded = midpoint as f32;
            thresholds[i] = if rounded as f64 > midpoint {
                rounded.next_down()
            } else {
                rounded
            };
            i += 1;
        }
        let mut bases = [0; 2 * CELLS];
        let mut below = 0;
        let mut k = 0;
        while k < bases.len() {
            bases[k] = below as u8;
            if below < 255 && cell(thresholds[below]) == k {
                below += 1;
            }
            k += 1;
        }
        Self {
            values,
            thresholds,
            bases,
        }
    }

    /// The code of the value nearest to `s` in `[-1, 1]`, a tie to the lower code: the number of midpoints below `s`, those in
    /// lower cells and perhaps the one in its own.
    #[inline(always)]
    pub fn nearest(&self, s: f32) -> u8 {
        let base = self.bases[cell(s)];
        base + u8::from(self.thresholds[usize::from(base)] < s)
    }

    /// [`nearest`](Self::nearest) as it is defined: by the distances to all values. The plain twin.
    #[cfg(test)]
    fn nearest_by_distance(&self, s: f32) -> u8 {
        // Differences of two f32 of this range are exact in f64.
        let distance = |value: f32| (f64::from(value) - f64::from(s)).abs();
        let mut best = 0;
        for code in 1..=255 {
            let [new, old] = [code, best].map(|code| distance(self.values[usize::from(code)]));
            if new < old {
                best = code;
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps() -> [&'static DynamicMap; 2] {
        [&SIGNED, &UNSIGNED]
    }

    #[test]
    fn the_unsigned_map_has_the_ends_of_bitsandbytes() {
        // All of both maps are compared with bitsandbytes in tests/adamw_8bit.rs.
        assert_eq!(UNSIGNED.values[..3], [0.0, 3.2500003e-7, 7.75e-7]);
        assert_eq!(UNSIGNED.values[254..], [0.9964844, 1.0]);
        for map in maps() {
            assert!(map.values.is_sorted_by(|a, b| a < b));
        }
    }

    #[test]
    fn every_midpoint_has_a_cell_of_its_own() {
        for map in maps() {
            let cells: Vec<_> = map.thresholds[..255].iter().map(|&s| cell(s)).collect();
            assert!(cells.is_sorted_by(|a, b| a < b));
        }
        assert_eq!((cell(-1.0), cell(1.0)), (0, 2 * CELLS - 1));
    }

    #[test]
    fn the_nearest_is_found_around_every_midpoint_and_border() {
        for map in maps() {
            let check = |s: f32| assert_eq!(map.nearest(s), map.nearest_by_distance(s), "{s:e}");
            for &threshold in &map.thresholds[..255] {
                check(threshold.next_down());
                check(threshold);
                check(threshold.next_up());
            }
            for distance in 0..=(25 << 7) {
                let border = f32::from_bits((127 << 23) - (distance << 16));
                for s in [border.next_down(), border, border.next_up().min(1.0)] {
                    check(s);
                    check(-s);
                }
            }
            for i in -100_000..=100_000 {
                check(i as f32 / 1e5);
            }
            [0.0, -0.0, f32::from_bits(1)].into_iter().for_each(check);
        }
    }

    #[test]
    fn values_are_their_own_nearest() {
        for map in maps() {
            for (code, &value) in (0..=255).zip(&map.values) {
                assert_eq!(map.nearest(value), code);
            }
        }
    }
}
