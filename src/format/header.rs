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
use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::limits::FileLimits;

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
    pub(super) fn parse(json: &[u8], limits: &FileLimits) -> Result<Self, String> {
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        let parts = PartsOf(limits).deserialize(&mut deserializer);
        let parts = parts.and_then(|parts| deserializer.end().map(|()| parts));
        let Parts { tensors, metadata } =
            parts.map_err(|error| format!("the header is not safetensors': {error}"))?;
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

/// Reads the parts within limits.
struct PartsOf<'a>(&'a FileLimits);

impl<'de> DeserializeSeed<'de> for PartsOf<'_> {
    type Value = Parts;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Parts, D::Error> {
        struct Fields<'a>(&'a FileLimits);

        impl<'de> Visitor<'de> for Fields<'_> {
            type Value = Parts;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object with an entry a tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parts, A::Error> {
                let limits = self.0;
                let mut tensors = BTreeMap::new();
                let mut metadata = None;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        let texts = map.next_value_seed(TextsOf(limits))?;
                        if metadata.replace(texts).is_some() {
                            return Err(twice(&name));
                        }
                        continue;
                    }
                    if name.len() > limits.name_bytes {
                        return Err(A::Error::custom(format!(
                            "a name of {} bytes: at most {} are read, or `FileLimits::name_bytes`",
                            name.len(),
                            limits.name_bytes
                        )));
                    }
                    if tensors.len() == limits.tensors {
                        return Err(A::Error::custom(format!(
                            "more than {} tensors, or `FileLimits::tensors`",
                            limits.tensors
                        )));
                    }
                    let info = map.next_value_seed(InfoOf(limits)).map_err(|error| {
                        A::Error::custom(format!("tensor `{}`: {error}", name.escape_debug()))
                    })?;
                    match limits.repeated_names {
                        true => {
                            tensors.insert(name, info);
                        }
                        false => insert(&mut tensors, name, info)?,
                    }
                }
                Ok(Parts {
                    tensors,
                    metadata: metadata.unwrap_or_default(),
                })
            }
        }

        deserializer.deserialize_map(Fields(self.0))
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

/// Reads a tensor's entry; a field that stands twice is an error.
struct InfoOf<'a>(&'a FileLimits);

impl<'de> DeserializeSeed<'de> for InfoOf<'_> {
    type Value = TensorInfo;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<TensorInfo, D::Error> {
        struct Fields<'a>(&'a FileLimits);

        #[derive(Deserialize)]
        #[serde(field_identifier, rename_all = "snake_case")]
        enum Field {
            Dtype,
            Shape,
            DataOffsets,
            #[serde(other)]
            Other,
        }

        impl<'de> Visitor<'de> for Fields<'_> {
            type Value = TensorInfo;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object with `dtype`, `shape` and `data_offsets`")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TensorInfo, A::Error> {
                let (mut dtype, mut shape, mut data_offsets) = (None, None, None);
                while let Some(field) = map.next_key()? {
                    match field {
                        Field::Dtype if dtype.is_some() => {
                            return Err(A::Error::duplicate_field("dtype"));
                        }
                        Field::Dtype => dtype = Some(map.next_value::<Dtype>()?),
                        Field::Shape if shape.is_some() => {
                            return Err(A::Error::duplicate_field("shape"));
                        }
                        Field::Shape => shape = Some(map.next_value_seed(ShapeOf(self.0))?),
                        Field::DataOffsets if data_offsets.is_some() => {
                            return Err(A::Error::duplicate_field("data_offsets"));
                        }
                        Field::DataOffsets => {
                            data_offsets = Some(map.next_value::<(usize, usize)>()?);
                        }
                        Field::Other => {
                            map.next_value::<serde::de::IgnoredAny>()?;
                        }
                    }
                }
                let missing = A::Error::missing_field;
                Ok(TensorInfo {
                    dtype: dtype.ok_or_else(|| missing("dtype"))?,
                    shape: shape.ok_or_else(|| missing("shape"))?,
                    data_offsets: data_offsets.ok_or_else(|| missing("data_offsets"))?,
                })
            }
        }

        deserializer.deserialize_map(Fields(self.0))
    }
}

/// Reads a shape.
struct ShapeOf<'a>(&'a FileLimits);

