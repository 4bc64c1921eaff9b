//! JSON objects from files, with bounds and with no key twice.
//!
//! Python takes the last of two equal keys, other readers the first: such a file is another adapter to each of them.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::header::twice;
use crate::{PeftError, Result};

/// Most values of one file that is not large, keys not counted. In memory a value takes tens of times the two bytes that it
/// may have in the file; a configuration of a mebibyte that names modules has fewer.
const MAX_VALUES: usize = 1 << 16;
/// How many bytes a value of a large file has at least, its key counted. A configuration with a rank and an alpha for each of
/// 40,000 modules has some 100.
const BYTES_PER_VALUE: usize = 16;

/// Reads an object.
///
/// # Errors
///
/// [`PeftError::Json`] for what is no JSON object, for a key that stands twice in one object, for more than
/// [`MAX_VALUES`] values, if these are more than one per [`BYTES_PER_VALUE`] bytes, and for more than 127 levels.
pub(crate) fn object(json: &[u8]) -> Result<Map<String, Value>> {
    object_of(json, most_values(json), false)
}

/// As [`object`]; with `repeated` the last of two equal keys counts, as in Python.
pub(super) fn object_with(json: &[u8], repeated: bool) -> Result<Map<String, Value>> {
    object_of(json, most_values(json), repeated)
}

fn most_values(json: &[u8]) -> usize {
    MAX_VALUES.max(json.len() / BYTES_PER_VALUE)
}

/// As [`object_with`], of at most `max_values` values.
pub(super) fn object_of(
    json: &[u8],
    max_values: usize,
    repeated: bool,
) -> Result<Map<String, Value>> {
    let left = Cell::new(max_values);
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value = Strict {
        left: &left,
        max_values,
        repeated,
    }
    .deserialize(&mut deserializer)
    .map_err(PeftError::json)?;
    deserializer.end().map_err(PeftError::json)?;
    match value {
        Value::Object(object) => Ok(object),
        _ => Err(PeftError::json(serde_json::Error::custom("not an object"))),
    }
}

/// A value, of at most so many.
#[derive(Clone, Copy)]
struct Strict<'a> {
    left: &'a Cell<usize>,
    max_values: usize,
    repeated: bool,
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let left = self.left.get().checked_sub(1);
        let left =
            left.ok_or_else(|| D::Error::custom(format!("more than {} values", self.max_values)))?;
        self.left.set(left);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value);
        number
            .map(Value::Number)
            .ok_or_else(|| E::custom("not a finite number"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if !self.repeated && object.contains_key(&key) {
                return Err(twice(&key));
            }
            object.insert(key, entries.next_value_seed(self)?);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_serde_json_reads_is_read_the_same() {
        let json = r#"{"b": [1, -2, 2.5, 1e3, true, null, "\u00e9\n"], "a": {"b": {}, "a": []}, "n": 18446744073709551615}"#;
        let expected: Map<String, Value> = serde_json::from_str(json).unwrap();
        let found = object(json.as_bytes()).unwrap();
        assert_eq!(found, expected);
        assert!(found.keys().eq(expected.keys()), "the order is kept");
    }

    #[test]
    fn a_key_that_stands_twice_is_named_however_deep_and_however_spelled() {
        for json in [
            r#"{"r": 1, "r": 1}"#,
            r#"{"r": 1, "\u0072": 2}"#,
            r#"{"x": [{"y": {"r": 1, "z": 2, "r": 3}}]}"#,
        ] {
            let error = object(json.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("the key `r` stands twice"), "{error}");
            assert!(object_with(json.as_bytes(), true).is_ok());
        }
        let last = object_with(br#"{"r": 1, "r": 2}"#, true).unwrap();
        assert_eq!(last["r"], 2);
    }

    #[test]
    fn values_and_levels_are_bounded() {
        let list = |n: usize| format!(r#"{{"x": [{}]}}"#, vec!["0"; n].join(","));
        // The object and the list are values too.
        assert!(object(list(MAX_VALUES - 2).as_bytes()).is_ok());
        let error = object(list(MAX_VALUES - 1).as_bytes()).unwrap_err();
        assert!(
            error.to_string().contains("more than 65536 values"),
            "{error}"
        );
        let deep = |n: usize| format!(r#"{{"x": {}{}}}"#, "[".repeat(n), "]".repeat(n));
        assert!(object(deep(126).as_bytes()).is_ok());
        assert!(object(deep(127).as_bytes()).is_err());
    }

    #[test]
    fn what_is_no_object_is_an_error() {
        for json in [
            "",
            "[]",
            "3",
            "null",
            "{} x",
            "{\"a\": 1e400}",
            "\u{feff}{}",
        ] {
            assert!(
                matches!(object(json.as_bytes()), Err(PeftError::Json { .. })),
                "{json}"
            );
        }
    }
}
