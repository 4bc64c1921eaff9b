//! "Did you mean": the known names nearest to one that was not found, by Levenshtein distance.

use std::collections::BTreeSet;

/// How much of a name is compared, in characters: the cost of a comparison grows with the square of it.
const COMPARED_CHARS: usize = 256;

/// The suffixes of `paths` nearest to `name`, nearest first, at most `count`.
///
/// A suffix has as many segments as `name`: `q_prj` is compared with `q_proj`, `self_atn.q_proj` with
/// `self_attn.q_proj`. Of an expression only the words that are no segment of any path are compared, with all segments.
pub(super) fn nearest<'a>(
    name: &str,
    paths: impl IntoIterator<Item = &'a str>,
    count: usize,
) -> Vec<String> {
    let name: String = name.chars().take(COMPARED_CHARS).collect();
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    let is_path = name.chars().all(|c| is_word(c) || c == '.');
    let paths = paths.into_iter();
    let (wanted, known): (Vec<&str>, BTreeSet<&str>) = if is_path {
        let depth = name.split('.').count();
        let suffixes = paths.map(|path| suffix(path, depth));
        (vec![&name], suffixes.collect())
    } else {
        let segments: BTreeSet<&str> = paths.flat_map(|path| path.split('.')).collect();
        let words = name.split(|c| !is_word(c));
        let unknown = words.filter(|word| word.len() > 1 && !segments.contains(word));
        (unknown.collect(), segments)
    };
    let mut ranked: Vec<(usize, &str)> = known
        .iter()
        .filter_map(|known| {
            let shortened: String = known.chars().take(COMPARED_CHARS).collect();
            // A number names no module, and a name does not mean itself.
            if known.parse::<usize>().is_ok() || wanted.contains(known) {
                return None;
            }
            let distance = wanted
                .iter()
                .map(|w| strsim::levenshtein(w, &shortened))
                .min();
            distance.map(|d| (d, *known))
        })
        .collect();
    ranked.sort_unstable();
    ranked
        .into_iter()
        .take(count)
        .map(|(_, known)| known.to_owned())
        .collect()
}

/// The last `depth` segments of a dotted path, or all of it.
fn suffix(path: &str, depth: usize) -> &str {
    match path.rmatch_indices('.').nth(depth - 1) {
        Some((dot, _)) => &path[dot + 1..],
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATHS: [&str; 4] = [
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.k_proj",
        "layers.1.mlp.gate_proj",
        "lm_head",
    ];

    #[test]
    fn names_are_compared_with_suffixes_of_their_own_depth() {
        assert_eq!(nearest("q_prj", PATHS, 3)[0], "q_proj");
        assert_eq!(nearest("self_atn.q_proj", PATHS, 3)[0], "self_attn.q_proj");
        assert_eq!(nearest("head", PATHS, 3)[0], "lm_head");
        assert_eq!(nearest("q_prj", PATHS, 3).len(), 3);
    }

    #[test]
    fn of_an_expression_the_unknown_words_are_compared() {
        assert_eq!(nearest(r".*\.(q_proj|gate_prj)$", PATHS, 3)[0], "gate_proj");
        assert_eq!(nearest(r".*self_atn\..*", PATHS, 3)[0], "self_attn");
        assert_eq!(nearest(r".*\.\d+", PATHS, 3), Vec::<String>::new());
    }

    #[test]
    fn nothing_is_near_to_nothing() {
        assert_eq!(nearest("q_proj", [], 3), Vec::<String>::new());
        assert_eq!(nearest("", PATHS, 3).len(), 3);
    }
}