impl<'de> DeserializeSeed<'de> for ShapeOf<'_> {
    type Value = Vec<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<usize>, D::Error> {
        struct Sides(usize);

        impl<'de> Visitor<'de> for Sides {
            type Value = Vec<usize>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "a list of at most {} sizes", self.0)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sides: A) -> Result<Vec<usize>, A::Error> {
                let mut shape = Vec::new();
                while let Some(side) = sides.next_element()? {
                    if shape.len() == self.0 {
                        return Err(A::Error::invalid_length(self.0.saturating_add(1), &self));
                    }
                    shape.push(side);
                }
                Ok(shape)
            }
        }

        deserializer.deserialize_seq(Sides(self.0.dimensions))
    }
}

/// Reads the metadata: texts by name, or nothing, as some writers have it.
struct TextsOf<'a>(&'a FileLimits);

impl<'de> DeserializeSeed<'de> for TextsOf<'_> {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        struct Entries<'a>(&'a FileLimits);

        impl<'de> Visitor<'de> for Entries<'_> {
            type Value = BTreeMap<String, String>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "`__metadata__` of at most {} texts", self.0.metadata)
            }

            fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
                Ok(BTreeMap::new())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let most = self.0.metadata;
                let mut texts = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if texts.len() == most {
                        return Err(A::Error::invalid_length(most.saturating_add(1), &self));
                    }
                    let text = map.next_value().map_err(|error| {
                        let shown: String = key.chars().take(120).collect();
                        A::Error::custom(format!("metadata `{}`: {error}", shown.escape_debug()))
                    })?;
                    insert(&mut texts, key, text)?;
                }
                Ok(texts)
            }
        }

        deserializer.deserialize_any(Entries(self.0))
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    fn parse(json: &str) -> Result<Header, String> {
        Header::parse(json.as_bytes(), &FileLimits::default())
    }

    fn error(json: &str) -> String {
        parse(json).unwrap_err()
    }

    #[test]
    fn what_the_crate_reads_is_read_the_same() {
        let json = r#"{"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},
            "a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"e":{"dtype":"F4","shape":[0,2],"data_offsets":[14,14]},
            "__metadata__":{"format":"pt","x":""}}"#;
        let header = parse(json).unwrap();
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
    fn metadata_of_null_is_none_as_the_crate_has_it() {
        let json = r#"{"__metadata__":null,"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;
        let header = parse(json).unwrap();
        assert!(header.metadata.is_empty());
        let file = [
            &(json.len() as u64).to_le_bytes()[..],
            json.as_bytes(),
            &[0; 4],
        ]
        .concat();
        assert!(
            SafeTensors::read_metadata(&file)
                .unwrap()
                .1
                .metadata()
                .is_none()
        );
        assert!(error(r#"{"__metadata__":null,"__metadata__":null}"#).contains("stands twice"));
        assert!(error(r#"{"__metadata__":3}"#).contains("`__metadata__` of at most"));
    }

    #[test]
    fn of_a_repeated_name_the_last_entry_counts_where_that_is_allowed() {
        let entry =
            |shape: &str| format!(r#""a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}"#);
        let json = format!("{{{},{}}}", entry("[1]"), entry("[1,1]"));
        let limits = FileLimits::new().with_repeated_names(true);
        let header = Header::parse(json.as_bytes(), &limits).unwrap();
        assert_eq!(header.tensors["a"].shape, [1, 1]);
        assert!(error(&json).contains("the key `a` stands twice"));
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
        assert!(parse(&format!(r#"{{"q":{}}}"#, tensor(&sides(16)))).is_ok());
        assert!(error(&format!(r#"{{"q":{}}}"#, tensor(&sides(17)))).contains("tensor `q`"));
        let name = "x".repeat(4097);
        assert!(error(&format!(r#"{{"{name}":{}}}"#, tensor("0"))).contains("4097 bytes"));
        let texts = |n: usize| -> String {
            let texts: Vec<_> = (0..n).map(|i| format!(r#""{i}":"""#)).collect();
            format!(r#"{{"__metadata__":{{{}}}}}"#, texts.join(","))
        };
        assert!(parse(&texts(4096)).is_ok());
        let unlimited = FileLimits::unlimited();
        assert!(Header::parse(texts(4097).as_bytes(), &unlimited).is_ok());
        let many = format!(r#"{{"{name}":{}}}"#, tensor(&sides(17)));
        assert!(Header::parse(many.as_bytes(), &unlimited).is_ok());
        assert!(error(&texts(4097)).contains("at most 4096 texts"));
    }
}
