//! How a model's tensors are divided among files, and what stands in the files before the values and in their index.
//!
//! In the order of their names, numbers in them by value, tensors fill one file after the other: the next one begins with
//! the tensor that would make the file larger than the limit. A tensor that is larger alone has a file alone. Within a file
//! they lie by element type, the widest first, then by name, as the `safetensors` crate writes them.
//!
//! Source: `split_torch_state_dict_into_shards` of huggingface_hub, and transformers 5.24's `dot_natural_key`.

use std::collections::HashMap;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value, json};

use super::python_json;
use super::{BASE_FILE, BASE_INDEX_FILE};
use crate::format::{
    FileLimits, MAX_HEADER_BYTES, MAX_INDEX_BYTES, MAX_INDEX_TENSORS, MAX_SHARDS, MAX_TENSORS,
};
use crate::{PeftError, Result};

/// A tensor that is to be written.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Entry {
    /// Bytes of its values; elements of less than a byte are not written here.
    pub fn num_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * (self.dtype.bitsize() / 8)
    }
}

/// One of the files of a model.
pub(super) struct Shard {
    pub file: String,
    /// Its tensors, as they lie in it.
    pub entries: Vec<Entry>,
}

/// Divides tensors of different names among files of at most `max_bytes` of values, if no tensor has more alone.
pub(super) fn split(mut entries: Vec<Entry>, max_bytes: u64) -> Vec<Shard> {
    entries.sort_by_cached_key(|entry| (natural_key(&entry.name), entry.name.clone()));
    let mut files: Vec<Vec<Entry>> = Vec::new();
    let (mut current, mut size) = (Vec::new(), 0);
    for entry in entries {
        let bytes = entry.num_bytes() as u64;
        if bytes > max_bytes {
            files.push(vec![entry]);
            continue;
        }
        if size + bytes > max_bytes {
            files.push(std::mem::take(&mut current));
            size = 0;
        }
        size += bytes;
        current.push(entry);
    }
    if !current.is_empty() {
        files.push(current);
    }
    let count = files.len();
    let shards = files.into_iter().enumerate().map(|(index, mut entries)| {
        entries.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
        let file = match count {
            1 => BASE_FILE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        Shard { file, entries }
    });
    shards.collect()
}

/// Checks that what is to be written into `dir` is within the limits of what is read.
///
/// # Errors
///
/// [`PeftError::Malformed`] with the directory, or with the file that has more tensors than are read.
pub(super) fn check_limits(dir: &Path, shards: &[Shard]) -> Result<()> {
    let malformed = |path, reason| Err(PeftError::Malformed { path, reason });
    let tensors: usize = shards.iter().map(|shard| shard.entries.len()).sum();
    if tensors == 0 {
        return malformed(dir.to_owned(), "a model without parameters".to_owned());
    }
    if shards.len() > MAX_SHARDS {
        let reason = format!(
            "{} files: at most {MAX_SHARDS} are read; larger files are fewer",
            shards.len()
        );
        return malformed(dir.to_owned(), reason);
    }
    for shard in shards {
        let found = shard.entries.len();
        if found > MAX_TENSORS {
            let reason = format!(
                "{found} tensors: at most {MAX_TENSORS} are read; smaller files have fewer"
            );
            return malformed(dir.join(&shard.file), reason);
        }
    }
    if tensors > MAX_INDEX_TENSORS {
        let reason = format!("{tensors} tensors: at most {MAX_INDEX_TENSORS} are read");
        return malformed(dir.to_owned(), reason);
    }
    let limits = FileLimits::default();
    for shard in shards {
        for entry in &shard.entries {
            let (name, axes) = (entry.name.len(), entry.shape.len());
            if name > limits.name_bytes {
                let most = limits.name_bytes;
                let reason = format!("a name of {name} bytes: at most {most} are read");
                return malformed(dir.join(&shard.file), reason);
            }
            if axes > limits.dimensions {
                let most = limits.dimensions;
                let reason = format!(
                    "tensor `{}` has {axes} axes: at most {most} are read",
                    entry.name.escape_debug()
                );
                return malformed(dir.join(&shard.file), reason);
            }
        }
    }
    Ok(())
}

/// Checks that an index of so many bytes, which is to be written into `dir`, is read.
///
/// # Errors
///
/// [`PeftError::Malformed`].
pub(super) fn check_index(dir: &Path, bytes: usize) -> Result<()> {
    match bytes as u64 > MAX_INDEX_BYTES {
        false => Ok(()),
        true => Err(PeftError::Malformed {
            path: dir.join(BASE_INDEX_FILE),
            reason: format!(
                "{bytes} bytes: at most {MAX_INDEX_BYTES} are read; one file has no index"
            ),
        }),
    }
}

/// Whether a file of this name is one of a model, which must not be beside the files of another.
pub(super) fn is_of_model(file: &str) -> bool {
    let number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let numbers = file.strip_prefix("model-");
    let numbers = numbers.and_then(|file| file.strip_suffix(".safetensors"));
    let numbers = numbers.and_then(|numbers| numbers.split_once("-of-"));
    file == BASE_FILE
        || file == BASE_INDEX_FILE
        || numbers.is_some_and(|(index, count)| number(index) && number(count))
}

impl Shard {
    /// What stands before the values: the length of the header, and the header.
    ///
    /// # Errors
    ///
    /// [`PeftError::Malformed`] with the file for a larger header than is read.
    pub fn header(&self) -> Result<Vec<u8>> {
        let malformed = |reason: String| PeftError::Malformed {
            path: self.file.clone().into(),
            reason,
        };
        let mut end = 0;
        let infos = self.entries.iter().map(|entry| {
            let begin = end;
            end += entry.num_bytes();
            let info = TensorInfo {
                dtype: entry.dtype,
                shape: entry.shape.clone(),
                data_offsets: (begin, end),
            };
            (entry.name.clone(), info)
        });
        // transformers refuses files without this entry.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let header = Metadata::new(Some(metadata), infos.collect())
            .map_err(|error| malformed(error.to_string()))?;
        let mut header = serde_json::to_vec(&header).map_err(PeftError::json)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        if header.len() as u64 > MAX_HEADER_BYTES {
            return Err(malformed(format!(
                "a header of {} bytes: at most {MAX_HEADER_BYTES} are read; smaller files have smaller ones",
                header.len()
            )));
        }
        let length = (header.len() as u64).to_le_bytes();
        Ok([&length[..], &header].concat())
    }
}

/// The text of the index of several files, to the byte as transformers writes it.
pub(super) fn index(shards: &[Shard], total_parameters: usize) -> String {
    let mut total_size = 0;
    let mut weight_map = Map::new();
    for shard in shards {
        for entry in &shard.entries {
            total_size += entry.num_bytes();
            weight_map.insert(entry.name.clone(), Value::from(shard.file.as_str()));
        }
    }
    let metadata = json!({"total_parameters": total_parameters, "total_size": total_size});
    python_json::indented(&json!({"metadata": metadata, "weight_map": weight_map}))
}

/// A segment of a name, numbers before texts, and numbers behind a text by their value.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Segment {
    Number(Digits),
    Text(String, Option<Digits>),
}

