//! The header of a safetensors file, read more strictly than the `safetensors` crate reads it.
//!
//! ```text
//! {"__metadata__": {"key": "text", ..}, "NAME": {"dtype": "F32", "shape": [r, d_in], "data_offsets": [begin, end]}, ..}
//! ```
//!
//! Of a name that stands twice the crate takes the last; another reader may take the first, and load another adapter
//! from the same file. Here it is an error. Numbers of tensors, of dimensions and of entries, and the lengths of names,
//! are bounded while the text is read, so that no header takes more than a few times its own size in memory.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// Most tensors of a file.
pub const MAX_TENSORS: usize = 100_000;
/// Longest name of a tensor, in bytes; those of the largest models have less than 200.
const MAX_NAME_BYTES: usize = 4096;
/// Most dimensions of a tensor. Those of adapters have one to four.
const MAX_DIMENSIONS: usize = 16;
/// Most entries of the metadata. Trainers that describe themselves there write less than 100.
const MAX_METADATA: usize = 4096;

/// What a header says: values without gap or overlap, each tensor's of the size of its shape and type.
#[derive(Debug)]
pub(super) struct Header {
    pub tensors: BTreeMap<String, TensorInfo>,
    pub metadata: BTreeMap<String, String>,
    /// How many bytes of values there are.
    pub data_len: usize,
}

impl Header {
    /// Reads the JSON of a header; the error is what is wrong with it, and with which tensor.
    pub(super) fn parse(json: &[u8]) -> Result<Self, String> {
        let Parts { tensors, metadata } = serde_json::from_slice(json)
            .map_err(|error| format!("the header is not safetensors': {error}"))?;
        let data_len = data_len(&tensors)?;
        Ok(Self {
            tensors,
            metadata,
            data_len,
        })
    }
}

/// The bytes of values that tensors side by side fill, which the offsets must say of them.
fn data_len(tensors: &BTreeMap<String, TensorInfo>) -> Result<usize, String> {
    let mut in_order: Vec<_> = tensors.iter().collect();
    in_order.sort_by_key(|(_, info)| info.data_offsets);
    let mut start = 0;
    for (name, info) in in_order {
        let (begin, end) = info.data_offsets;
        let named = |what: String| format!("tensor `{}`: {what}", name.escape_debug());
        if begin != start {
            return Err(named(format!(
                "its values begin at {begin}, those before it end at {start}"
            )));
        }
        let mut sides = info.shape.iter().copied();
        let bits = sides
            .try_fold(1_usize, usize::checked_mul)
            .and_then(|n| n.checked_mul(info.dtype.bitsize()));
        if bits.is_none_or(|bits| bits % 8 != 0 || end.checked_sub(begin) != Some(bits / 8)) {
            let (shape, dtype) = (&info.shape, info.dtype);
            return Err(named(format!(
                "shape {shape:?} of {dtype} does not fill the bytes from {begin} to {end}"
            )));
        }
        start = end;
    }
    Ok(start)
}

/// A header as it is written, with nothing standing twice.
struct Parts {
    tensors: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Parts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = Parts;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object with an entry a tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parts, A::Error> {
                let mut tensors = BTreeMap::new();
                let mut metadata = None;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        let Texts(texts) = map.next_value()?;
                        if metadata.replace(texts).is_some() {
                            return Err(twice(&name));
                        }
                        continue;
                    }
                    if name.len() > MAX_NAME_BYTES {
                        return Err(A::Error::custom(format!(
                            "a name of {} bytes: at most {MAX_NAME_BYTES} are read",
                            name.len()
                        )));
                    }
                    if tensors.len() == MAX_TENSORS {
                        return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    let info: Info = map.next_value().map_err(|error| {
                        A::Error::custom(format!("tensor `{}`: {error}", name.escape_debug()))
                    })?;
                    let info = TensorInfo {
                        dtype: info.dtype,
                        shape: info.shape.0,
                        data_offsets: info.data_offsets,
                    };
                    insert(&mut tensors, name, info)?;
                }
                Ok(Parts {
                    tensors,
                    metadata: metadata.unwrap_or_default(),
                })
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

fn insert<V, E: Error>(entries: &mut BTreeMap<String, V>, key: String, value: V) -> Result<(), E> {
    match entries.entry(key) {
        Entry::Occupied(entry) => Err(twice(entry.key())),
        Entry::Vacant(entry) => {
            entry.insert(value);
            Ok(())
        }
    }
}

/// The error that a key stands twice.
pub(super) fn twice<E: Error>(key: &str) -> E {
    const MOST: usize = 120;
    let shown: String = key.chars().take(MOST).collect();
    E::custom(format!("the key `{}` stands twice", shown.escape_debug()))
}

/// A tensor's entry; a field that stands twice is an error of `serde`'s.
#[derive(Deserialize)]
struct Info {
    dtype: Dtype,
    shape: Shape,
    data_offsets: (usize, usize),
}

struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sides;

