//! How much of the logits there is at a time.

use crate::{PeftError, Result};

/// Rows and tokens of the vocabulary whose logits are in memory at a time.
///
/// More rows read the weight fewer times; the vocabulary's chunk decides little from some thousand tokens on. The default is 256
/// rows by 4096 tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadChunks {
    rows: usize,
    vocabulary: usize,
}

impl Default for HeadChunks {
    fn default() -> Self {
        Self {
            rows: 256,
            vocabulary: 4096,
        }
    }
}

impl HeadChunks {
    /// Chunks of `rows` labelled tokens by `vocabulary` tokens of the vocabulary; an odd number of these is made even.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] if one of them is zero, or so large that it cannot be counted in.
    pub fn new(rows: usize, vocabulary: usize) -> Result<Self> {
        for (name, value) in [("rows", rows), ("vocabulary", vocabulary)] {
            if value == 0 || value > isize::MAX as usize {
                return Err(PeftError::config(
                    format!("head chunk: {name}"),
                    value,
                    "1 or more, within the memory's size",
                ));
            }
        }
        Ok(Self {
            rows,
            vocabulary: vocabulary.next_multiple_of(2),
        })
    }

    /// Labelled tokens at a time.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Tokens of the vocabulary at a time.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// The most bytes that a forward or a backward pass has in memory on the CPU backend besides operands and results, whatever
    /// the dtypes are.
    ///
    /// With `T` and `V` the rows and tokens of a chunk, no more than there are, `d` the features and `r` the rank of a change:
    ///
    /// ```text
    /// 4·T·V                   logits, in f32, which become their gradient in place
    /// 2·T·V                   that gradient, rounded to bf16
    /// 4·T·d + 4·T·d           hidden states widened to f32, where bf16 is not multiplied as it is; the sums of their gradient
    /// 4·(T + 64)·max(d, V)    what a product packs; the calling thread keeps it
    /// 12·r·(V + T + 64)       factors of the change, and their gradients
    /// 2^20 a thread           strips of the weight and of results; the threads keep them
    /// ```
    ///
    /// and, for a dense weight that is trained, `4·T·V + 4·T·d` for transposes. Kept from forward to backward are the hidden
    /// states, handles of the weight and the factors, and three numbers a row.
    pub fn largest_temporary(&self, size: &HeadSize) -> usize {
        let HeadSize {
            rows,
            features,
            vocabulary,
            rank,
            trained,
            threads,
        } = *size;
        let (t, v) = (self.rows.min(rows), self.vocabulary.min(vocabulary));
        let packed = 4 * (t + 64) * features.max(v);
        let factors = 12 * rank * (v + t + 64);
        let turned = if trained { 4 * t * (v + features) } else { 0 };
        6 * t * v + 8 * t * features + packed + factors + turned + (threads << 20)
    }
}

/// What a head is used on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadSize {
    /// Tokens with a label.
    pub rows: usize,
    /// Width of the hidden states.
    pub features: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Rank of a low-rank change, 0 without one.
    pub rank: usize,
    /// Whether a dense weight is trained itself.
    pub trained: bool,
    /// Threads of Rayon's pool.
    pub threads: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_checked_and_even() {
        for (rows, vocabulary) in [(0, 1), (1, 0), (usize::MAX, 1)] {
            let error = HeadChunks::new(rows, vocabulary).unwrap_err();
            assert!(matches!(error, PeftError::Config { .. }), "{error}");
        }
        let chunks = HeadChunks::new(3, 5).unwrap();
        assert_eq!((chunks.rows(), chunks.vocabulary()), (3, 6));
    }

    #[test]
    fn the_largest_temporary_is_bounded_by_the_chunks() {
        let size = HeadSize {
            rows: 256,
            features: 4096,
            vocabulary: 128_256,
            rank: 0,
            trained: false,
            threads: 2,
        };
        let chunks = HeadChunks::default();
        // 6 + 8 MiB of chunks, 5 of what is packed, 2 of strips.
        assert_eq!(chunks.largest_temporary(&size), 21 << 20);
        let longer = HeadSize {
            rows: 100_000,
            ..size
        };
        assert_eq!(
            chunks.largest_temporary(&longer),
            chunks.largest_temporary(&size)
        );
    }
}
