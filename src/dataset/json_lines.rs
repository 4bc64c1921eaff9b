//! [JSON lines](https://jsonlines.org): one JSON value per line of UTF-8 text; blank lines are skipped.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::{PeftError, Result};

/// The longest line accepted, in bytes: a file that is one endless line must not take all memory.
const MAX_LINE_BYTES: usize = 16 << 20;

/// Reads all records of a JSON lines file.
///
/// # Errors
///
/// [`PeftError::Io`] when the file cannot be read; [`PeftError::JsonLine`] names the file and the line that is no
/// record of this form or is longer than 16 MiB.
pub fn read_json_lines<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<Vec<T>> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|source| PeftError::Io {
        path: path.into(),
        source,
    })?;
    parse_json_lines(BufReader::new(file), path)
}

/// Reads all records of JSON lines from `reader`; `name` stands for the file in errors.
///
/// # Errors
///
/// As [`read_json_lines`].
pub fn parse_json_lines<T: DeserializeOwned>(
    mut reader: impl BufRead,
    name: &Path,
) -> Result<Vec<T>> {
    let mut records = Vec::new();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        // One byte more than allowed, to tell a line of the allowed length from a longer one.
        let mut limited = reader.by_ref().take(MAX_LINE_BYTES as u64 + 1);
        limited
            .read_until(b'\n', &mut line)
            .map_err(|source| PeftError::Io {
                path: name.into(),
                source,
            })?;
        if line.is_empty() {
            break;
        }
        let failed = |reason| PeftError::JsonLine {
            path: name.into(),
            line: number,
            reason,
        };
        if line.len() > MAX_LINE_BYTES {
            return Err(failed(format!("longer than {MAX_LINE_BYTES} bytes")));
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        records.push(serde_json::from_slice(&line).map_err(|e| {
            // The parser sees a single line, whose number it calls 1.
            failed(e.to_string().replace(" at line 1 column ", " at column "))
        })?);
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::Instruction;

    fn parse(text: &[u8]) -> Result<Vec<Instruction>> {
        parse_json_lines(text, "data.jsonl".as_ref())
    }

    #[test]
    fn lines_are_records_and_blank_lines_are_not() {
        let text = "{\"instruction\":\"a\",\"response\":\"é\"}\r\n\n  \n{\"instruction\":\"b\",\"input\":\"i\",\"response\":\"\"}";
        let records = parse(text.as_bytes()).unwrap();
        assert_eq!(records.len(), 2);
        assert_eq!(records[0].response, "é");
        assert_eq!(records[1].input, "i");
        assert_eq!(parse(b"").unwrap(), []);
    }

    #[test]
    fn an_error_names_file_and_line() {
        let good = r#"{"instruction":"a","response":"b"}"#;
        for (bad, word) in [
            (&br#"{"instruction":"a"}"#[..], "missing field `response`"),
            (b"{", "EOF"),
            (b"[1]", "data.jsonl:3"),
            (b"\xff", "data.jsonl:3"),
            (
                br#"{"instruction":"a","response":"b"} x"#,
                "trailing characters at column",
            ),
        ] {
            let text = [good.as_bytes(), b"\n\n", bad, b"\n"].concat();
            let error = parse(&text).unwrap_err().to_string();
            assert!(
                error.starts_with("data.jsonl:3: ") && error.contains(word),
                "{error}"
            );
        }
    }

    #[test]
    fn an_endless_line_is_refused_unread() {
        let endless = BufReader::new(std::io::repeat(b' '));
        let error = parse_json_lines::<Instruction>(endless, "pipe".as_ref()).unwrap_err();
        assert!(
            error.to_string().starts_with("pipe:1: longer than"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read_json_lines::<Instruction>("no/such/file.jsonl").unwrap_err();
        assert!(matches!(&error, PeftError::Io { path, .. } if path.ends_with("file.jsonl")));
    }
}
