//! LoRA on chosen slices of a fused linear's outputs, for instance on the queries and values of a fused `qkv`.
//!
//! The outputs are cut into slices, of which `k` are chosen. The chosen slice `i`, of `n_i` outputs, has factors `A_i [d_in, r]` and
//! `B_i [r, n_i]` of its own, and the others have no change:
//!
//! ```text
//! A = [A_1 … A_k]   [d_in, k·r]
//! B = [B_1 … B_k]   [r, Σ n_i]    as it is kept and trained
//! ```
//!
//! For the product, `B` is spread to `[k·r, d_out]`, with `B_i` in the rows of `A_i` and the columns of its slice and zeros elsewhere,
//! so that everything computes it as one LoRA of rank `k·r`, with `s` that of rank `r`.
//!
//! Source: `MergedLinear` and its `enable_lora` in loralib, <https://github.com/microsoft/LoRA>, where slices have equal widths.

use std::ops::Range;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::{PeftError, Result};

/// The slices of a map's outputs that have a change, each with factors of its own.
///
/// ```
/// use burn_peft::adapter::{LoraConfig, Slices};
///
/// // Queries and values of a fused `qkv`.
/// let config = LoraConfig::new(8).with_slices(Slices::equal([true, false, true]));
/// // The same with 32 heads of queries and 8 of keys and values.
/// let config = LoraConfig::new(8).with_slices(Slices::widths([(4096, true), (1024, false), (1024, true)]));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Slices {
    /// All outputs are one slice: plain LoRA.
    #[default]
    Whole,
    /// Slices of equal width, as many as there are values; those that are `true` have a change. loralib's `enable_lora`.
    Equal(Vec<bool>),
    /// Slices of these widths, in this order; those that are `true` have a change.
    Widths(Vec<(usize, bool)>),
}

impl Slices {
    /// [`Equal`](Self::Equal) slices.
    pub fn equal(chosen: impl Into<Vec<bool>>) -> Self {
        Self::Equal(chosen.into())
    }

    /// Slices of given [`Widths`](Self::Widths).
    pub fn widths(slices: impl Into<Vec<(usize, bool)>>) -> Self {
        Self::Widths(slices.into())
    }

    /// How many slices have a change: `k`.
    pub fn chosen(&self) -> usize {
        match self {
            Self::Whole => 1,
            Self::Equal(slices) => slices.iter().filter(|&&chosen| chosen).count(),
            Self::Widths(slices) => slices.iter().filter(|(_, chosen)| *chosen).count(),
        }
    }

    /// How many there are, if they are equal and all have a change.
    pub(crate) fn all_equal(&self) -> Option<usize> {
        match self {
            Self::Equal(slices) if slices.iter().all(|chosen| *chosen) => Some(slices.len()),
            _ => None,
        }
    }

    /// Checks what does not depend on the map.
    pub(super) fn validate(&self) -> Result<()> {
        if self.chosen() == 0 {
            return self.error("at least one slice with a change".into());
        }
        match self {
            Self::Widths(slices) if slices.iter().any(|(width, _)| *width == 0) => {
                self.error("no slice of width 0".into())
            }
            _ => Ok(()),
        }
    }

    /// The outputs of each chosen slice.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] if the slices are not those of `d_out` outputs.
    pub(super) fn ranges(&self, d_out: usize) -> Result<Vec<Range<usize>>> {
        self.validate()?;
        let slices = self.all(d_out);
        if total(&slices) != d_out {
            return self.error(format!("slices of {d_out} outputs"));
        }
        let mut start = 0;
        let ranges = slices.into_iter().filter_map(|(width, chosen)| {
            start += width;
            chosen.then_some(start - width..start)
        });
        Ok(ranges.collect())
    }

    /// How many outputs the chosen slices have together, where they say; otherwise the nearest number below `near` that they can have.
    pub(super) fn kept(&self, near: usize) -> usize {
        match self {
            Self::Whole => near,
            Self::Equal(_) => near - near % self.chosen().max(1),
            Self::Widths(slices) => {
                let chosen = slices.iter().filter(|(_, chosen)| *chosen).copied();
                total(&chosen.collect::<Vec<_>>())
            }
        }
    }

