//! [JSON lines](https://jsonlines.org): one JSON value per line of UTF-8 text; blank lines are skipped. A file that is one JSON
//! array, as Alpaca's is, is read too.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read};
use std::marker::PhantomData;
use std::path::Path;

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, SeqAccess, Visitor};

use super::lines::{Found, Lines};
use super::{Instruction, InstructionKeys};
use crate::{PeftError, Result};

/// The longest array accepted, in bytes.
const MAX_ARRAY_BYTES: u64 = 4 << 30;

/// Reads all records of a JSON lines file, or of a file that is one JSON array.
///
/// A byte-order mark of UTF-8, blank lines and line ends of Windows are passed over.
///
/// # Errors
///
/// [`PeftError::Io`] when the file cannot be read; [`PeftError::JsonLine`] names the file and the line that is no
/// record of this form or is longer than 16 MiB, and says what to do about usual mistakes: other keys, a comma after a record, a
/// record over several lines, UTF-16, an archive or a pointer of Git LFS in the file's place.
pub fn read_json_lines<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<Vec<T>> {
    let path = path.as_ref();
    parse_json_lines(open(path)?, path)
}

/// Reads all records of JSON lines, or of one JSON array, from `reader`; `name` stands for the file in errors.
///
/// # Errors
///
/// As [`read_json_lines`].
pub fn parse_json_lines<T: DeserializeOwned>(
    reader: impl BufRead,
    name: impl AsRef<Path>,
) -> Result<Vec<T>> {
    parse(reader, name.as_ref(), PhantomData)
}

/// Reads triples whose keys are called as `keys` says, from a file as [`read_json_lines`] reads it.
///
/// # Errors
///
/// As [`read_json_lines`].
pub fn read_instructions(
    path: impl AsRef<Path>,
    keys: &InstructionKeys,
) -> Result<Vec<Instruction>> {
    let path = path.as_ref();
    parse_instructions(open(path)?, path, keys)
}

/// Reads triples whose keys are called as `keys` says, from `reader`; `name` stands for the file in errors.
///
/// # Errors
///
/// As [`read_json_lines`].
pub fn parse_instructions(
    reader: impl BufRead,
    name: impl AsRef<Path>,
    keys: &InstructionKeys,
) -> Result<Vec<Instruction>> {
    parse(reader, name.as_ref(), keys.clone())
}

pub(super) fn open(path: &Path) -> Result<BufReader<File>> {
    let file = File::open(path).map_err(PeftError::io(path))?;
    Ok(BufReader::new(file))
}

/// Reads records, each by a clone of `seed`.
fn parse<S, T>(reader: impl BufRead, name: &Path, seed: S) -> Result<Vec<T>>
where
    S: for<'de> DeserializeSeed<'de, Value = T> + Clone,
{
    let mut lines = Lines::new(reader, name);
    let mut records = Vec::new();
    loop {
        match lines.next_record(seed.clone())? {
            Some(Found::Record(record)) => records.push(record),
            Some(Found::Array(start)) => {
                let rest = Cursor::new(start).chain(lines.reader);
                return parse_array(rest, name, lines.number, seed);
            }
            None => return Ok(records),
        }
    }
}

/// Reads one array of records, which begins in line `first`.
fn parse_array<S, T>(reader: impl Read, name: &Path, first: usize, seed: S) -> Result<Vec<T>>
where
    S: for<'de> DeserializeSeed<'de, Value = T> + Clone,
{
    struct Records<S, T>(S, PhantomData<T>);

    impl<'de, S, T> Visitor<'de> for Records<S, T>
    where
        S: for<'a> DeserializeSeed<'a, Value = T> + Clone,
    {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("a list of records")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
            let mut records = Vec::new();
            while let Some(record) = items.next_element_seed(self.0.clone())? {
                records.push(record);
            }
            Ok(records)
        }
    }

    let reader = BufReader::new(reader.take(MAX_ARRAY_BYTES));
    let mut deserializer = serde_json::Deserializer::from_reader(reader);
    let records = deserializer.deserialize_seq(Records(seed, PhantomData));
    let records = records.and_then(|records| deserializer.end().map(|()| records));
    records.map_err(|error| {
        let (line, column) = (first + error.line().max(1) - 1, error.column());
        let mut reason = format!("{}, at column {column}", without_place(&error));
        if error.is_eof() {
            reason += &format!(
                ": the list does not end, in the file or in its first {MAX_ARRAY_BYTES} bytes"
            );
        } else if error.is_data() {
            reason += "; other keys: `read_instructions` with `InstructionKeys`, or `#[serde(rename)]` of a type of your own";
        }
        match error.is_io() {
            true => PeftError::io(name)(error.into()),
            false => PeftError::JsonLine {
                path: name.into(),
                line,
                reason,
            },
        }
    })
}

