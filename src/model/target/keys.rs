//! The keys of `rank_pattern` or `alpha_pattern`, so that a path finds its keys without trying all of them.
//!
//! An adapter may have a key for each of tens of thousands of modules. A plain key that is the end of a path is found by looking up
//! the ends of the path. In a plain key a `.` also matches any other character; keys that could match in that way only are few, and
//! are tried one by one, as are expressions.

use std::collections::HashMap;

use super::pattern::Pattern;
use crate::Result;

/// Keys with their values, in the order of the file.
#[derive(Clone, Debug)]
pub(super) struct Keys<V> {
    entries: Vec<(Pattern, V)>,
    /// Places of plain keys by their literal text.
    literal: HashMap<String, Vec<usize>>,
    /// Plain keys that have dots for any character, by their number of characters: the number of their dots, and the place. Most
    /// dots first.
    wild: HashMap<usize, Vec<(usize, usize)>>,
    /// Places of expressions.
    expressions: Vec<usize>,
}

impl<V> Keys<V> {
    pub fn new(entries: Vec<(Pattern, V)>) -> Self {
        let mut keys = Self {
            entries: Vec::new(),
            literal: HashMap::new(),
            wild: HashMap::new(),
            expressions: Vec::new(),
        };
        for (place, (pattern, _)) in entries.iter().enumerate() {
            let Some(name) = pattern.plain() else {
                keys.expressions.push(place);
                continue;
            };
            let text = name.literal();
            if name.has_any() {
                let of_length = keys.wild.entry(text.chars().count()).or_default();
                of_length.push((text.matches('.').count(), place));
            }
            keys.literal.entry(text).or_default().push(place);
        }
        for of_length in keys.wild.values_mut() {
            of_length.sort_unstable_by(|one, other| other.cmp(one));
        }
        keys.entries = entries;
        keys
    }

    /// The keys as they were written.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|(key, _)| key.text())
    }

    /// The text of the key at a place.
    pub fn text(&self, place: usize) -> &str {
        self.entries[place].0.text()
    }

    /// The value of the first key that matches `path`.
    pub fn first(&self, path: &str) -> Result<Option<&V>> {
        let first = self.matches(path)?.into_iter().next();
        Ok(first.map(|place| &self.entries[place].1))
    }

    /// The places of all keys that match `path`, in order.
    pub fn matches(&self, path: &str) -> Result<Vec<usize>> {
        let mut found = Vec::new();
        if self.entries.is_empty() {
            return Ok(found);
        }
        let mut tried = self.expressions.clone();
        let after_dots = path.match_indices('.').map(|(dot, _)| &path[dot + 1..]);
        for end in std::iter::once(path).chain(after_dots) {
            tried.extend(self.literal.get(end).into_iter().flatten());
            let of_length = self.wild.get(&end.chars().count());
            // A dot of the key that stands for another character is one that the end does not have.
            let dots = end.matches('.').count();
            let more = of_length.into_iter().flatten();
            tried.extend(
                more.take_while(|(own, _)| *own > dots)
                    .map(|(_, place)| place),
            );
        }
        tried.sort_unstable();
        tried.dedup();
        for place in tried {
            if self.entries[place].0.is_match(path)? {
                found.push(place);
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The index finds what trying every key finds.
        #[test]
        fn keys_are_those_that_match(
            keys in prop::collection::vec(r"\^?([ab.]|\\\.|a\|b){0,5}\$?", 0..12),
            paths in prop::collection::vec(r"[ab.\n]{0,7}", 1..4),
        ) {
            let compiled = |key: &String| Pattern::suffix_key("rank_pattern", key).ok();
            let entries: Vec<_> = keys.iter().filter_map(compiled).map(|key| (key, ())).collect();
            let index = Keys::new(entries.clone());
            for path in paths {
                let places = entries.iter().enumerate();
                let expected = places.filter(|(_, (key, ()))| key.is_match(&path).unwrap());
                let expected: Vec<usize> = expected.map(|(place, _)| place).collect();
                prop_assert_eq!(index.matches(&path).unwrap(), expected, "{}", path);
            }
        }
    }
}
