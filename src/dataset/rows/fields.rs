//! The fields of one row, taken by name, with errors that name them.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::Text;
use super::text::kind;

/// The fields of a row in the order of the file; a name that stands twice is refused.
pub(super) struct Fields(Map<String, Value>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Row;

        impl<'de> Visitor<'de> for Row {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a row, which is a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Map::new();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    if fields.contains_key(&key) {
                        return Err(A::Error::custom(format!("the key `{key}` stands twice")));
                    }
                    fields.insert(key, value);
                }
                Ok(Fields(fields))
            }
        }

        deserializer.deserialize_map(Row)
    }
}

impl Fields {
    /// The value of the one key among `names` that the row has, with that key. Null counts as missing.
    pub(super) fn take<'n, T: DeserializeOwned, E: Error>(
        &mut self,
        names: &[&'n str],
    ) -> Result<Option<(&'n str, T)>, E> {
        let mut found: Option<(&'n str, Value)> = None;
        for name in names {
            match (self.0.shift_remove(*name), &found) {
                (None | Some(Value::Null), _) => {}
                (Some(_), Some((other, _))) => {
                    return Err(E::custom(format!(
                        "both `{other}` and `{name}`, which mean the same"
                    )));
                }
                (Some(value), None) => found = Some((name, value)),
            }
        }
        let Some((name, value)) = found else {
            return Ok(None);
        };
        match serde_json::from_value(value) {
            Ok(value) => Ok(Some((name, value))),
            Err(error) => Err(E::custom(format!("the key `{name}`: {error}"))),
        }
    }

    /// As [`take`](Self::take), and an error that lists the row's keys if it has none of `names`.
    pub(super) fn need<T: DeserializeOwned, E: Error>(&mut self, names: &[&str]) -> Result<T, E> {
        let keys: Vec<_> = self
            .0
            .keys()
            .map(|key| format!("`{}`", key.escape_debug()))
            .collect();
        match self.take(names)? {
            Some((_, value)) => Ok(value),
            None => Err(E::custom(format!(
                "missing field `{}`, or it is null: the row has {}",
                names[0],
                if keys.is_empty() {
                    "no keys".into()
                } else {
                    keys.join(", ")
                }
            ))),
        }
    }

    /// A number that is finite, under `name`, if there is one.
    pub(super) fn number<E: Error>(&mut self, name: &str) -> Result<Option<f64>, E> {
        match self.take::<Value, E>(&[name])? {
            None => Ok(None),
            Some((_, Value::Number(number))) if number.as_f64().is_some_and(f64::is_finite) => {
                Ok(number.as_f64())
            }
            Some((_, other)) => Err(E::custom(format!(
                "the key `{name}`: expected a finite number, found {}",
                kind(&other)
            ))),
        }
    }

    /// Descriptions of tools, if there are any.
    pub(super) fn tools<E: Error>(&mut self) -> Result<Option<Vec<Value>>, E> {
        Ok(self.take(&["tools"])?.map(|(_, tools)| tools))
    }

    /// What is left.
    pub(super) fn rest(self) -> Map<String, Value> {
        self.0
    }
}

/// An error if a prompt and what follows it are not both texts or both messages.
pub(super) fn same_form<E: Error>(
    (first, a): (&str, &Text),
    (second, b): (&str, &Text),
) -> Result<(), E> {
    if a.form() == b.form() {
        return Ok(());
    }
    Err(E::custom(format!(
        "`{first}` is {} and `{second}` is {}: expected both as texts or both as lists of messages",
        a.form(),
        b.form()
    )))
}
