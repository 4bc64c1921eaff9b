//! Long lists of names in few words: how many there are, and patterns that say which.
//!
//! A name is dotted. Numbers in it, as in `model.layers.17.mlp.up_proj.weight`, are what patterns run over:
//! `model.layers.{2..29}.*` stands for everything below those numbers.

use std::collections::BTreeMap;
use std::fmt;

/// Up to this many names are listed one by one.
const LISTED: usize = 8;
/// How many names or patterns of a long list are shown.
pub(super) const MOST_LISTED: usize = 20;

/// What a list of names is about. A pattern over whole layers suggests a cause that depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The model needs them and the file does not have them.
    Missing,
    /// The file has them and the model does not.
    Unexpected,
    /// Anything else.
    Other,
}

/// Writes `; COUNT LABEL: NAMES`, and nothing where there is no name. A short list is written whole, a long one as patterns.
///
/// `others` are names beside those of the list: of a missing name, the names that are there. They tell whether the list has
/// all of a layer, and whether layers are missing at the end.
pub(crate) fn write_names<'a>(
    f: &mut fmt::Formatter,
    kind: Kind,
    label: &str,
    names: &[String],
    others: impl IntoIterator<Item = &'a str>,
) -> fmt::Result {
    if names.is_empty() {
        return Ok(());
    }
    write!(f, "; {} {label}: ", names.len())?;
    if names.len() <= LISTED {
        let shown = names.iter().map(|name| (escaped(name), 1));
        return write_patterns(f, shown.collect());
    }
    let mut tree = Node::default();
    for name in names {
        tree.add(name, true);
    }
    for other in others {
        tree.add(other, false);
    }
    let mut patterns = Vec::new();
    tree.patterns(&mut String::new(), false, &mut patterns);
    write_patterns(f, patterns)?;
    match tree.cut_layers() {
        Some((first, last)) if kind != Kind::Other => {
            let other = match kind {
                Kind::Missing => "smaller",
                _ => "larger",
            };
            let which = if first == last {
                format!("layer {first}")
            } else {
                format!("layers {first} to {last}")
            };
            write!(
                f,
                " (all of {which}: was the file made for a {other} model?)"
            )
        }
        _ => Ok(()),
    }
}

/// Writes patterns, each with how many names it stands for.
fn write_patterns(f: &mut fmt::Formatter, patterns: Vec<(String, usize)>) -> fmt::Result {
    for (place, (pattern, count)) in patterns.iter().take(MOST_LISTED).enumerate() {
        if place > 0 {
            f.write_str(", ")?;
        }
        write!(f, "`{pattern}`")?;
        if *count > 1 && patterns.len() > 1 {
            write!(f, " ({count})")?;
        }
    }
    let more: usize = patterns.iter().skip(MOST_LISTED).map(|(_, n)| n).sum();
    match more {
        0 => Ok(()),
        more => write!(f, " and {more} more"),
    }
}

/// A segment of a name; numbers come in the order of their values.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Segment {
    Number(u64),
    Text(String),
}

impl Segment {
    fn new(text: &str) -> Self {
        match text.parse::<u64>() {
            // A number that is written otherwise, as `007`, is a text.
            Ok(number) if number.to_string() == text => Self::Number(number),
            _ => Self::Text(text.to_owned()),
        }
    }
}

/// The names below a common beginning.
#[derive(Debug, Default)]
struct Node {
    children: BTreeMap<Segment, Node>,
    /// Whether a name of the list ends here.
    listed: bool,
    /// How many names of the list are here or below.
    count: usize,
    /// Whether a name beside the list is here or below.
    others: bool,
}

impl Node {
    fn add(&mut self, name: &str, listed: bool) {
        let mut node = self;
        for segment in name.split('.') {
            node.count += usize::from(listed);
            node.others |= !listed;
            node = node.children.entry(Segment::new(segment)).or_default();
        }
        node.count += usize::from(listed);
        node.others |= !listed;
        node.listed |= listed;
    }

