//! The lines of a JSON lines file, one at a time, and what usual mistakes in one are.

use std::io::{BufRead, Read};
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny};

use crate::format::recognise;
use crate::{PeftError, Result};

/// The longest line accepted, in bytes: a file that is one endless line must not take all memory.
const MAX_LINE_BYTES: usize = 16 << 20;
/// How many keys of a record an error names.
const MOST_KEYS: usize = 8;

/// The lines of a file. One is in memory at a time.
#[derive(Debug)]
pub(super) struct Lines<R> {
    pub(super) reader: R,
    pub(super) path: Arc<Path>,
    /// The line that was read last, counted from 1.
    pub(super) number: usize,
    line: Vec<u8>,
    /// Whether no record was read yet.
    fresh: bool,
}

/// What stands in a line.
pub(super) enum Found<T> {
    /// A record.
    Record(T),
    /// The beginning of an array that goes on in the reader.
    Array(Vec<u8>),
}

impl<R: BufRead> Lines<R> {
    pub(super) fn new(reader: R, path: &Path) -> Self {
        Self {
            reader,
            path: path.into(),
            number: 0,
            line: Vec::new(),
            fresh: true,
        }
    }

    /// The next record; none at the end of the file.
    pub(super) fn next_record<S, T>(&mut self, seed: S) -> Result<Option<Found<T>>>
    where
        S: for<'de> DeserializeSeed<'de, Value = T>,
    {
        loop {
            self.line.clear();
            // One byte more than allowed, to tell a line of the allowed length from a longer one.
            let mut limited = self.reader.by_ref().take(MAX_LINE_BYTES as u64 + 1);
            limited
                .read_until(b'\n', &mut self.line)
                .map_err(PeftError::io(&self.path))?;
            if self.line.is_empty() {
                return Ok(None);
            }
            self.number += 1;
            let line = &self.line;
            let text = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
            let is_array = self.fresh && text.trim_ascii_start().starts_with(b"[");
            if line.len() > MAX_LINE_BYTES && !is_array {
                return Err(self.failed(format!("longer than {MAX_LINE_BYTES} bytes")));
            }
            if text.trim_ascii().is_empty() {
                continue;
            }
            return match parse_line(text, seed) {
                Ok(record) => {
                    self.fresh = false;
                    Ok(Some(Found::Record(record)))
                }
                // A list that is no record is one of records.
                Err(_) if is_array => Ok(Some(Found::Array(text.to_vec()))),
                Err(error) => {
                    let reason = match self.fresh.then(|| not_lines(line)).flatten() {
                        Some(reason) => reason,
                        None => explained(text, &error),
                    };
                    Err(self.failed(reason))
                }
            };
        }
    }

    pub(super) fn failed(&self, reason: String) -> PeftError {
        PeftError::JsonLine {
            path: (*self.path).into(),
            line: self.number,
            reason,
        }
    }
}

fn parse_line<S, T>(line: &[u8], seed: S) -> serde_json::Result<T>
where
    S: for<'de> DeserializeSeed<'de, Value = T>,
{
    let mut deserializer = serde_json::Deserializer::from_slice(line);
    let record = seed.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(record)
}

/// What a file is that is no JSON lines at all, by its first line.
fn not_lines(line: &[u8]) -> Option<String> {
    if line.starts_with(b"PAR1") {
        return Some(
            "a Parquet file: `datasets.load_dataset(\"parquet\", data_files=PATH)[\"train\"].to_json(OUT)` in Python converts it"
                .to_owned(),
        );
    }
    // A text in two bytes a character may lack its mark.
    if let [0, _, 0, _, ..] | [_, 0, _, 0, ..] = line {
        return Some("a text in UTF-16: save it in UTF-8".to_owned());
    }
    recognise(&line[..line.len().min(512)])
}

/// An error about a line with what to do, where the mistake is a usual one.
fn explained(line: &[u8], error: &serde_json::Error) -> String {
    // The parser sees a single line, whose number it calls 1.
    let reason = error
        .to_string()
        .replace(" at line 1 column ", " at column ");
    let text = line.trim_ascii();
    let is_json = |text: &[u8]| serde_json::from_slice::<IgnoredAny>(text).is_ok();
    let hint = if std::str::from_utf8(line).is_err() {
        "the line is not UTF-8".to_owned()
    } else if text.strip_suffix(b",").is_some_and(is_json) {
        "there is a comma after the record: JSON lines have none, and a JSON array has brackets"
            .to_owned()
    } else if text.starts_with(b"{'") {
        "texts in single quotes are Python's notation: `json.dumps` writes JSON".to_owned()
    } else if error.is_eof() {
        "the record does not end on its line: JSON lines have one record a line".to_owned()
    } else if error.is_data()
        && reason.contains("missing field")
        && let Ok(Keys(keys)) = serde_json::from_slice(line)
    {
        let more = keys.len().saturating_sub(MOST_KEYS);
        let shown: Vec<String> = keys
            .iter()
            .take(MOST_KEYS)
            .map(|key| format!("`{}`", key.escape_debug()))
            .collect();
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        format!(
            "the record has {}{more}; for other keys there are `read_instructions` with `InstructionKeys`, and `#[serde(rename)]` for a type of your own",
            shown.join(", ")
        )
    } else {
        return reason;
    };
    format!("{reason}: {hint}")
}

/// The keys of an object, in their order.
struct Keys(Vec<String>);

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let object = serde_json::Map::deserialize(deserializer)?;
        Ok(Self(object.into_iter().map(|(key, _)| key).collect()))
    }
}