    /// The outputs of the map whose chosen slices have `kept` outputs together, if there is one.
    pub(super) fn d_out(&self, kept: usize) -> Option<usize> {
        if self.kept(kept) != kept {
            return None;
        }
        Some(match self {
            Self::Whole => kept,
            Self::Equal(slices) => kept.checked_div(self.chosen())? * slices.len(),
            Self::Widths(slices) => total(slices),
        })
    }

    /// `B [r, Σ n_i]` spread to `[k·r, d_out]`; itself where there is one slice of all outputs.
    pub(super) fn spread(&self, b: Tensor<2>) -> Tensor<2> {
        if *self == Self::Whole {
            return b;
        }
        let [rank, kept] = b.dims();
        let d_out = self.d_out(kept).expect("checked with the factors");
        let zeros = |width| Tensor::<2>::zeros([rank, width], (&b.device(), b.dtype()));
        let mut column = 0;
        let ranges = self.ranges(d_out).expect("checked with the factors");
        let rows = ranges.into_iter().map(|range| {
            let own = b.clone().narrow(1, column, range.len());
            column += range.len();
            let mut row = Vec::with_capacity(3);
            row.extend((range.start > 0).then(|| zeros(range.start)));
            row.push(own);
            row.extend((range.end < d_out).then(|| zeros(d_out - range.end)));
            Tensor::cat(row, 1)
        });
        Tensor::cat(rows.collect(), 0)
    }

    /// Every slice of `d_out` outputs; equal ones only fill them if they can.
    fn all(&self, d_out: usize) -> Vec<(usize, bool)> {
        match self {
            Self::Whole => vec![(d_out, true)],
            Self::Equal(slices) => {
                let width = d_out / slices.len();
                slices.iter().map(|&chosen| (width, chosen)).collect()
            }
            Self::Widths(slices) => slices.clone(),
        }
    }

    fn error<T>(&self, expected: String) -> Result<T> {
        Err(PeftError::config("slices", format!("{self:?}"), expected))
    }
}

/// The sum of widths, which may come from a file.
fn total(slices: &[(usize, bool)]) -> usize {
    let widths = slices.iter().map(|(width, _)| *width);
    widths.fold(0, usize::saturating_add)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn slices_are_those_of_the_outputs_or_an_error() {
        let (equal, widths) = (
            Slices::equal([true, false, true]),
            Slices::widths([(4, true), (1, false), (2, true)]),
        );
        assert_eq!(equal.ranges(12).unwrap(), [0..4, 8..12]);
        assert_eq!(widths.ranges(7).unwrap(), [0..4, 5..7]);
        assert_eq!(Slices::Whole.ranges(7).unwrap().first(), Some(&(0..7)));
        assert_eq!(
            (equal.chosen(), widths.chosen(), Slices::Whole.chosen()),
            (2, 2, 1)
        );
        assert_eq!((equal.d_out(8), equal.d_out(7)), (Some(12), None));
        assert_eq!((widths.d_out(6), widths.d_out(7)), (Some(7), None));
        let none = Slices::equal([false, false]);
        let nothing = Slices::equal([]);
        let thin = Slices::widths([(0, true), (7, true)]);
        let huge = Slices::widths([(usize::MAX, true), (usize::MAX, true)]);
        for (slices, d_out) in [
            (equal, 13),
            (widths, 8),
            (none, 8),
            (nothing, 8),
            (thin, 7),
            (huge, 7),
        ] {
            let error = slices.ranges(d_out).unwrap_err();
            assert!(matches!(error, PeftError::Config { name, .. } if name == "slices"));
        }
    }

    #[test]
    fn factors_are_spread_to_blocks_with_zeros_around() {
        let b = Tensor::<2>::from_floats([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], &Device::default());
        let slices = Slices::widths([(1, false), (1, true), (2, true), (1, false)]);
        let spread = slices.spread(b.clone());
        let expected = Tensor::<2>::from_floats(
            [
                [0.0, 1.0, 0.0, 0.0, 0.0],
                [0.0, 4.0, 0.0, 0.0, 0.0],
                [0.0, 0.0, 2.0, 3.0, 0.0],
                [0.0, 0.0, 5.0, 6.0, 0.0],
            ],
            &b.device(),
        );
        spread.to_data().assert_eq(&expected.to_data(), true);
        let whole = Slices::Whole.spread(b.clone());
        whole.to_data().assert_eq(&b.to_data(), true);
    }
}