    /// The patterns of the listed names here and below, each after `path`.
    fn patterns(&self, path: &mut String, below_number: bool, out: &mut Vec<(String, usize)>) {
        if self.count == 0 {
            return;
        }
        if below_number && !self.others && self.count > 1 {
            out.push((format!("{path}.*"), self.count));
            return;
        }
        if self.listed {
            out.push((path.clone(), 1));
        }
        for (segment, child) in &self.children {
            if let Segment::Text(text) = segment {
                let length = path.len();
                push(path, &escaped(text));
                child.patterns(path, below_number, out);
                path.truncate(length);
            }
        }
        // Numbers below which the same is listed go together.
        let mut groups: BTreeMap<Vec<(String, usize)>, Vec<u64>> = BTreeMap::new();
        for (segment, child) in &self.children {
            if let Segment::Number(number) = segment
                && child.count > 0
            {
                let mut below = Vec::new();
                child.patterns(&mut String::new(), true, &mut below);
                groups.entry(below).or_default().push(*number);
            }
        }
        let mut groups: Vec<_> = groups.into_iter().collect();
        groups.sort_by_key(|(_, numbers)| numbers[0]);
        for (below, numbers) in groups {
            let range = ranges(&numbers);
            for (pattern, count) in below {
                let mut whole = path.clone();
                push(&mut whole, &range);
                // Patterns from below begin with the dot, or are empty.
                if !pattern.is_empty() && !pattern.starts_with('.') {
                    whole.push('.');
                }
                whole += &pattern;
                out.push((whole, count * numbers.len()));
            }
        }
    }

    /// The first and the last of the layers that are listed whole, where they follow all others: those of a model that has
    /// more of them than another one.
    fn cut_layers(&self) -> Option<(u64, u64)> {
        let mut numbers = self.children.iter().filter_map(|(segment, child)| {
            let Segment::Number(number) = segment else {
                return None;
            };
            Some((*number, child))
        });
        let mut whole: Option<(u64, u64)> = None;
        let mut cut = false;
        for (number, child) in numbers.by_ref() {
            let is_whole = child.count > 1 && !child.others;
            match (is_whole, &mut whole) {
                (true, Some((_, last))) if *last + 1 == number => *last = number,
                (true, None) => {
                    // What precedes the layers must be there.
                    if number == 0 || !cut {
                        return None;
                    }
                    whole = Some((number, number));
                }
                (false, None) => cut = child.others,
                _ => return None,
            }
        }
        if whole.is_some() {
            return whole;
        }
        self.children.values().find_map(Self::cut_layers)
    }
}

/// Appends a segment to a path.
fn push(path: &mut String, segment: &str) {
    if !path.is_empty() {
        path.push('.');
    }
    *path += segment;
}

/// Increasing numbers: `3`, `{0..29}`, `{1,4..6}`.
fn ranges(numbers: &[u64]) -> String {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    const MOST_RUNS: usize = 6;
    let more = runs.len().saturating_sub(MOST_RUNS);
    let mut runs: Vec<String> = runs
        .iter()
        .take(MOST_RUNS)
        .map(|&(first, last)| match last - first {
            0 => first.to_string(),
            _ => format!("{first}..{last}"),
        })
        .collect();
    if more > 0 {
        runs.push("..".to_owned());
    }
    match &runs[..] {
        [only] if !only.contains("..") => only.clone(),
        runs => format!("{{{}}}", runs.join(",")),
    }
}

