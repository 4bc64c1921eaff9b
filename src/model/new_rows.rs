//! Values of the rows that a table of tokens gains when its vocabulary grows.

use crate::splitmix::{Stream, mix};

/// What the rows of new tokens begin with, in an embedding and in an output head.
///
/// Every choice depends on its seed, the name of the tensor and the old values only, not on the device.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum NewRows {
    /// Near the mean of the old rows, as `resize_token_embeddings` of transformers has it by default:
    /// `N(m, ε·Σ)` with the mean `m` and the covariance `Σ` of the old rows and `ε = 1e-9`. A new token is then about as
    /// likely as the average old one, and tokens are told apart.
    ///
    /// A row is `m + √(ε/n)·Σ_i g_i·(e_i − m)`, with `n` of the old rows `e_i` and `g_i` from `N(0, 1)`. Values of a head's bias are
    /// drawn about its mean in the same way, with `ε = 1e-18`.
    ///
    /// Source: J. Hewitt, [*Initializing New Word Embeddings for Pretrained Language
    /// Models*](https://nlp.stanford.edu/~johnhew/vocab-expansion.html), 2021.
    Mean {
        /// The seed.
        seed: u64,
    },
    /// Every value from `N(0, std²)`: transformers with `mean_resizing=False`, where `std` is the configuration's
    /// `initializer_range`. Values of a bias are 0.
    Normal {
        /// The standard deviation.
        std: f64,
        /// The seed.
        seed: u64,
    },
    /// Zeros.
    Zeros,
}

impl Default for NewRows {
    fn default() -> Self {
        Self::Mean { seed: 0 }
    }
}

/// A table of which rows are known: `[rows, columns]`.
pub(crate) struct Table<'a> {
    /// Its name, which makes the random numbers its own.
    pub name: &'a str,
    pub rows: usize,
    pub columns: usize,
    /// Writes the row of this index.
    pub row: &'a dyn Fn(usize, &mut [f32]),
    /// Whether it is a bias: a row is one number.
    pub is_bias: bool,
}

impl NewRows {
    /// The largest number of old rows that a new one is drawn from.
    const DRAWN: usize = 256;

    /// `added` new rows for a table, one after the other.
    pub(crate) fn draw(&self, table: &Table, added: usize) -> Vec<f32> {
        let mut new = vec![0.0; added * table.columns];
        match *self {
            Self::Zeros => {}
            Self::Normal { .. } if table.is_bias => {}
            Self::Normal { std, seed } => {
                let mut stream = table.stream(seed);
                for pair in new.chunks_mut(2) {
                    for (value, normal) in pair.iter_mut().zip(stream.normal_pair()) {
                        *value = (normal * std) as f32;
                    }
                }
            }
            Self::Mean { seed } if table.rows > 0 && table.columns > 0 => {
                let mean = table.mean();
                let mut stream = table.stream(seed);
                let epsilon: f64 = if table.is_bias { 1e-18 } else { 1e-9 };
                let (mut old, mut sum) = (vec![0.0; table.columns], vec![0.0; table.columns]);
                for new in new.chunks_mut(table.columns) {
                    sum.fill(0.0);
                    let drawn = table.rows.min(Self::DRAWN);
                    let scale = (epsilon / drawn as f64).sqrt();
                    for index in 0..drawn {
                        // All of them, or as many at random: the covariance is the same.
                        let index = match drawn == table.rows {
                            true => index,
                            false => (stream.next() % table.rows as u64) as usize,
                        };
                        let [normal, _] = stream.normal_pair();
                        (table.row)(index, &mut old);
                        for ((sum, &old), mean) in sum.iter_mut().zip(&old).zip(&mean) {
                            *sum += normal * scale * (f64::from(old) - mean);
                        }
                    }
                    for ((new, mean), sum) in new.iter_mut().zip(&mean).zip(&sum) {
                        *new = (mean + sum) as f32;
                    }
                }
            }
            Self::Mean { .. } => {}
        }
        new
    }
}

