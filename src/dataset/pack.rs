//! Which sequences share a row, so that little of it is padding.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

use crate::{PeftError, Result};

/// What happens to a sequence that is longer than a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// Fail: nothing is lost unnoticed.
    #[default]
    Refuse,
    /// Keep the beginning.
    Truncate,
    /// Cut it into pieces of a row's length, each a segment of its own: no target is lost, but the context before a cut is.
    Split,
}

/// A part of a sequence.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Piece {
    /// The index of the sequence.
    pub sequence: usize,
    /// Which places of it.
    pub range: Range<usize>,
}

impl Piece {
    /// How many places of a row it takes.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether it takes none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

/// Packs sequences of `lens` places into rows of `capacity` places, best-fit decreasing: by falling length, each into the row with the
/// least room that takes it (Johnson, 1974: at most 11/9 of the least number of rows, and 6/9 of one more). Time `O(n log n)`.
///
/// Rows come in the order in which they were begun; in a row, sequences come in their own order.
///
/// ```
/// # fn main() -> burn_peft::Result<()> {
/// use burn_peft::dataset::{Overflow, pack};
///
/// let rows = pack(&[3, 8, 5, 2], 10, Overflow::Refuse)?;
/// let sequences = |row: usize| rows[row].iter().map(|piece| piece.sequence).collect::<Vec<_>>();
/// assert_eq!([sequences(0), sequences(1)], [vec![1, 3], vec![0, 2]]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// [`PeftError::Config`] for a capacity of 0, a sequence of no places, and, where `overflow` refuses it, a longer one than a row.
pub fn pack(lens: &[usize], capacity: usize, overflow: Overflow) -> Result<Vec<Vec<Piece>>> {
    check(lens, capacity)?;
    let mut pieces = Vec::with_capacity(lens.len());
    for (sequence, &len) in lens.iter().enumerate() {
        match overflow {
            Overflow::Refuse if len > capacity => {
                return Err(PeftError::config(
                    format!("length of sequence {sequence}"),
                    len,
                    format!(
                        "at most the {capacity} places of a row: raise the capacity, or choose `Overflow::Truncate` or `Overflow::Split`"
                    ),
                ));
            }
            Overflow::Refuse | Overflow::Truncate => pieces.push(Piece {
                sequence,
                range: 0..len.min(capacity),
            }),
            Overflow::Split => {
                let starts = (0..len).step_by(capacity);
                pieces.extend(starts.map(|start| Piece {
                    sequence,
                    range: start..len.min(start.saturating_add(capacity)),
                }));
            }
        }
    }
    pieces.sort_by_key(|piece| std::cmp::Reverse(piece.len()));
    let mut rows: Vec<Vec<Piece>> = Vec::new();
    // Room and index of every row that is not full.
    let mut open = BTreeSet::new();
    for piece in pieces {
        let len = piece.len();
        let (room, row) = match open.range((len, 0)..).next().copied() {
            Some(found) => {
                open.remove(&found);
                found
            }
            None => {
                rows.push(Vec::new());
                (capacity, rows.len() - 1)
            }
        };
        if room > len {
            open.insert((room - len, row));
        }
        rows[row].push(piece);
    }
    for row in &mut rows {
        row.sort_by_key(|piece| (piece.sequence, piece.range.start));
    }
    Ok(rows)
}

/// Puts sequences of `lens` places one behind another and cuts the whole into rows of `capacity` places: no padding but in the last row,
/// and a sequence that crosses a cut goes on as a segment of its own.
///
/// # Errors
///
/// [`PeftError::Config`] for a capacity of 0 and a sequence of no places.
pub fn pack_wrapped(lens: &[usize], capacity: usize) -> Result<Vec<Vec<Piece>>> {
    check(lens, capacity)?;
    let mut rows: Vec<Vec<Piece>> = Vec::new();
    let mut room = 0;
    for (sequence, &len) in lens.iter().enumerate() {
        let mut start = 0;
        while start < len {
            if room == 0 {
                rows.push(Vec::new());
                room = capacity;
            }
            let range = start..len.min(start.saturating_add(room));
            room -= range.len();
            start = range.end;
            let row = rows.last_mut().expect("begun above");
            row.push(Piece { sequence, range });
        }
    }
    Ok(rows)
}

fn check(lens: &[usize], capacity: usize) -> Result<()> {
    if capacity == 0 {
        return Err(PeftError::config("capacity", 0, "at least one place a row"));
    }
    match lens.iter().position(|&len| len == 0) {
        Some(sequence) => Err(PeftError::config(
            format!("length of sequence {sequence}"),
            0,
            "at least one place",
        )),
        None => Ok(()),
    }
}

/// How much of the rows is padding, packed and padded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackingReport {
    /// How many sequences there are.
    pub sequences: usize,
    /// Places that hold a token.
    pub tokens: usize,
    /// How many rows hold them packed.
    pub rows: usize,
    /// Places of the packed rows, each of the full capacity.
    pub packed: usize,
    /// Places of padded batches, a sequence each row, in the order given.
    pub padded: usize,
    /// The rows of such a batch.
    pub batch: usize,
}

impl PackingReport {
    /// Compares `rows` of `capacity` places with padded batches of `batch` sequences (at least 1) in the order of `lens`.
    pub fn new(lens: &[usize], rows: &[Vec<Piece>], capacity: usize, batch: usize) -> Self {
        let batch = batch.max(1);
        let longest = |chunk: &[usize]| {
            chunk
                .iter()
                .max()
                .map_or(0, |longest| longest * chunk.len())
        };
        Self {
            sequences: lens.len(),
            tokens: rows.iter().flatten().map(Piece::len).sum(),
            rows: rows.len(),
            packed: rows.len() * capacity,
            padded: lens.chunks(batch).map(longest).sum(),
            batch,
        }
    }

    /// The share of padding in the packed rows.
    pub fn packed_padding(&self) -> f64 {
        share(self.packed.saturating_sub(self.tokens), self.packed)
    }

    /// The share of padding in padded batches.
    pub fn padded_padding(&self) -> f64 {
        share(self.padded.saturating_sub(self.tokens), self.padded)
    }

    /// The share of places that packing saves.
    pub fn saved(&self) -> f64 {
        1.0 - share(self.packed, self.padded)
    }
}

fn share(part: usize, whole: usize) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

impl fmt::Display for PackingReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{} sequences of {} tokens in {} rows: {:.1} % padding, {:.1} % in padded batches of {}; {:.1} % of the places saved",
            self.sequences,
            self.tokens,
            self.rows,
            100.0 * self.packed_padding(),
            100.0 * self.padded_padding(),
            self.batch,
            100.0 * self.saved(),
        )
    }
}