fn escaped(text: &str) -> String {
    text.escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct List<'a>(Kind, &'a [String], &'a [String]);

    impl fmt::Display for List<'_> {
        fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
            let Self(kind, names, others) = self;
            let others = others.iter().map(String::as_str);
            write_names(f, *kind, "missing", names, others)
        }
    }

    fn text(kind: Kind, names: &[String], others: &[String]) -> String {
        List(kind, names, others).to_string()
    }

    fn layers(numbers: std::ops::Range<usize>) -> Vec<String> {
        let tensors = ["q_proj", "v_proj"].map(|module| ["lora_A", "lora_B"].map(|f| (module, f)));
        numbers
            .flat_map(|layer| {
                let tensors = tensors.into_iter().flatten();
                tensors.map(move |(m, f)| format!("model.layers.{layer}.attn.{m}.{f}.weight"))
            })
            .collect()
    }

    #[test]
    fn a_short_list_is_whole() {
        let names = ["b".to_owned(), "a\n.0".to_owned()];
        assert_eq!(
            text(Kind::Missing, &names, &[]),
            "; 2 missing: `b`, `a\\n.0`"
        );
        assert_eq!(text(Kind::Missing, &[], &names), "");
    }

    #[test]
    fn layers_that_are_missing_at_the_end_are_one_pattern_and_a_question() {
        let (missing, there) = (layers(2..30), layers(0..2));
        assert_eq!(
            text(Kind::Missing, &missing, &there),
            "; 112 missing: `model.layers.{2..29}.*` (all of layers 2 to 29: was the file made for a smaller model?)"
        );
        assert_eq!(
            text(Kind::Unexpected, &missing, &there),
            "; 112 missing: `model.layers.{2..29}.*` (all of layers 2 to 29: was the file made for a larger model?)"
        );
        // Layers in the middle, or all of them, have another reason.
        let there = [layers(0..2), layers(20..21)].concat();
        let missing = [layers(2..20), layers(21..24)].concat();
        assert_eq!(
            text(Kind::Missing, &missing, &there),
            "; 84 missing: `model.layers.{2..19,21..23}.*`"
        );
        let all = layers(0..30);
        assert_eq!(
            text(Kind::Missing, &all, &[]),
            "; 120 missing: `model.layers.{0..29}.*`"
        );
    }

    #[test]
    fn a_part_of_every_layer_is_a_pattern_of_its_own() {
        let (missing, there): (Vec<_>, Vec<_>) = layers(0..12)
            .into_iter()
            .partition(|name| name.contains("v_proj.lora_A"));
        let mut missing = missing;
        missing.extend(["lm_head.weight".to_owned(), "x.5.weight".to_owned()]);
        assert_eq!(
            text(Kind::Missing, &missing, &there),
            "; 14 missing: `lm_head.weight`, `model.layers.{0..11}.attn.v_proj.lora_A.weight` (12), `x.5.weight`"
        );
    }

    #[test]
    fn numbers_inside_of_numbers_are_patterns_too() {
        let experts = (0..3).flat_map(|layer| {
            (0..128).map(move |expert| format!("layers.{layer}.experts.{expert}.up.weight"))
        });
        let there = (0..3).map(|layer| format!("layers.{layer}.norm.weight"));
        let (missing, there): (Vec<_>, Vec<_>) = (experts.collect(), there.collect());
        assert_eq!(
            text(Kind::Missing, &missing, &there),
            "; 384 missing: `layers.{0..2}.experts.*`"
        );
    }

    #[test]
    fn what_has_no_pattern_is_cut_and_counted() {
        let names: Vec<String> = (0..400).map(|i| format!("c{i:03}")).collect();
        let text = text(Kind::Other, &names, &[]);
        assert!(text.contains("`c019` and 380 more"), "{text}");
        assert!(text.len() < 300);
    }

    #[test]
    fn very_many_names_are_summarised_in_linear_time() {
        let names = |n: usize| -> Vec<String> {
            (0..n)
                .map(|i| format!("model.layers.{}.experts.{}.up.weight", i / 100, i % 100))
                .collect()
        };
        let seconds = |n: usize| {
            let names = names(n);
            let start = std::time::Instant::now();
            assert!(text(Kind::Missing, &names, &[]).len() < 300);
            start.elapsed().as_secs_f64()
        };
        let (few, many) = (seconds(12_000).max(1e-3), seconds(120_000));
        assert!(many < 50.0 * few, "{few} s, {many} s");
    }
}
