//! What became of every tensor of an adapter on loading: loaded, missing, unexpected, mismatched.

use std::fmt;

use super::summary::{Kind, MOST_LISTED, write_names};
use crate::{PeftError, Result};

/// A tensor whose shape is not the one its place demands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The tensor's key in the file.
    pub tensor: String,
    /// The shape expected, in PyTorch's order.
    pub expected: Vec<usize>,
    /// The shape found.
    pub found: Vec<usize>,
}

/// The fate of every tensor. Names are keys of the file, sorted.
///
/// When printed, long lists are counted and shown as patterns, and control characters in names are escaped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Tensors that were read and put in their place.
    pub loaded: Vec<String>,
    /// Tensors that should be in the file and are not.
    pub missing: Vec<String>,
    /// Tensors of the file that have no place.
    pub unexpected: Vec<String>,
    /// Tensors that have a place of another shape.
    pub mismatched: Vec<Mismatch>,
    /// Whether the adapter is active, once it is on a model.
    pub active: Option<bool>,
    /// Whether it trains while it is active, once it is on a model; a frozen adapter is only used.
    pub trainable: Option<bool>,
}

impl LoadReport {
    /// Whether nothing is missing, unexpected or mismatched, and something was loaded: an adapter that lands nowhere
    /// would otherwise pass for a good one.
    pub fn is_complete(&self) -> bool {
        let Self {
            loaded,
            missing,
            unexpected,
            mismatched,
            ..
        } = self;
        !loaded.is_empty() && missing.is_empty() && unexpected.is_empty() && mismatched.is_empty()
    }

    /// The report itself if it is complete.
    ///
    /// # Errors
    ///
    /// [`PeftError::Incomplete`] with this report.
    pub fn strict(self) -> Result<Self> {
        if self.is_complete() {
            Ok(self)
        } else {
            Err(PeftError::Incomplete {
                report: Box::new(self),
            })
        }
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} tensors loaded", self.loaded.len())?;
        let mismatched = self.mismatched.iter().map(|mismatch| &mismatch.tensor);
        let fitting = self.loaded.iter().chain(mismatched);
        let fitting = || fitting.clone().map(String::as_str);
        write_names(f, Kind::Missing, "missing", &self.missing, fitting())?;
        write_names(
            f,
            Kind::Unexpected,
            "unexpected",
            &self.unexpected,
            fitting(),
        )?;
        list(
            f,
            "mismatched",
            &self.mismatched,
            |f,
             Mismatch {
                 tensor,
                 expected,
                 found,
             }| {
                write!(
                    f,
                    "`{}` (expected shape {expected:?}, found {found:?})",
                    tensor.escape_debug()
                )
            },
        )?;
        f.write_str(match self.trainable {
            None => "",
            Some(true) => "; trainable",
            Some(false) => "; frozen (`LoadOptions::trainable` lets it train)",
        })?;
        f.write_str(match self.active {
            None => "",
            Some(true) => "; active",
            Some(false) => "; not active (`set_adapter` chooses it)",
        })
    }
}

/// Writes how many items there are of a kind, and the first of them; nothing where there is none.
pub(super) fn list<T>(
    f: &mut fmt::Formatter,
    kind: &str,
    items: &[T],
    show: impl Fn(&mut fmt::Formatter, &T) -> fmt::Result,
) -> fmt::Result {
    if items.is_empty() {
        return Ok(());
    }
    write!(f, "; {} {kind}: ", items.len())?;
    for (i, item) in items.iter().take(MOST_LISTED).enumerate() {
        if i > 0 {
            f.write_str(", ")?;
        }
        show(f, item)?;
    }
    match items.len().saturating_sub(MOST_LISTED) {
        0 => Ok(()),
        more => write!(f, " and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_complete_only_if_something_was_loaded_and_nothing_else_happened() {
        assert!(LoadReport::default().strict().is_err());
        let good = LoadReport {
            loaded: vec!["a".into()],
            ..Default::default()
        };
        assert_eq!(good.clone().strict().unwrap(), good);
        assert!(
            !LoadReport {
                missing: vec!["b".into()],
                ..good.clone()
            }
            .is_complete()
        );
        assert!(
            !LoadReport {
                unexpected: vec!["b".into()],
                ..good.clone()
            }
            .is_complete()
        );
        let mismatched = vec![Mismatch {
            tensor: "b".into(),
            expected: vec![1],
            found: vec![2],
        }];
        assert!(!LoadReport { mismatched, ..good }.is_complete());
    }

    #[test]
    fn the_error_lists_every_kind() {
        let report = LoadReport {
            loaded: vec!["a".into()],
            missing: vec!["b".into()],
            unexpected: (0..23).map(|i| format!("c{i:02}")).collect(),
            mismatched: vec![Mismatch {
                tensor: "d".into(),
                expected: vec![4, 2],
                found: vec![2, 4],
            }],
            ..LoadReport::default()
        };
        let text = report.strict().unwrap_err().to_string();
        for part in [
            "1 tensors loaded; 1 missing: `b`; 23 unexpected: `c00`, ",
            "`c19` and 3 more; 1 mismatched: `d` (expected shape [4, 2], found [2, 4])",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