/// The error without its place.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    text.strip_suffix(&place).unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &[u8]) -> Result<Vec<Instruction>> {
        parse_json_lines(text, "data.jsonl")
    }

    const GOOD: &str = r#"{"instruction":"a","response":"b"}"#;

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
    fn a_byte_order_mark_is_passed_over() {
        let text = format!("\u{feff}{GOOD}\r\n\u{feff}{GOOD}\r\n");
        assert_eq!(parse(text.as_bytes()).unwrap().len(), 2);
        let array = format!("\u{feff}[{GOOD}]");
        assert_eq!(parse(array.as_bytes()).unwrap().len(), 1);
    }

    #[test]
    fn an_array_of_records_is_read_in_any_form() {
        for text in [
            format!("[{GOOD},{GOOD}]"),
            format!("\n [\n  {GOOD},\r\n  {GOOD}\n]\n\n"),
            "[\n{\"instruction\": \"a\",\n \"input\": null,\n \"output\": \"b\"\n},{\"instruction\":\"c\",\"output\":\"d\"}]".to_owned(),
        ] {
            assert_eq!(parse(text.as_bytes()).unwrap().len(), 2, "{text}");
        }
        assert_eq!(parse(b"[]").unwrap(), []);
        // Lines that are lists stay lines.
        let lists: Vec<[u8; 2]> = parse_json_lines(&b"[1,2]\n[3,4]"[..], "x").unwrap();
        assert_eq!(lists, [[1, 2], [3, 4]]);
    }

    #[test]
    fn an_error_in_an_array_names_its_line() {
        let text = format!("\n[\n  {GOOD},\n  {{\"prompt\": \"c\"}}\n]");
        let error = parse(text.as_bytes()).unwrap_err().to_string();
        assert!(
            error.starts_with("data.jsonl:4: missing field `instruction`"),
            "{error}"
        );
        assert!(error.contains("InstructionKeys"), "{error}");
        for (text, named) in [
            (format!("[{GOOD},]"), "data.jsonl:1: trailing comma"),
            (format!("[{GOOD}\n"), "the list does not end"),
            (
                format!("[{GOOD}]\n{GOOD}"),
                "data.jsonl:2: trailing characters",
            ),
        ] {
            let error = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn an_error_names_file_and_line() {
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
            let text = [GOOD.as_bytes(), b"\n\n", bad, b"\n"].concat();
            let error = parse(&text).unwrap_err().to_string();
            assert!(
                error.starts_with("data.jsonl:3: ") && error.contains(word),
                "{error}"
            );
        }
    }

    #[test]
    fn usual_mistakes_are_explained() {
        for (text, named) in [
            (
                &br#"{"prompt":"a","completion":"b"}"#[..],
                "missing field `instruction` at column 31: the record has `prompt`, `completion`; for other keys there are `read_instructions`",
            ),
            (
                br#"{"instruction":"a","output":"b"},"#,
                "comma after the record",
            ),
            (b"{'instruction': 'a'}", "Python's notation"),
            (b"{\n  \"instruction\": \"a\"\n}", "one record a line"),
            (b"{\"instruction\":\"\xe9\",\"output\":\"b\"}", "not UTF-8"),
            (b"\xff\xfe{\0\"\0", "UTF-16"),
            (b"{\0\"\0i\0", "UTF-16"),
            (
                b"version https://git-lfs.github.com/spec/v1\noid x\nsize 9\n",
                "git lfs pull",
            ),
            (b"<!DOCTYPE html>\n", "an HTML page"),
            (b"PAR1\x15\x04", "a Parquet file"),
            (b"\x1f\x8b\x08", "gzip"),
            (
                br#"{"instruction":"a","output":3}"#,
                "the key `output`: invalid type: integer `3`",
            ),
            (br#"{"instruction":"a","output":"b",}"#, "trailing comma"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(
                error.starts_with("data.jsonl:1: ") && error.contains(named),
                "{error}"
            );
            assert!(!error.contains("line 1"), "{error}");
        }
    }

    #[test]
    fn triples_of_other_keys_are_read() {
        let text = b"{\"question\":\"a\",\"context\":null,\"answer\":\"b\"}";
        let keys = InstructionKeys::new()
            .with_instruction("question")
            .with_input("context")
            .with_response("answer");
        let read = parse_instructions(&text[..], "x", &keys).unwrap();
        assert_eq!(
            (read[0].instruction.as_str(), read[0].response.as_str()),
            ("a", "b")
        );
        let error = parse_instructions(GOOD.as_bytes(), "x", &keys).unwrap_err();
        assert!(
            error.to_string().contains("missing field `question`"),
            "{error}"
        );
    }

    #[test]
    fn an_endless_line_is_refused_unread() {
        let endless = BufReader::new(std::io::repeat(b' '));
        let error = parse_json_lines::<Instruction>(endless, "pipe").unwrap_err();
        assert!(
            error.to_string().starts_with("pipe:1: longer than"),
            "{error}"
        );
    }

    #[test]
    fn an_array_on_one_very_long_line_is_read() {
        let record = format!(
            r#"{{"instruction":"{}","output":"b"}}"#,
            "x".repeat(1 << 20)
        );
        let text = format!("[{}]", vec![record; 17].join(","));
        assert_eq!(parse(text.as_bytes()).unwrap().len(), 17);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read_json_lines::<Instruction>("no/such/file.jsonl").unwrap_err();
        assert!(matches!(&error, PeftError::Io { path, .. } if path.ends_with("file.jsonl")));
    }
}
