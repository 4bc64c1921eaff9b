//! Long lists of module paths as the shortest ends of paths that mean the same modules.
//!
//! PEFT does this with lists of 20 names or more (`_find_minimal_target_modules` in `peft.tuners.tuners_utils`). Without it the
//! configuration of an adapter on tens of thousands of modules would be megabytes of paths, each compared with each.

use std::collections::HashSet;

/// PEFT's `MIN_TARGET_MODULES_FOR_OPTIMIZATION`: shorter lists stay as they are.
const MIN_CONDENSED: usize = 20;

/// Names that match each of `paths`, by equality or as the end of a path after a dot, and none of `others`.
///
/// Where even the whole of a path is the end of another module's path, it stands among the names all the same.
pub(in crate::model) fn condensed<'a>(
    paths: impl Iterator<Item = &'a str> + Clone,
    others: impl Iterator<Item = &'a str>,
) -> Vec<String> {
    if paths.clone().count() < MIN_CONDENSED {
        return paths.map(str::to_owned).collect();
    }
    let others: HashSet<&str> = others.flat_map(ends).collect();
    let mut names: Vec<String> = Vec::new();
    let mut chosen: HashSet<&str> = HashSet::new();
    for path in paths {
        if ends(path).any(|end| chosen.contains(end)) {
            continue;
        }
        // An end that begins with an index would also be that of modules without parameters, which are not known here.
        let is_named = |end: &&str| !end.starts_with(|c: char| c.is_ascii_digit());
        let ends = ends(path).filter(|end| !others.contains(end));
        let shortest = ends.filter(is_named).last().unwrap_or(path);
        chosen.insert(shortest);
        names.push(shortest.to_owned());
    }
    names
}

/// The path, and what is behind each of its dots, longest first.
pub(in crate::model) fn ends(path: &str) -> impl Iterator<Item = &str> {
    let after_dots = path.match_indices('.').map(|(dot, _)| &path[dot + 1..]);
    std::iter::once(path).chain(after_dots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_become_the_shortest_names_that_tell_modules_apart() {
        let paths = |names: &[&str]| -> Vec<String> {
            let of_layer = |layer| {
                names
                    .iter()
                    .map(move |name| format!("layers.{layer}.{name}"))
            };
            (0..12).flat_map(of_layer).collect()
        };
        let targets = paths(&["attn.q", "attn.out.0", "mlp.out"]);
        let others = paths(&["attn.k", "attn", "mlp", "attn.out", "gate.out.1"]);
        let found = |targets: &[String], others: &[String]| {
            let targets = targets.iter().map(String::as_str);
            condensed(targets, others.iter().map(String::as_str))
        };
        assert_eq!(found(&targets, &others), ["q", "out.0", "mlp.out"]);
        // A path that is the end of another module's path.
        let longer = [&targets[..], &["head".into()]].concat();
        let with_other = [&others[..], &["draft.head".into()]].concat();
        assert_eq!(
            found(&longer, &with_other),
            ["q", "out.0", "mlp.out", "head"]
        );
        // Short lists stay.
        assert_eq!(found(&targets[..19], &others), targets[..19]);
    }
}
