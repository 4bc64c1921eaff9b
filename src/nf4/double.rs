//! Double quantisation: the scales of the blocks, themselves quantised to eight bits.
//!
//! `a_j ≈ (m[q_j] · a2_k) + o`, where `a_j` is the scale of block `j`, `o` the mean of all scales, `q_j` an 8-bit code,
//! `m` the dynamic map of 256 values in `[-1, 1]`, and `a2_k = max |a_j - o|` over the 256 scales of group `k = j / 256`.
//! The product and the sum are rounded to f32 each. At block size 64 a scale then costs `8/64 + 32/(64·256)` bits a
//! weight, 0.127, in place of 0.5.
//!
//! Sources: QLoRA, section 3, <https://arxiv.org/abs/2305.14314>; T. Dettmers et al., "8-bit Optimizers via Block-wise
//! Quantization", <https://arxiv.org/abs/2110.02861>, for the map. Stored states of bitsandbytes 0.50.2 are restored to
//! the bit. Quantising here takes the nearest value of the map, where bitsandbytes on a CPU takes a neighbour of it now
//! and then.

use rayon::prelude::*;

use crate::{PeftError, Result};

/// How many scales share one second-level scale.
pub const NESTED_BLOCK_SIZE: usize = 256;

/// The 256 values of the eight-bit codes, ascending, with an exact zero at 127 and an exact 1 at 255.
///
/// Decade `i` of 0 to 6 holds, for either sign, `2^i` values: the midpoints of `2^i + 1` points evenly spaced from 0.1
/// to 1, times `10^(i - 6)`.
pub const DYNAMIC_MAP: [f32; 256] = {
    const POWERS: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    const ZERO: usize = 127;
    let mut map = [0.0; 256];
    let mut rank = 1; // distance of a value from the zero
    let mut i = 0;
    while i < POWERS.len() {
        let intervals = 1 << i;
        let mut j = 0;
        while j < intervals {
            let mean = (point(j, intervals) + point(j + 1, intervals)) / 2.0;
            map[ZERO + rank] = POWERS[i] * mean;
            map[ZERO - rank] = -map[ZERO + rank];
            rank += 1;
            j += 1;
        }
        i += 1;
    }
    map[255] = 1.0;
    map
};

/// Point `k` of the `intervals + 1` evenly spaced from 0.1 to 1, as PyTorch's `linspace` has them: counted from the
/// nearer end, with one rounding for product and sum.
pub(crate) const fn point(k: usize, intervals: usize) -> f32 {
    let step = (1.0 - 0.1_f32) / intervals as f32;
    // f64 holds product and sum exactly here (they are multiples of 2^-34 below 2), so the cast is the one rounding.
    if k < intervals.div_ceil(2) {
        (step as f64 * k as f64 + 0.1_f32 as f64) as f32
    } else {
        (1.0 - step as f64 * (intervals - k) as f64) as f32
    }
}

/// The thresholds between neighbouring values of the map, exact in f64, and +∞.
const MIDPOINTS: [f64; 256] = {
    let mut midpoints = [f64::INFINITY; 256];
    let mut i = 0;
    while i < 255 {
        midpoints[i] = (DYNAMIC_MAP[i] as f64 + DYNAMIC_MAP[i + 1] as f64) / 2.0;
        i += 1;
    }
    midpoints
};

/// Cells that `[0, 1]` is cut into, and `[-1, 0]` likewise: 64 to each power of two down to `2^-23`, one for what is
/// below, one for 1.
const CELLS: usize = 23 * 64 + 1;

