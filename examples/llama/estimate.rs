//! A mean with its 95 % confidence interval by the percentile bootstrap.
//!
//! The data are `n` pairs (a sum, a count) and the estimate is the ratio of their totals, `Σ sum / Σ count`. The interval lies
//! between the 2.5 % and the 97.5 % quantile of that ratio over 2000 resamples of `n` pairs with replacement (Efron and
//! Tibshirani, "An Introduction to the Bootstrap", 1993).

use std::fmt;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const RESAMPLES: usize = 2000;

/// A mean over `n` examples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The mean.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Number of examples.
    pub n: usize,
}

impl Estimate {
    /// The ratio of totals. NaN for no pairs.
    pub fn ratio(pairs: &[(f64, f64)]) -> Self {
        let ratio = |pairs: &mut dyn Iterator<Item = (f64, f64)>| {
            let (sum, count) = pairs.fold((0.0, 0.0), |total, pair| {
                (total.0 + pair.0, total.1 + pair.1)
            });
            sum / count
        };
        let value = ratio(&mut pairs.iter().copied());
        // The same examples always give the same interval.
        let mut rng = StdRng::seed_from_u64(0);
        let mut resampled: Vec<f64> = (0..RESAMPLES)
            .map(|_| ratio(&mut (0..pairs.len()).map(|_| pairs[rng.random_range(0..pairs.len())])))
            .collect();
        resampled.sort_by(f64::total_cmp);
        let quantile = |share: f64| resampled[(share * (RESAMPLES - 1) as f64).round() as usize];
        Self {
            value,
            low: quantile(0.025),
            high: quantile(0.975),
            n: pairs.len(),
        }
    }

    /// The estimate in another unit.
    pub fn times(self, factor: f64) -> Self {
        Self {
            value: factor * self.value,
            low: factor * self.low,
            high: factor * self.high,
            n: self.n,
        }
    }

    /// The mean of values.
    pub fn mean(values: impl IntoIterator<Item = f64>) -> Self {
        Self::ratio(
            &values
                .into_iter()
                .map(|value| (value, 1.0))
                .collect::<Vec<_>>(),
        )
    }
}

/// As `0.81 [0.77, 0.85]`, with the formatter's precision.
impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let digits = f.precision().unwrap_or(3);
        write!(
            f,
            "{:.digits$} [{:.digits$}, {:.digits$}]",
            self.value, self.low, self.high
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_coin_is_that_of_the_binomial() {
        let n = 400;
        let coin = Estimate::mean((0..n).map(|i| f64::from(u8::from(i % 4 == 0))));
        assert_eq!((coin.value, coin.n), (0.25, n));
        // The standard error is sqrt(p (1 - p) / n) = 0.02165. The ends lie 1.96 of it from the mean, here on a grid of
        // 1 / n and moved by the resampling, whose own standard error of a 2.5 % quantile is about 0.001: 0.006 is 4 of
        // them and one step of the grid.
        let half = 1.96 * (0.25f64 * 0.75 / n as f64).sqrt();
        assert!((coin.low - (0.25 - half)).abs() < 0.006, "{coin}");
        assert!((coin.high - (0.25 + half)).abs() < 0.006, "{coin}");
    }

    #[test]
    fn long_examples_weigh_more_in_a_ratio() {
        let loss = Estimate::ratio(&[(1.0, 1.0), (30.0, 10.0)]);
        assert_eq!(loss.value, 31.0 / 11.0);
        // Resamples of two pairs have three values, each among the ends with a chance of a quarter or more.
        assert_eq!((loss.low, loss.high), (1.0, 3.0));
        assert_eq!(Estimate::mean([2.0; 5]).to_string(), "2.000 [2.000, 2.000]");
    }
}
