//! The numbers that the operation gives of each row: `[k, rows]`, one of these in each line.

/// `log p` of the label.
pub(crate) const LOG_PROB: usize = 0;
/// The largest logit `m`. Without a gradient.
pub(crate) const LARGEST: usize = 1;
/// `Σ e^(z − m)`. Without a gradient.
pub(crate) const SUM: usize = 2;
/// The entropy `−Σ p·ln p`.
pub(crate) const ENTROPY: usize = 3;
/// The mean `(1/V)·Σ ln p`.
pub(crate) const MEAN: usize = 4;
/// `ln Σ p²`. Without a gradient.
pub(crate) const LOG_SUM_SQ: usize = 5;
/// 1 where no token has a larger logit than the label, else 0. Without a gradient.
pub(crate) const IS_TOP: usize = 6;

/// How many there are, with the statistics from [`ENTROPY`] on or without.
pub(crate) fn count(statistics: bool) -> usize {
    match statistics {
        true => IS_TOP + 1,
        false => SUM + 1,
    }
}
