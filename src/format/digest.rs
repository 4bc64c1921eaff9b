//! An optional digest of an adapter's two files, by which any damage to either is known.
//!
//! ```text
//! h = SHA-256(TAG | n | configuration | weights with 64 zeros in the digest's place)
//! ```
//!
//! where `TAG` is `burn-peft adapter` and a zero byte, `n` the length of `adapter_config.json` in bytes, as a
//! little-endian 64-bit number, and the rest are the bytes of the two files. It stands in the metadata of the tensors'
//! file, `"burn_peft.digest": "burn_peft:sha256:"` and 64 lower-case hexadecimal digits, which other readers pass over.
//!
//! It is a digest of bytes, not of what they mean: so that no byte is left out, it also knows a file that another program
//! wrote anew with the same tensors. And it ties the configuration to its tensors, which nothing else does where a
//! crash, or a copy by hand, brings together two files of the same shapes. It is no proof against malice: who changes
//! a file can change its digest.

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::{PeftError, Result};

/// What is done with a digest on reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DigestCheck {
    /// A digest that is there must be right. PEFT writes none, so none has to be there.
    #[default]
    IfPresent,
    /// A right digest must be there.
    Require,
    /// It is not looked at, as by other readers.
    Ignore,
}

const TAG: &[u8] = b"burn-peft adapter\0";
/// The key in the metadata.
const KEY: &str = "burn_peft.digest";
/// What the value begins with. Under another key it tells that the key was damaged.
const SCHEME: &str = "burn_peft:sha256:";
/// How many hexadecimal digits the digest has.
const DIGITS: usize = 64;
/// What stands for the digits while they are computed.
const ZEROS: [u8; DIGITS] = [b'0'; DIGITS];
/// How much of a file is in memory at a time.
const BUFFER: usize = 256 << 10;

/// The metadata of a file of tensors, PEFT's own and, if asked for, room for the digest that [`seal`] fills in.
pub(super) fn metadata(digest: bool) -> HashMap<String, String> {
    let mut metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    if digest {
        let zeros = "0".repeat(DIGITS);
        metadata.insert(KEY.to_owned(), format!("{SCHEME}{zeros}"));
    }
    metadata
}

