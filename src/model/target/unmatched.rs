//! The patterns of a target configuration that match nothing, with what they may have meant.

use std::collections::{BTreeSet, HashSet};
use std::fmt;

use super::nearest::nearest;

/// How many names an [`UnmatchedPattern`] suggests at most.
const SUGGESTIONS: usize = 3;
/// For how many unmatched patterns the nearest names are searched, which takes time.
const MAX_SUGGESTED: usize = 20;

/// A pattern of a target configuration that matched nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnmatchedPattern {
    /// The option it stands in, for instance `target_modules`.
    pub option: &'static str,
    /// The pattern as it was written.
    pub pattern: String,
    /// Names it may have meant, nearest first, at most three.
    pub nearest: Vec<String>,
}

impl fmt::Display for UnmatchedPattern {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} `{}` matches nothing", self.option, self.pattern)?;
        for (i, name) in self.nearest.iter().enumerate() {
            f.write_str(if i == 0 { " (nearest: `" } else { "`, `" })?;
            f.write_str(name)?;
        }
        f.write_str(if self.nearest.is_empty() { "" } else { "`)" })
    }
}

/// A name in `option` that means none of the modules at `paths`.
pub(crate) fn unmatched<'a>(
    option: &'static str,
    name: &str,
    paths: impl IntoIterator<Item = &'a str>,
) -> UnmatchedPattern {
    UnmatchedPattern {
        option,
        pattern: name.to_owned(),
        nearest: nearest(name, paths, SUGGESTIONS),
    }
}

/// Collects the patterns without effect.
#[derive(Default)]
pub(super) struct Unused {
    pub(super) patterns: Vec<UnmatchedPattern>,
}

impl Unused {
    /// Adds those of `patterns` whose positions are not in `used`, with the names of `known` nearest to them.
    pub(super) fn add<'a, I: Iterator<Item = &'a str>>(
        &mut self,
        option: &'static str,
        patterns: impl IntoIterator<Item = impl AsRef<str>>,
        used: &HashSet<usize>,
        known: impl Fn() -> I,
    ) {
        for (i, pattern) in patterns.into_iter().enumerate() {
            if !used.contains(&i) {
                let pattern = pattern.as_ref().to_owned();
                let nearest = match self.patterns.len() < MAX_SUGGESTED {
                    true => nearest(&pattern, known(), SUGGESTIONS),
                    false => Vec::new(),
                };
                self.patterns.push(UnmatchedPattern {
                    option,
                    pattern,
                    nearest,
                });
            }
        }
    }

    /// Adds those of `layers` that are not in `used`, with the layers nearest to them.
    pub(super) fn add_layers(&mut self, layers: &[usize], used: &BTreeSet<usize>) {
        for layer in layers.iter().filter(|layer| !used.contains(layer)) {
            let mut nearest: Vec<_> = used.iter().copied().collect();
            nearest.sort_by_key(|known| known.abs_diff(*layer));
            self.patterns.push(UnmatchedPattern {
                option: "layers_to_transform",
                pattern: layer.to_string(),
                nearest: nearest
                    .iter()
                    .take(SUGGESTIONS)
                    .map(usize::to_string)
                    .collect(),
            });
        }
    }
}
