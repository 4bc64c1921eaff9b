//! The code of a value by one comparison instead of fifteen.
//!
//! `code(s) = BASES[k] + (LIMITS[k] < s)`, `k = cell(s) = round(SCALE · s) + 16`: `[-1, 1]` is cut into 31 cells, narrow
//! enough that each holds one threshold `t_i` of the codebook at most; that is its limit, and its base is the number of
//! thresholds in the cells below. A cell without a threshold has the limit +∞.
//!
//! This is the number of thresholds below `s`, exactly, for every f32 of `[-1, 1]` and a few ulps beyond: rounding is
//! monotone, so a threshold in a lower cell is below `s` and one in a higher cell is not. Where a border between cells
//! lies does not matter, as long as each threshold is put into the cell where the kernel would look for it; hence it
//! does not matter either whether product and sum are rounded once or twice (the tests compare both).

use crate::nf4::codebook::THRESHOLDS;

/// Cells for each unit of `s`. Any more and the cells of ±1 would leave the table.
pub(crate) const SCALE: f32 = 15.25;

/// Added to `SCALE · s`: `1.5 · 2^23`, where one ulp is one, so that the sum is rounded to an integer and its low bits
/// are that integer, and the number of the middle cell.
pub(super) const ROUNDER: f32 = 12_582_912.0 + 16.0;

/// How many low bits of the sum count.
pub(super) const MASK: u32 = 31;

/// The cell of a value in `[-1, 1]`.
#[inline(always)]
pub(super) const fn cell(s: f32) -> usize {
    ((s * SCALE + ROUNDER).to_bits() & MASK) as usize
}

/// The threshold in each cell.
pub(super) const LIMITS: [f32; 32] = {
    let mut limits = [f32::INFINITY; 32];
    let mut i = 0;
    while i < THRESHOLDS.len() {
        limits[cell(THRESHOLDS[i])] = THRESHOLDS[i];
        i += 1;
    }
    limits
};

/// The number of thresholds in the cells below each.
pub(super) const BASES: [u32; 32] = {
    let mut bases = [0; 32];
    let mut k = 1;
    while k < bases.len() {
        bases[k] = bases[k - 1] + LIMITS[k - 1].is_finite() as u32;
        k += 1;
    }
    bases
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_threshold_has_a_cell_of_its_own_however_the_sum_is_rounded() {
        let cells = THRESHOLDS.map(cell);
        assert!(cells.is_sorted_by(|a, b| a < b), "{cells:?}");
        for (&threshold, cell) in THRESHOLDS.iter().zip(cells) {
            let once = threshold.mul_add(SCALE, ROUNDER).to_bits() & MASK;
            assert_eq!(once as usize, cell);
        }
        assert_eq!(BASES[31] + u32::from(LIMITS[31].is_finite()), 15);
    }

    #[test]
    fn the_ends_and_what_lies_a_little_beyond_are_in_the_table() {
        for s in [1.0_f32, 1.000001, 1.01] {
            assert_eq!([cell(-s), cell(s)], [1, 31]);
        }
    }
}
