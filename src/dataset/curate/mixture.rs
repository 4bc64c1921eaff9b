//! Rows of several sources in stated shares.

use crate::splitmix::Stream;
use crate::{PeftError, Result};

/// Draws rows from several sources, each with a probability of its weight over the sum of all weights, until one of the drawn sources is
/// exhausted, so that the shares hold to the end. A share of text as the base model has seen it works against forgetting.
///
/// The same seed gives the same order.
///
/// ```
/// # fn main() -> burn_peft::Result<()> {
/// use burn_peft::dataset::Mixture;
///
/// let tuning = ["a"].into_iter().cycle();
/// let replay = ["b"].into_iter().cycle();
/// let mixture = Mixture::new(vec![(3.0, tuning), (1.0, replay)], 7)?;
/// let share = mixture.take(1000).filter(|row| *row == "b").count();
/// assert!((200..300).contains(&share));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Mixture<I> {
    sources: Vec<(f64, I)>,
    total: f64,
    seed: u64,
    drawn: u64,
    ended: bool,
}

impl<I: Iterator> Mixture<I> {
    /// Draws from `sources`, each with its weight.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for no sources, and for a weight that is not positive and finite.
    pub fn new(sources: Vec<(f64, I)>, seed: u64) -> Result<Self> {
        if sources.is_empty() {
            return Err(PeftError::config("sources", "none", "at least one"));
        }
        for (index, (weight, _)) in sources.iter().enumerate() {
            if !(*weight > 0.0 && weight.is_finite()) {
                let name = format!("weight of source {index}");
                return Err(PeftError::config(name, weight, "a positive, finite number"));
            }
        }
        Ok(Self {
            total: sources.iter().map(|(weight, _)| weight).sum(),
            sources,
            seed,
            drawn: 0,
            ended: false,
        })
    }
}

impl<I: Iterator> Iterator for Mixture<I> {
    type Item = I::Item;

    fn next(&mut self) -> Option<I::Item> {
        if self.ended {
            return None;
        }
        // In [0, total), from the seed and the number of the draw alone.
        let bits = Stream(crate::splitmix::mix(self.seed) ^ self.drawn).next();
        let mut point = (bits >> 11) as f64 / (1_u64 << 53) as f64 * self.total;
        self.drawn += 1;
        let last = self.sources.len() - 1;
        let mut chosen = last;
        for (index, (weight, _)) in self.sources.iter().enumerate() {
            if point < *weight {
                chosen = index;
                break;
            }
            point -= weight;
        }
        let row = self.sources[chosen].1.next();
        self.ended = row.is_none();
        row
    }
}
