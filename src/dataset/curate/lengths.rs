//! How long the sequences of a data set are.

use std::fmt;

/// Statistics of lengths, for instance of examples in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// Ascending.
    sorted: Vec<usize>,
}

impl Lengths {
    /// Takes lengths in any order.
    pub fn new(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut sorted: Vec<_> = lengths.into_iter().collect();
        sorted.sort_unstable();
        Self { sorted }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.sorted.len()
    }

    /// Their sum.
    pub fn total(&self) -> usize {
        self.sorted.iter().sum()
    }

    /// Their mean; 0 if there are none.
    pub fn mean(&self) -> f64 {
        self.total() as f64 / self.count().max(1) as f64
    }

    /// The least length that at least the share `q` of all is not above: 0 the shortest, 0.5 the median, 1 the longest. None if there
    /// are none.
    pub fn quantile(&self, q: f64) -> Option<usize> {
        let last = self.count().checked_sub(1)?;
        let rank = (q.clamp(0.0, 1.0) * self.count() as f64).ceil() as usize;
        self.sorted.get(rank.saturating_sub(1).min(last)).copied()
    }

    /// How many are longer than `limit`, which a limit would cut or refuse.
    pub fn above(&self, limit: usize) -> usize {
        self.count() - self.sorted.partition_point(|&length| length <= limit)
    }

    /// How many lie in each of `bins` intervals of equal width from 0 to the longest, and that width.
    pub fn histogram(&self, bins: usize) -> (usize, Vec<usize>) {
        let bins = bins.max(1);
        let width = (self.sorted.last().copied().unwrap_or(0) + 1).div_ceil(bins);
        let mut counts = vec![0; bins];
        for length in &self.sorted {
            counts[length / width] += 1;
        }
        (width, counts)
    }
}

/// A line of numbers, and a picture in characters.
impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        const BINS: usize = 12;
        const WIDTH: usize = 40;
        let at = |q| self.quantile(q).unwrap_or(0);
        writeln!(
            f,
            "{} sequences, {} tokens: mean {:.1}, least {}, median {}, 95 % {}, most {}",
            self.count(),
            self.total(),
            self.mean(),
            at(0.0),
            at(0.5),
            at(0.95),
            at(1.0)
        )?;
        let (width, counts) = self.histogram(BINS);
        let most = counts.iter().max().copied().unwrap_or(0).max(1);
        for (bin, count) in counts.iter().enumerate() {
            let range = format!("{}-{}", bin * width, (bin + 1) * width - 1);
            let bar = "█".repeat((count * WIDTH).div_ceil(most));
            writeln!(f, "{range:>12} {count:>7} {bar}")?;
        }
        Ok(())
    }
}