impl Table<'_> {
    fn stream(&self, seed: u64) -> Stream {
        let name = self.name.bytes();
        Stream(name.fold(mix(seed), |state, byte| mix(state ^ u64::from(byte))))
    }

    fn mean(&self) -> Vec<f64> {
        let (mut sum, mut row) = (vec![0.0; self.columns], vec![0.0; self.columns]);
        for index in 0..self.rows {
            (self.row)(index, &mut row);
            for (sum, &value) in sum.iter_mut().zip(&row) {
                *sum += f64::from(value);
            }
        }
        sum.iter_mut().for_each(|sum| *sum /= self.rows as f64);
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows whose second column is twice the first, about means 3 and -1.
    fn row(index: usize, out: &mut [f32]) {
        let deviation = (index as f32 * 0.7).sin();
        out.copy_from_slice(&[3.0 + deviation, -1.0 + 2.0 * deviation]);
    }

    fn table(rows: usize, name: &str) -> Table<'_> {
        Table {
            name,
            rows,
            columns: 2,
            row: &row,
            is_bias: false,
        }
    }

    #[test]
    fn rows_near_the_mean_have_the_old_rows_covariance() {
        for rows in [100, 5000] {
            let table = table(rows, "embed.weight");
            let mean = table.mean();
            let old: Vec<[f32; 2]> = (0..rows)
                .map(|index| {
                    let mut out = [0.0; 2];
                    row(index, &mut out);
                    out
                })
                .collect();
            let variance: f64 = old
                .iter()
                .map(|row| (f64::from(row[0]) - mean[0]).powi(2))
                .sum::<f64>()
                / rows as f64;
            let added = 4000;
            let new = NewRows::default().draw(&table, added);
            let deviations = |column: usize| -> Vec<f64> {
                new.chunks(2)
                    .map(|row| f64::from(row[column]) - mean[column])
                    .collect()
            };
            let [a, b] = [deviations(0), deviations(1)];
            let found = a.iter().map(|a| a * a).sum::<f64>() / added as f64;
            // What f32 keeps of deviations of 2e-5 about 3 is near enough.
            assert!((found / (1e-9 * variance) - 1.0).abs() < 0.1, "{found}");
            let mixed = a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>() / added as f64;
            assert!((mixed / (2e-9 * variance) - 1.0).abs() < 0.1, "{mixed}");
        }
    }

    #[test]
    fn rows_follow_from_seed_and_name() {
        let draw = |seed, name| NewRows::Mean { seed }.draw(&table(50, name), 3);
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert_ne!(draw(1, "a"), draw(2, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
        let normal = |std| NewRows::Normal { std, seed: 3 }.draw(&table(50, "a"), 2001);
        let values = normal(0.02);
        let variance = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        assert!((variance.sqrt() / 0.02 - 1.0).abs() < 0.05);
        assert_eq!(NewRows::Zeros.draw(&table(50, "a"), 2), [0.0; 4]);
    }

    #[test]
    fn a_table_without_rows_or_columns_has_no_mean() {
        assert_eq!(NewRows::default().draw(&table(0, "a"), 1), [0.0; 2]);
        let mut narrow = table(3, "a");
        narrow.columns = 0;
        assert!(NewRows::default().draw(&narrow, 5).is_empty());
    }

    #[test]
    fn a_bias_begins_at_its_mean() {
        let row = |index: usize, out: &mut [f32]| out[0] = index as f32;
        let table = Table {
            name: "bias",
            rows: 5,
            columns: 1,
            row: &row,
            is_bias: true,
        };
        assert_eq!(NewRows::default().draw(&table, 2), [2.0; 2]);
        let normal = NewRows::Normal { std: 1.0, seed: 0 };
        assert_eq!(normal.draw(&table, 2), [0.0; 2]);
    }
}