        impl<'de> Visitor<'de> for Sides {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "a list of at most {MAX_DIMENSIONS} sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sides: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(side) = sides.next_element()? {
                    if shape.len() == MAX_DIMENSIONS {
                        return Err(A::Error::invalid_length(MAX_DIMENSIONS + 1, &self));
                    }
                    shape.push(side);
                }
                Ok(Shape(shape))
            }
        }

        deserializer.deserialize_seq(Sides)
    }
}

/// The metadata: texts by name.
struct Texts(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Texts;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "`__metadata__` of at most {MAX_METADATA} texts")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Texts, A::Error> {
                let mut texts = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if texts.len() == MAX_METADATA {
                        return Err(A::Error::invalid_length(MAX_METADATA + 1, &self));
                    }
                    let text = map.next_value().map_err(|error| {
                        let shown: String = key.chars().take(MAX_NAME_BYTES).collect();
                        A::Error::custom(format!("metadata `{}`: {error}", shown.escape_debug()))
                    })?;
                    insert(&mut texts, key, text)?;
                }
                Ok(Texts(texts))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    fn error(json: &str) -> String {
        Header::parse(json.as_bytes()).unwrap_err()
    }

    #[test]
    fn what_the_crate_reads_is_read_the_same() {
        let json = r#"{"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},
            "a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"e":{"dtype":"F4","shape":[0,2],"data_offsets":[14,14]},
            "__metadata__":{"format":"pt","x":""}}"#;
        let header = Header::parse(json.as_bytes()).unwrap();
        let file = [
            &(json.len() as u64).to_le_bytes()[..],
            json.as_bytes(),
            &[0; 14],
        ]
        .concat();
        let (_, expected) = SafeTensors::read_metadata(&file).unwrap();
        let found: Vec<_> = header.tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
        let mut tensors: Vec<_> = expected.tensors().into_iter().collect();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        // There is no `PartialEq`.
        assert_eq!(format!("{found:?}"), format!("{tensors:?}"));
        assert_eq!(header.data_len, expected.data_len());
        let metadata = expected.metadata().clone().unwrap();
        assert_eq!(header.metadata, metadata.into_iter().collect());
    }

    #[test]
    fn what_stands_twice_is_named() {
        let tensor = r#"{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#;
        for (json, named) in [
            (format!(r#"{{"q":{tensor},"q":{tensor}}}"#), "`q`"),
            // The same name, spelled otherwise.
            (format!(r#"{{"q":{tensor},"\u0071":{tensor}}}"#), "`q`"),
            (
                r#"{"__metadata__":{},"__metadata__":{}}"#.to_owned(),
                "`__metadata__`",
            ),
            (
                r#"{"__metadata__":{"format":"pt","format":"pt"}}"#.to_owned(),
                "`format`",
            ),
            (
                r#"{"q":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#
                    .to_owned(),
                "tensor `q`: duplicate field `dtype`",
            ),
        ] {
            assert!(error(&json).contains(named), "{}", error(&json));
        }
    }

    #[test]
    fn numbers_and_lengths_are_bounded() {
        let tensor =
            |shape: &str| format!(r#"{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,0]}}"#);
        let sides = |n: usize| vec!["0"; n].join(",");
        assert!(Header::parse(format!(r#"{{"q":{}}}"#, tensor(&sides(16))).as_bytes()).is_ok());
        assert!(error(&format!(r#"{{"q":{}}}"#, tensor(&sides(17)))).contains("tensor `q`"));
        let name = "x".repeat(MAX_NAME_BYTES + 1);
        assert!(error(&format!(r#"{{"{name}":{}}}"#, tensor("0"))).contains("4097 bytes"));
        let texts = |n: usize| -> String {
            let texts: Vec<_> = (0..n).map(|i| format!(r#""{i}":"""#)).collect();
            format!(r#"{{"__metadata__":{{{}}}}}"#, texts.join(","))
        };
        assert!(Header::parse(texts(MAX_METADATA).as_bytes()).is_ok());
        assert!(error(&texts(MAX_METADATA + 1)).contains("at most 4096 texts"));
    }
}