/// A number of any length: how many digits it has without leading zeros, and those.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Digits(usize, String);

impl Digits {
    fn new(digits: &str) -> Self {
        let digits = digits.trim_start_matches('0');
        Self(digits.len(), digits.to_owned())
    }
}

fn natural_key(name: &str) -> Vec<Segment> {
    let segments = name.split('.').map(|segment| {
        let text = segment.trim_end_matches(|c: char| c.is_ascii_digit());
        let digits = &segment[text.len()..];
        match (text, digits) {
            ("", "") => Segment::Text(String::new(), None),
            ("", digits) => Segment::Number(Digits::new(digits)),
            (text, "") => Segment::Text(text.to_owned(), None),
            (text, digits) => Segment::Text(text.to_owned(), Some(Digits::new(digits))),
        }
    });
    segments.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, dtype: Dtype, n: usize) -> Entry {
        Entry {
            name: name.to_owned(),
            dtype,
            shape: vec![n],
        }
    }

    fn names(shards: &[Shard]) -> Vec<Vec<&str>> {
        shards
            .iter()
            .map(|shard| {
                shard
                    .entries
                    .iter()
                    .map(|entry| entry.name.as_str())
                    .collect()
            })
            .collect()
    }

    #[test]
    fn files_are_filled_in_the_order_of_names_and_of_numbers_in_them() {
        let entries = ["l.10.w", "l.9.w", "l.9.w.a", "head", "l.x2", "l.x10"];
        let entries = entries.map(|name| entry(name, Dtype::U8, 4));
        let shards = split(entries.to_vec(), 8);
        assert_eq!(
            names(&shards),
            [["head", "l.9.w"], ["l.9.w.a", "l.10.w"], ["l.x2", "l.x10"]].map(|file| {
                let mut file = file.to_vec();
                file.sort();
                file
            })
        );
        let files: Vec<_> = shards.iter().map(|shard| shard.file.as_str()).collect();
        assert_eq!(
            files,
            [1, 2, 3].map(|index| format!("model-0000{index}-of-00003.safetensors"))
        );
        assert!(files.iter().all(|file| is_of_model(file)));
    }

    #[test]
    fn a_tensor_larger_than_the_limit_is_alone_and_splits_nothing() {
        let entries = [("a", 2), ("b", 9), ("c", 3), ("d", 4)];
        let entries = entries.map(|(name, n)| entry(name, Dtype::U8, n)).to_vec();
        assert_eq!(
            names(&split(entries.clone(), 5)),
            [vec!["b"], vec!["a", "c"], vec!["d"]]
        );
        let one = split(entries, 18);
        assert_eq!(one.len(), 1);
        assert_eq!(one[0].file, BASE_FILE);
    }

    #[test]
    fn a_file_is_to_the_byte_what_the_crate_writes() {
        use safetensors::tensor::TensorView;

        let entries = vec![
            entry("b", Dtype::F32, 3),
            entry("a", Dtype::U8, 5),
            entry("c", Dtype::BF16, 1),
            entry("\"é", Dtype::F32, 2),
        ];
        let shards = split(entries, 100);
        let values: Vec<Vec<u8>> = shards[0]
            .entries
            .iter()
            .map(|entry| vec![7; entry.num_bytes()])
            .collect();
        let views = shards[0]
            .entries
            .iter()
            .zip(&values)
            .map(|(entry, values)| {
                let view = TensorView::new(entry.dtype, entry.shape.clone(), values).unwrap();
                (entry.name.clone(), view)
            });
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let expected = safetensors::serialize(views.rev(), Some(metadata)).unwrap();
        let found = [shards[0].header().unwrap(), values.concat()].concat();
        assert_eq!(found, expected);
    }

    #[test]
    fn no_more_is_written_than_is_read() {
        let dir = Path::new("dir");
        let shard = |count: usize| Shard {
            file: BASE_FILE.to_owned(),
            entries: (0..count)
                .map(|i| entry(&i.to_string(), Dtype::U8, 1))
                .collect(),
        };
        let shards = |counts: &[usize]| counts.iter().map(|&n| shard(n)).collect::<Vec<_>>();
        for good in [
            shards(&[MAX_TENSORS]),
            shards(&[1; MAX_SHARDS]),
            shards(&[MAX_TENSORS; MAX_INDEX_TENSORS / MAX_TENSORS]),
        ] {
            check_limits(dir, &good).unwrap();
        }
        let mut many = vec![MAX_TENSORS; MAX_INDEX_TENSORS / MAX_TENSORS];
        many.push(1);
        for (bad, expected) in [
            (shards(&[]), "without parameters"),
            (shards(&[1, MAX_TENSORS + 1]), "500001 tensors"),
            (shards(&[1; MAX_SHARDS + 1]), "513 files"),
            (shards(&many), "1000001 tensors"),
        ] {
            let error = check_limits(dir, &bad).unwrap_err();
            assert!(matches!(error, PeftError::Malformed { .. }), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn a_header_or_an_index_above_its_limit_is_not_written() {
        let padding = "x".repeat(4000);
        let entries = (0..25_000).map(|i| entry(&format!("{padding}{i}"), Dtype::U8, 1));
        let shard = Shard {
            file: BASE_FILE.to_owned(),
            entries: entries.collect(),
        };
        let error = shard.header().unwrap_err().to_string();
        assert!(error.contains("a header of 10"), "{error}");
        let dir = Path::new("dir");
        check_index(dir, MAX_INDEX_BYTES as usize).unwrap();
        let error = check_index(dir, MAX_INDEX_BYTES as usize + 1).unwrap_err();
        assert!(error.to_string().contains("134217729 bytes"), "{error}");
        for (entry, expected) in [
            (
                entry(&"x".repeat(4097), Dtype::U8, 1),
                "a name of 4097 bytes",
            ),
            (
                Entry {
                    shape: vec![1; 17],
                    ..entry("a", Dtype::U8, 1)
                },
                "tensor `a` has 17 axes",
            ),
        ] {
            let shard = Shard {
                file: BASE_FILE.to_owned(),
                entries: vec![entry],
            };
            let error = check_limits(dir, &[shard]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn only_names_that_transformers_gives_are_a_model_s() {
        for file in [
            BASE_FILE,
            BASE_INDEX_FILE,
            "model-00012-of-00345.safetensors",
        ] {
            assert!(is_of_model(file), "{file}");
        }
        for file in [
            "adapter_model.safetensors",
            "model-1-of-2.safetensors",
            "model-00001-of-00002.bin",
            "model-00001-of-00002.safetensors~",
            "config.json",
        ] {
            assert!(!is_of_model(file), "{file}");
        }
    }
}