/// The cell of a value in `[-1, 1]`; it never falls while the value rises.
const fn cell(s: f64) -> usize {
    // Exponent and six bits of the significand.
    let magnitude = (s.abs().to_bits() >> 46) as usize;
    let distance = magnitude.saturating_sub((1023 - 23) << 6);
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

/// For each cell, the number of midpoints in the cells below it; itself, a cell holds one at most.
static BASES: [u8; 2 * CELLS] = {
    let mut bases = [0; 2 * CELLS];
    let mut below = 0;
    let mut k = 0;
    while k < bases.len() {
        bases[k] = below as u8;
        if below < 255 && cell(MIDPOINTS[below]) == k {
            below += 1;
        }
        k += 1;
    }
    bases
};

/// How many scales one task of a thread takes: whole groups.
const TASK: usize = 32 * NESTED_BLOCK_SIZE;

/// Scales of NF4 blocks, quantised to eight bits.
#[derive(Clone, Debug, PartialEq)]
pub struct DoubleAbsmax {
    pub(crate) codes: Vec<u8>,
    pub(crate) absmax: Vec<f32>,
    pub(crate) offset: f32,
}

impl DoubleAbsmax {
    /// Quantises `scales`, which must be finite: the nearest value of the map, a tie to the lower code.
    ///
    /// The mean is summed in f64, in order, and rounded once. A group of equal scales gets second-level scale 0 and
    /// is restored as the mean.
    pub fn quantize(scales: &[f32]) -> Self {
        let mean = scales.iter().map(|&a| f64::from(a)).sum::<f64>() / scales.len().max(1) as f64;
        let offset = mean as f32;
        let mut codes = vec![0; scales.len()];
        let mut absmax = vec![0.0; scales.len().div_ceil(NESTED_BLOCK_SIZE)];
        let tasks = scales.par_chunks(TASK).zip(codes.par_chunks_mut(TASK));
        let tasks = tasks.zip(absmax.par_chunks_mut(TASK / NESTED_BLOCK_SIZE));
        tasks.for_each(|((scales, codes), absmax)| {
            let groups = scales.chunks(NESTED_BLOCK_SIZE);
            let groups = groups.zip(codes.chunks_mut(NESTED_BLOCK_SIZE)).zip(absmax);
            for ((scales, codes), absmax) in groups {
                *absmax = quantize_group(scales, offset, codes);
            }
        });
        Self {
            codes,
            absmax,
            offset,
        }
    }

    /// Puts together what was read from a file. `name` is the name of the weight's tensor, for errors, which name the
    /// second-level scales as bitsandbytes does, `{name}.nested_absmax`.
    ///
    /// # Errors
    ///
    /// [`PeftError::Shape`] unless there is one second-level scale per [`NESTED_BLOCK_SIZE`] codes.
    pub fn from_parts(name: &str, codes: Vec<u8>, absmax: Vec<f32>, offset: f32) -> Result<Self> {
        let groups = codes.len().div_ceil(NESTED_BLOCK_SIZE);
        if absmax.len() != groups {
            return Err(PeftError::Shape {
                tensor: format!("{name}.nested_absmax"),
                expected: vec![groups],
                found: vec![absmax.len()],
            });
        }
        Ok(Self {
            codes,
            absmax,
            offset,
        })
    }

    /// Restores the scales: `DYNAMIC_MAP[code] * absmax + offset`, rounded after the product and after the sum.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut scales = Vec::with_capacity(self.codes.len());
        scales.extend(self.iter());
        scales
    }

    /// The restored scales one after the other.
    pub(super) fn iter(&self) -> impl Iterator<Item = f32> {
        let groups = self.codes.chunks(NESTED_BLOCK_SIZE).zip(&self.absmax);
        groups.flat_map(move |(codes, absmax)| {
            let scale = move |&q: &u8| DYNAMIC_MAP[usize::from(q)] * absmax + self.offset;
            codes.iter().map(scale)
        })
    }

    /// The eight-bit codes, one per scale.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The second-level scales, one per [`NESTED_BLOCK_SIZE`] codes, a partial last group included.
    pub fn absmax(&self) -> &[f32] {
        &self.absmax
    }

    /// The mean that was taken off the scales before they were quantised.
    pub fn offset(&self) -> f32 {
        self.offset
    }
}

/// Codes one group; the result is its second-level scale.
fn quantize_group(scales: &[f32], offset: f32, codes: &mut [u8]) -> f32 {
    // The bits of magnitudes are ordered as magnitudes are.
    let magnitudes = scales.iter().map(|a| (a - offset).abs().to_bits());
    let largest = f32::from_bits(magnitudes.max().unwrap_or(0));
    if largest == 0.0 {
        codes.fill(nearest(0.0));
    } else {
        for (code, a) in codes.iter_mut().zip(scales) {
            *code = nearest(f64::from(a - offset) / f64::from(largest));
        }
    }
    largest
}

