//! A list of module names, which match by equality or as the last segments of a path: `q_proj` is no `xq_proj`.

use std::collections::HashMap;

/// Names that match a path by equality or as its last segments, in the order given, each once.
#[derive(Clone, Debug)]
pub(super) struct NameList {
    pub(super) names: Vec<String>,
    index: HashMap<String, usize>,
}

impl NameList {
    pub(super) fn new(names: &[String]) -> Self {
        let mut list = Self {
            names: Vec::with_capacity(names.len()),
            index: HashMap::with_capacity(names.len()),
        };
        for name in names {
            let next = list.names.len();
            if *list.index.entry(name.clone()).or_insert(next) == next {
                list.names.push(name.clone());
            }
        }
        list
    }

    /// Whether a name equals the whole path.
    pub(super) fn contains(&self, path: &str) -> bool {
        self.index.contains_key(path)
    }

    /// The positions of the names that match `path`, the longest name first.
    ///
    /// A name matches when it is what remains of the path after one of its dots: one look-up per segment, however
    /// many names there are.
    pub(super) fn matches(&self, path: &str) -> impl Iterator<Item = usize> {
        let after_dots = path.match_indices('.').map(|(dot, _)| &path[dot + 1..]);
        std::iter::once(path)
            .chain(after_dots)
            .filter_map(|suffix| self.index.get(suffix).copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_name_does_not_hide_a_shorter_one() {
        let names = NameList::new(&["q".into(), "attn.q".into(), "k".into()]);
        assert_eq!(names.matches("0.attn.q").collect::<Vec<_>>(), [1, 0]);
        assert_eq!(names.matches("q").collect::<Vec<_>>(), [0]);
        assert_eq!(names.matches("xq").count(), 0);
    }
}