/// Fills in the digest of a file that was serialised with [`metadata`], the first entry of its header.
pub(super) fn seal(weights: &mut [u8], config: &[u8]) {
    let zeros = "0".repeat(DIGITS);
    let (format, digest) = (r#""format":"pt""#, format!(r#""{KEY}":"{SCHEME}{zeros}""#));
    let begin =
        |entries: [&str; 2]| format!(r#"{{"__metadata__":{{{},{}}}"#, entries[0], entries[1]);
    let (begin, swapped) = (begin([format, &digest]), begin([&digest, format]));
    // The serialiser has the entries in an order that changes from call to call.
    let place = &mut weights[8..8 + begin.len()];
    assert!(place == begin.as_bytes() || place == swapped.as_bytes());
    place.copy_from_slice(begin.as_bytes());
    let at = 8 + begin.len() - r#""}"#.len() - DIGITS;
    let mut hash = start(config);
    hash.update(&*weights);
    weights[at..at + DIGITS].copy_from_slice(hex(hash).as_bytes());
}

fn start(config: &[u8]) -> Sha256 {
    let mut hash = Sha256::new();
    hash.update(TAG);
    hash.update((config.len() as u64).to_le_bytes());
    hash.update(config);
    hash
}

fn hex(hash: Sha256) -> String {
    let bytes = hash.finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The digest that a file says it has.
#[derive(Debug)]
pub(super) enum Digest {
    Absent,
    Present {
        digits: String,
        /// Where the digits stand in the file.
        at: u64,
    },
    /// There is something of one: what.
    Damaged(String),
}

impl Digest {
    /// Looks for a digest in a header, given as text and by its entries.
    pub(super) fn find(header: &[u8], metadata: &BTreeMap<String, String>) -> Self {
        let Some(value) = metadata.get(KEY) else {
            let mut others = metadata.iter();
            return match others.find(|(_, value)| value.starts_with(SCHEME)) {
                None => Self::Absent,
                Some((key, _)) => {
                    let shown: String = key.chars().take(DIGITS).collect();
                    Self::Damaged(format!("one under the key `{}`", shown.escape_debug()))
                }
            };
        };
        let entry = format!(r#""{KEY}":"{value}""#);
        let place = header
            .windows(entry.len())
            .position(|window| window == entry.as_bytes());
        match (value.strip_prefix(SCHEME), place) {
            (Some(digits), Some(place)) if digits.len() == DIGITS => Self::Present {
                digits: digits.to_owned(),
                at: (8 + place + entry.len() - 1 - DIGITS) as u64,
            },
            _ => {
                let shown: String = value.chars().take(SCHEME.len() + DIGITS).collect();
                Self::Damaged(format!("`{}`", shown.escape_debug()))
            }
        }
    }

    /// Compares this digest with that of the configuration's bytes and of the open file of tensors at `path`.
    pub(super) fn check(
        &self,
        path: &Path,
        weights: &mut (impl Read + Seek),
        config: &[u8],
        check: DigestCheck,
    ) -> Result<()> {
        let (expected, found) = match self {
            _ if check == DigestCheck::Ignore => return Ok(()),
            Self::Absent if check == DigestCheck::IfPresent => return Ok(()),
            Self::Absent => ("a digest in its metadata", "none".to_owned()),
            Self::Damaged(found) => ("a whole digest in its metadata", found.clone()),
            Self::Present { digits, at } => {
                let found = of_files(weights, *at, config).map_err(PeftError::io(path))?;
                if found == *digits {
                    return Ok(());
                }
                (digits.as_str(), found)
            }
        };
        Err(PeftError::Digest {
            path: path.to_owned(),
            expected: expected.to_owned(),
            found,
        })
    }
}

/// The digest of a configuration and a file whose own digits stand at `at`.
fn of_files(weights: &mut (impl Read + Seek), at: u64, config: &[u8]) -> std::io::Result<String> {
    let mut hash = start(config);
    let mut buffer = vec![0; BUFFER];
    weights.seek(SeekFrom::Start(0))?;
    let mut before = weights.by_ref().take(at);
    update(&mut hash, &mut before, &mut buffer)?;
    hash.update(ZEROS);
    weights.seek(SeekFrom::Start(at + DIGITS as u64))?;
    update(&mut hash, weights, &mut buffer)?;
    Ok(hex(hash))
}

fn update(hash: &mut Sha256, bytes: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<()> {
    loop {
        match bytes.read(buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => hash.update(&buffer[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::*;
    use crate::format::header::Header;
    use crate::format::limits::FileLimits;

    const CONFIG: &[u8] = b"{}";

    fn sealed(values: &[u8]) -> Vec<u8> {
        let tensor = TensorView::new(Dtype::U8, vec![values.len()], values).unwrap();
        let mut bytes = safetensors::serialize([("x", tensor)], Some(metadata(true))).unwrap();
        seal(&mut bytes, CONFIG);
        bytes
    }

    fn digest(file: &[u8]) -> Digest {
        let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header = &file[8..8 + n];
        Digest::find(
            header,
            &Header::parse(header, &FileLimits::default())
                .unwrap()
                .metadata,
        )
    }

    fn check(file: &[u8], config: &[u8], check: DigestCheck) -> Result<()> {
        digest(file).check(Path::new("w"), &mut Cursor::new(file), config, check)
    }

    /// Computed by another program: `hashlib.sha256(tag + len(config).to_bytes(8, "little") + config + weights)`.
    #[test]
    fn the_digest_is_that_of_the_module_s_equation() {
        let bytes = sealed(&[1, 2, 3]);
        let Digest::Present { digits, at } = digest(&bytes) else {
            panic!("there is none")
        };
        assert_eq!(
            digits,
            "9be090a76a20ffe189a23b26f368052e26f0757a6cb1cd85e26eae97e20231e7"
        );
        assert_eq!(&bytes[at as usize..][..DIGITS], digits.as_bytes());
    }

    /// Also where a file is larger than the buffer, and whatever order the serialiser happens to choose.
    #[test]
    fn a_sealed_file_is_whole_and_always_the_same() {
        let values = vec![7; 3 * BUFFER + 5];
        let expected = sealed(&values);
        for _ in 0..20 {
            assert!(sealed(&values) == expected);
        }
        check(&expected, CONFIG, DigestCheck::Require).unwrap();
        let error = check(&expected, b"{ }", DigestCheck::IfPresent).unwrap_err();
        assert!(matches!(error, PeftError::Digest { .. }), "{error}");
        check(&expected, b"{ }", DigestCheck::Ignore).unwrap();
        let mut last = expected;
        *last.last_mut().unwrap() ^= 1;
        assert!(check(&last, CONFIG, DigestCheck::IfPresent).is_err());
    }

    #[test]
    fn a_file_without_one_is_read_unless_one_is_required() {
        let tensor = TensorView::new(Dtype::U8, vec![1], &[1]).unwrap();
        let bytes = safetensors::serialize([("x", tensor)], Some(metadata(false))).unwrap();
        check(&bytes, CONFIG, DigestCheck::IfPresent).unwrap();
        let error = check(&bytes, CONFIG, DigestCheck::Require).unwrap_err();
        assert!(error.to_string().contains("none"), "{error}");
    }

    #[test]
    fn a_digest_with_a_damaged_key_or_form_is_not_taken_for_none() {
        let whole = sealed(&[1]);
        let header = str::from_utf8(&whole[8..whole.len() - 1]).unwrap();
        for (from, to) in [
            ("burn_peft.digest", "burn_peft.digesu"),
            ("burn_peft:sha256:", "burn_peft:sha255:"),
            ("\"burn_peft.digest\":\"", "\"burn_peft.digest\" :\""),
        ] {
            assert!(header.contains(from));
            let header = header.replace(from, to);
            let length = (header.len() as u64).to_le_bytes();
            let bytes = [&length, header.as_bytes(), &[1]].concat();
            let error = check(&bytes, CONFIG, DigestCheck::IfPresent).unwrap_err();
            assert!(error.to_string().contains("a whole digest"), "{error}");
        }
    }
}