/// The code of the value of [`DYNAMIC_MAP`] nearest to `s` in `[-1, 1]`, a tie to the lower code: the number of
/// [`MIDPOINTS`] below `s`, those in lower cells and perhaps the one in its own.
fn nearest(s: f64) -> u8 {
    let base = BASES[cell(s)];
    base + u8::from(MIDPOINTS[usize::from(base)] < s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_has_the_ends_and_the_middle_of_bitsandbytes() {
        // The rest is compared with bitsandbytes in tests/nf4.
        let around_zero = [-5.5000004e-7, 0.0, 5.5000004e-7];
        assert_eq!(DYNAMIC_MAP[126..129], around_zero);
        assert_eq!(
            [DYNAMIC_MAP[0], DYNAMIC_MAP[254], DYNAMIC_MAP[255]],
            [-0.99296874, 0.99296874, 1.0]
        );
        assert!(DYNAMIC_MAP.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn a_tie_goes_to_the_lower_code() {
        for (code, &midpoint) in (0u8..).zip(&MIDPOINTS[..255]) {
            assert_eq!(nearest(midpoint.next_down()), code);
            assert_eq!(nearest(midpoint), code);
            assert_eq!(nearest(midpoint.next_up()), code + 1);
        }
    }

    #[test]
    fn every_midpoint_has_a_cell_of_its_own() {
        let cells: Vec<_> = MIDPOINTS[..255].iter().map(|&s| cell(s)).collect();
        assert!(cells.is_sorted_by(|a, b| a < b));
        assert_eq!((cell(-1.0), cell(1.0)), (0, 2 * CELLS - 1));
    }

    #[test]
    fn cells_find_what_a_search_finds() {
        let check = |s: f64| {
            let below = MIDPOINTS.partition_point(|&midpoint| midpoint < s);
            assert_eq!(usize::from(nearest(s)), below, "{s:e}");
        };
        // Every border between cells, its neighbours, and beyond the lowest; then evenly over all.
        for distance in 0..=(40 << 6) {
            let border = f64::from_bits((1023 << 52) - (distance << 46));
            for s in [border.next_down(), border, border.next_up().min(1.0)] {
                check(s);
                check(-s);
            }
        }
        for i in -1_000_000..=1_000_000 {
            check(f64::from(i) / 1e6);
        }
        check(0.0);
        check(-0.0);
    }

    #[test]
    fn a_hand_made_group_is_coded_and_restored() {
        // Mean 3, deviations -2, 0, 2: the largest of the map, zero, and the lowest of the map.
        let double = DoubleAbsmax::quantize(&[5.0, 3.0, 1.0]);
        assert_eq!(
            double,
            DoubleAbsmax {
                codes: vec![255, 127, 0],
                absmax: vec![2.0],
                offset: 3.0
            }
        );
        assert_eq!(double.dequantize(), [5.0, 3.0, 3.0 - 2.0 * 0.99296874]);
    }

    #[test]
    fn equal_scales_are_restored_as_their_mean() {
        let double = DoubleAbsmax::quantize(&[0.1; 300]);
        assert_eq!(
            double,
            DoubleAbsmax {
                codes: vec![127; 300],
                absmax: vec![0.0; 2],
                offset: 0.1
            }
        );
        assert_eq!(double.dequantize(), [0.1; 300]);
        assert!(DoubleAbsmax::quantize(&[]).dequantize().is_empty());
    }

    #[test]
    fn a_missing_second_level_scale_is_named() {
        let error = DoubleAbsmax::from_parts("w", vec![0; 257], vec![1.0], 0.0).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tensor `w.nested_absmax`: expected shape [2], found [1]"
        );
        assert!(DoubleAbsmax::from_parts("w", vec![0; 257], vec![1.0, 1.0], 0.0).is_ok());
    }
}
