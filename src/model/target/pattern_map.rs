//! A JSON object whose keys keep the order of the file, because in PEFT's patterns the first key that matches wins.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Keys and values in the order in which they were written.
///
/// As in Python's `dict`, a key written twice keeps its first place and its last value. JSON `null` reads as empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatternMap<V> {
    entries: Vec<(String, V)>,
}

impl<V> PatternMap<V> {
    /// An empty map.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the value of `key`: in its place where the key is known, otherwise at the end.
    pub fn insert(&mut self, key: impl Into<String>, value: V) {
        let key = key.into();
        match self.entries.iter_mut().find(|(known, _)| *known == key) {
            Some((_, known)) => *known = value,
            None => self.entries.push((key, value)),
        }
    }

    /// The entries in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &V)> {
        self.entries
            .iter()
            .map(|(key, value)| (key.as_str(), value))
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl<V> Default for PatternMap<V> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
        }
    }
}

impl<K: Into<String>, V> FromIterator<(K, V)> for PatternMap<V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut builder = Builder::default();
        for (key, value) in entries {
            builder.insert(key.into(), value);
        }
        builder.map
    }
}

/// Inserts many keys without searching through all of them each time.
struct Builder<V> {
    map: PatternMap<V>,
    places: std::collections::HashMap<String, usize>,
}

impl<V> Default for Builder<V> {
    fn default() -> Self {
        Self {
            map: PatternMap::new(),
            places: Default::default(),
        }
    }
}

impl<V> Builder<V> {
    fn insert(&mut self, key: String, value: V) {
        match self.places.get(&key) {
            Some(&place) => self.map.entries[place].1 = value,
            None => {
                self.places.insert(key.clone(), self.map.entries.len());
                self.map.entries.push((key, value));
            }
        }
    }
}

impl<V: Serialize> Serialize for PatternMap<V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for PatternMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for InOrder<V> {
            type Value = PatternMap<V>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of patterns, or null")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut builder = Builder::default();
                while let Some((key, value)) = access.next_entry()? {
                    builder.insert(key, value);
                }
                Ok(builder.map)
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(PatternMap::new())
            }
        }

        deserializer.deserialize_any(InOrder(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_keep_their_order_and_a_repeated_key_its_first_place() {
        let map: PatternMap<u8> =
            serde_json::from_str(r#"{"z": 1, "a": 2, "m": 3, "z": 4}"#).unwrap();
        let entries: Vec<_> = map.iter().collect();
        assert_eq!(entries, [("z", &4), ("a", &2), ("m", &3)]);
        assert_eq!(
            serde_json::to_string(&map).unwrap(),
            r#"{"z":4,"a":2,"m":3}"#
        );

        let mut inserted = PatternMap::new();
        for (key, value) in [("z", 1), ("a", 2), ("m", 3), ("z", 4)] {
            inserted.insert(key, value);
        }
        assert_eq!(inserted, map);
        assert_eq!(
            [("z", 4), ("a", 2), ("m", 3)]
                .into_iter()
                .collect::<PatternMap<u8>>(),
            map
        );
    }

    #[test]
    fn null_is_empty() {
        let map: PatternMap<u8> = serde_json::from_str("null").unwrap();
        assert!(map.is_empty());
    }
}
