//! Rows of a file one after another, so that a file larger than memory trains.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::json_lines::open;
use super::lines::{Found, Lines};
use crate::{PeftError, Result};

/// Where a row stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// The file.
    pub path: Arc<Path>,
    /// The line of a JSON lines file, or the row of a table; counted from 1.
    pub row: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.row)
    }
}

/// A row, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed<T> {
    /// Where it stands.
    pub place: Place,
    /// The row.
    pub row: T,
}

impl PeftError {
    /// Names the row that this error is about.
    pub fn at_row(self, place: &Place) -> Self {
        match self {
            Self::InRow { .. } | Self::JsonLine { .. } => self,
            other => Self::InRow {
                path: (*place.path).into(),
                row: place.row,
                source: Box::new(other),
            },
        }
    }
}

/// The rows of a JSON lines file. One is in memory at a time.
///
/// After an error the iterator ends.
///
/// ```
/// # fn main() -> burn_peft::Result<()> {
/// use burn_peft::dataset::{JsonLines, Preference};
///
/// let text = br#"{"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}"#;
/// for row in JsonLines::<_, Preference>::new(&text[..], "pairs.jsonl") {
///     let row = row?;
///     assert_eq!(row.place.to_string(), "pairs.jsonl:1");
///     assert_eq!(row.row.chosen.plain(), Some("2"));
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct JsonLines<R, T> {
    lines: Lines<R>,
    ended: bool,
    rows: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> JsonLines<BufReader<File>, T> {
    /// Streams the rows of the file at `path`.
    ///
    /// # Errors
    ///
    /// [`PeftError::Io`] when the file cannot be opened. The items are errors as of
    /// [`read_json_lines`](super::read_json_lines); a file that is one JSON array is refused too, since it has no lines to stream.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Ok(Self::new(open(path)?, path))
    }
}

impl<R: BufRead, T: DeserializeOwned> JsonLines<R, T> {
    /// Streams the rows of `reader`; `name` stands for the file in errors.
    pub fn new(reader: R, name: impl AsRef<Path>) -> Self {
        Self {
            lines: Lines::new(reader, name.as_ref()),
            ended: false,
            rows: PhantomData,
        }
    }
}

impl<R: BufRead, T: DeserializeOwned> Iterator for JsonLines<R, T> {
    type Item = Result<Placed<T>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let item = match self.lines.next_record(PhantomData) {
            Ok(Some(Found::Record(row))) => {
                let place = Place {
                    path: self.lines.path.clone(),
                    row: self.lines.number,
                };
                return Some(Ok(Placed { place, row }));
            }
            Ok(Some(Found::Array(_))) => Some(Err(self.lines.failed(
                "the file is one JSON array: `read_json_lines` reads it whole; to stream it, write one record a line".into(),
            ))),
            Ok(None) => None,
            Err(error) => Some(Err(error)),
        };
        self.ended = true;
        item
    }
}
