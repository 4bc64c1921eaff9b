//! What files of older versions of PEFT mean, where that is not what PEFT 0.21 takes them for.
//!
//! A configuration has `peft_version` since PEFT 0.18. What changed its meaning, and what is done here:
//!
//! | before | what meant something else | here |
//! |---|---|---|
//! | 0.15 | the first key of `rank_pattern`, then `alpha_pattern`, that matched a module gave both its rank and its alpha, and a key matched behind a dot only | [`OldPatterns`](crate::model::OldPatterns) |
//! | 0.19 | `ensure_weight_tying` tied `modules_to_save` alone: LoRA on the embedding left the head as it was | the head keeps the base where the file has no factors of it |
//! | 0.19.1 | `target_parameters`: which axis of `[E, d1, d2]` the factor `A` sees | told by the shapes, else by the version |
//! | 0.20 | `layers_to_transform`: of two indices in a path the last counted | a module with two is not missed |
//!
//! Ranks, keys of DoRA's magnitudes and of biases, factors of embeddings and convolutions, and rsLoRA are told by the tensors and
//! keys themselves. Read in the sources of PEFT 0.3, 0.5 to 0.21.

use std::fmt;

use crate::{PeftError, Result};

/// A version of PEFT: major, minor, patch. What follows in a development version is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// The version in a text such as `0.21.2` or `0.18.2.dev0@1234abcd`; `None` for another text.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.trim().split('.');
        let mut number = || -> Option<u32> {
            let part = parts.next()?;
            let digits = part.len() - part.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            part[..digits].parse().ok()
        };
        let (major, minor) = (number()?, number()?);
        Some(Self(major, minor, number().unwrap_or(0)))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self(major, minor, patch) = self;
        write!(f, "{major}.{minor}.{patch}")
    }
}

/// Checks the version that an option says.
///
/// # Errors
///
/// [`PeftError::Config`].
pub(super) fn check(option: &str, text: &str) -> Result<()> {
    match Version::parse(text) {
        Some(_) => Ok(()),
        None => Err(PeftError::config(option, text, "a version such as 0.17.1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared() {
        for (text, expected) in [
            ("0.21.2", Some(Version(0, 21, 2))),
            ("0.18", Some(Version(0, 18, 0))),
            ("0.18.2.dev0@1234abcd", Some(Version(0, 18, 2))),
            ("0.19.1rc1", Some(Version(0, 19, 1))),
            ("1.0.0", Some(Version(1, 0, 0))),
            ("", None),
            ("main", None),
            ("0", None),
            ("0.x", None),
        ] {
            assert_eq!(Version::parse(text), expected, "{text}");
        }
        assert!(Version(0, 9, 0) < Version(0, 19, 1) && Version(0, 19, 1) < Version(1, 0, 0));
    }
}
