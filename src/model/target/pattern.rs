//! Python's regular expressions over module paths, in linear time where the pattern allows it.
//!
//! PEFT hands its patterns to Python's `re`, published adapters use look-around, and a pattern read from a file is
//! hostile until it was compiled under limits. Three engines answer, the cheapest that can:
//!
//! 1. plain names (letters, digits, `_`, `-`, `.`, `\.`, a leading `^`, a trailing `$`), compared character by character;
//! 2. the `regex` crate: linear time, bounded memory;
//! 3. `fancy-regex` for look-around and back-references: at most [`BACKTRACK_LIMIT`] steps, then a typed error.
//!
//! Python's syntax means the same here, with four differences: `$` does not match before a final line feed;
//! characters that Python reads literally inside a class but the `regex` crate as set operators (`[`, `&&`, `--`,
//! `~~`) are refused, not reinterpreted; a verbose pattern (`(?x)`) may not end in a comment; and what only the Rust
//! engines understand is accepted.

use std::borrow::Cow;

use super::plain_name::PlainName;
use crate::{PeftError, Result};

/// The longest pattern accepted, in bytes.
const MAX_PATTERN_BYTES: usize = 64 << 10;
/// The longest pattern with look-around or back-references accepted, in bytes: each look-around is compiled into
/// automata of its own, so their number is what bounds memory.
const MAX_BACKTRACKING_BYTES: usize = 2 << 10;
/// The most memory one compiled expression may take, in bytes.
const REGEX_SIZE_LIMIT: usize = 1 << 20;
/// The most memory one part of a pattern with look-around may take, in bytes.
const DELEGATE_SIZE_LIMIT: usize = 256 << 10;
/// The most backtracking steps that one pattern may spend on one module path.
///
/// Look-ahead patterns of published adapters need some hundreds on paths of a hundred characters.
const BACKTRACK_LIMIT: usize = 100_000;

/// A compiled pattern, which remembers where it came from for the sake of error messages.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    option: &'static str,
    text: String,
    engine: Engine,
}

#[derive(Clone, Debug)]
enum Engine {
    Plain(PlainName),
    Linear(regex::Regex),
    Backtracking(fancy_regex::Regex),
}

impl Pattern {
    /// Compiles `text` to match whole paths, as Python's `re.fullmatch`.
    pub(super) fn full_match(option: &'static str, text: &str) -> Result<Self> {
        check_length(option, text)?;
        let body = from_python(option, text)?;
        // Alone first: `a)|(b` is an error in Python, but would balance between the parentheses added below.
        compile(option, text, &body)?;
        Self::new(option, text, &format!(r"\A(?:{body})\z"))
    }

    /// Compiles a key of PEFT's `rank_pattern` or `alpha_pattern`: `re.match(r"(.*\.)?(KEY)$", path)`.
    pub(super) fn suffix_key(option: &'static str, text: &str) -> Result<Self> {
        check_length(option, text)?;
        if let Some(name) = PlainName::parse(text) {
            return Ok(Self {
                option,
                text: text.into(),
                engine: Engine::Plain(name),
            });
        }
        let body = from_python(option, text)?;
        Self::new(option, text, &format!(r"\A(?:(.*\.)?({body})$)"))
    }

    /// Compiles one of PEFT's `layers_pattern`: `re.match(r"(?:^|.*?\.)PATTERN\.(?P<idx>\d+)\.", path)`.
    pub(super) fn layer_index(option: &'static str, text: &str) -> Result<Self> {
        check_length(option, text)?;
        let body = from_python(option, text)?;
        Self::new(
            option,
            text,
            &format!(r"\A(?:(?:^|.*?\.){body}\.(?P<idx>\d+)\.)"),
        )
    }

    /// PEFT's search for a layer's index when no `layers_pattern` is given: the first numbered segment after a
    /// dotted name, found lazily, so that an expert's index further right is not taken for the layer's.
    pub(super) fn any_layer_index() -> Result<Self> {
        let text = r".*?\.[^.]*\.(?P<idx>\d+)\.";
        Self::new("layers_to_transform", text, &format!(r"\A(?:{text})"))
    }

    fn new(option: &'static str, text: &str, whole: &str) -> Result<Self> {
        Ok(Self {
            option,
            text: text.into(),
            engine: compile(option, text, whole)?,
        })
    }

    /// The plain name that it is, if it is one.
    pub(super) fn plain(&self) -> Option<&PlainName> {
        match &self.engine {
            Engine::Plain(name) => Some(name),
            _ => None,
        }
    }

    /// The pattern as it was written.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// A measure of the memory this may take: nothing for a plain name, otherwise in units of about a mebibyte.
    pub(super) fn cost(&self) -> usize {
        match &self.engine {
            Engine::Plain(_) => 0,
            Engine::Linear(_) => 1,
            Engine::Backtracking(_) => 16,
        }
    }

    /// Whether `path` matches.
    pub(super) fn is_match(&self, path: &str) -> Result<bool> {
        match &self.engine {
            Engine::Plain(name) => Ok(name.is_suffix_of(path)),
            Engine::Linear(regex) => Ok(regex.is_match(path)),
            Engine::Backtracking(regex) => regex
                .is_match(path)
                .map_err(|e| self.runtime_error(path, e)),
        }
    }

    /// `None` where `path` does not match, otherwise the text of the group `idx` if that group took part.
    pub(super) fn index_group<'t>(&self, path: &'t str) -> Result<Option<Option<&'t str>>> {
        match &self.engine {
            Engine::Plain(_) => Ok(None),
            Engine::Linear(regex) => Ok(regex
                .captures(path)
                .map(|c| c.name("idx").map(|m| m.as_str()))),
            Engine::Backtracking(regex) => Ok(regex
                .captures(path)
                .map_err(|e| self.runtime_error(path, e))?
                .map(|c| c.name("idx").map(|m| m.as_str()))),
        }
    }

    fn runtime_error(&self, path: &str, error: fancy_regex::Error) -> PeftError {
        PeftError::PatternMatch {
            option: self.option,
            pattern: self.text.clone(),
            path: path.into(),
            reason: error.to_string(),
        }
    }
}

fn check_length(option: &'static str, text: &str) -> Result<()> {
    if text.len() > MAX_PATTERN_BYTES {
        return Err(invalid(
            option,
            &shortened(text),
            format!(
                "{} bytes long, at most {MAX_PATTERN_BYTES} are allowed",
                text.len()
            ),
        ));
    }
    Ok(())
}

fn shortened(text: &str) -> String {
    format!("{}...", text.chars().take(32).collect::<String>())
}

fn compile(option: &'static str, text: &str, whole: &str) -> Result<Engine> {
    let linear = regex::RegexBuilder::new(whole)
        .size_limit(REGEX_SIZE_LIMIT)
        .dfa_size_limit(REGEX_SIZE_LIMIT)
        .build();
    match linear {
        Ok(regex) => Ok(Engine::Linear(regex)),
        // Not in the linear engine's language: look-around, back-references, or no language's.
        Err(regex::Error::Syntax(_)) if text.len() > MAX_BACKTRACKING_BYTES => Err(invalid(
            option,
            &shortened(text),
            format!(
                "{} bytes long, at most {MAX_BACKTRACKING_BYTES} are allowed with look-around or back-references",
                text.len()
            ),
        )),
        Err(regex::Error::Syntax(_)) => fancy_regex::RegexBuilder::new(whole)
            .backtrack_limit(BACKTRACK_LIMIT)
            .delegate_size_limit(DELEGATE_SIZE_LIMIT)
            .delegate_dfa_size_limit(DELEGATE_SIZE_LIMIT)
            .build()
            .map(Engine::Backtracking)
            .map_err(|e| invalid(option, text, e.to_string())),
        Err(e) => Err(invalid(option, text, e.to_string())),
    }
}

fn invalid(option: &'static str, pattern: &str, reason: String) -> PeftError {
    PeftError::Pattern {
        option,
        pattern: pattern.into(),
        reason,
    }
}

/// Rewrites Python's `\Z` as `\z` and refuses what Python and the engines here would read differently.
fn from_python<'a>(option: &'static str, text: &'a str) -> Result<Cow<'a, str>> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    let mut in_class = false;
    while let Some(c) = chars.next() {
        match c {
            '\\' => {
                let escaped = chars.next();
                out.push('\\');
                out.extend(escaped.map(|e| if e == 'Z' && !in_class { 'z' } else { e }));
                continue;
            }
            '[' if !in_class => {
                in_class = true;
                out.push('[');
                // A `]` that opens a class, also after `^`, is a member of it.
                out.extend(chars.next_if_eq(&'^'));
                out.extend(chars.next_if_eq(&']'));
                continue;
            }
            ']' => in_class = false,
            '[' => {
                return Err(invalid(option, text, "`[` in a class: write `\\[`".into()));
            }
            '&' | '-' | '~' if in_class && chars.peek() == Some(&c) => {
                return Err(invalid(
                    option,
                    text,
                    format!("`{c}{c}` in a class: write `\\{c}`"),
                ));
            }
            _ => {}
        }
        out.push(c);
    }
    Ok(if out == text { text.into() } else { out.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(pattern: &str, path: &str) -> bool {
        let pattern = Pattern::full_match("target_modules", pattern).unwrap();
        pattern.is_match(path).unwrap()
    }

    fn reason(result: Result<Pattern>) -> String {
        match result.unwrap_err() {
            PeftError::Pattern { reason, .. } => reason,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn full_match_is_not_a_search_and_alternatives_are_tried_to_the_end() {
        assert!(full(r"q|q_proj", "q_proj"));
        assert!(!full(r"q_proj", "layers.0.q_proj"));
        assert!(!full(r"q_proj|v", "q_projx"));
        assert!(full(r".*\.q_proj\Z", "layers.0.q_proj"));
    }

    #[test]
    fn look_around_and_back_references_match() {
        assert!(full(r"(?!.*vision).*\.q_proj", "text.0.q_proj"));
        assert!(!full(r"(?!.*vision).*\.q_proj", "vision.0.q_proj"));
        assert!(full(r".*(?<=self_attn)\.q_proj", "0.self_attn.q_proj"));
        assert!(full(r"(\w+)\.\1", "block.block"));
        assert!(!full(r"(?P<n>\w+)\.(?P=n)", "block.blocks"));
    }

    #[test]
    fn runaway_backtracking_is_a_typed_error() {
        let pattern = Pattern::full_match("target_modules", r"(?=a)(?:(a+)+\1b)").unwrap();
        let error = pattern.is_match(&"a".repeat(60)).unwrap_err();
        assert!(
            matches!(&error, PeftError::PatternMatch { path, .. } if path.starts_with("aaa")),
            "{error}"
        );
    }

    #[test]
    fn bad_patterns_are_typed_errors() {
        for bad in ["(", "a)|(b", "[a", "*", r"(?<=a+)b(", "a{2,1}"] {
            reason(Pattern::full_match("target_modules", bad));
        }
        // `\w` is a few kilobytes of automaton each.
        reason(Pattern::full_match("target_modules", r"\w{5000}"));
        reason(Pattern::suffix_key(
            "rank_pattern",
            &"a".repeat(MAX_PATTERN_BYTES + 1),
        ));
    }

    /// A look-ahead is seven bytes and an automaton: many of them take seconds and hundreds of megabytes.
    #[test]
    fn long_patterns_with_look_around_are_refused() {
        let pattern = r"(?=\w+\.)".repeat(1000);
        let reason = reason(Pattern::full_match("target_modules", &pattern));
        assert!(reason.contains("look-around"), "{reason}");
        let alternatives = vec!["layers.0.q_proj"; 1000].join("|");
        assert!(full(&alternatives, "layers.0.q_proj"));
    }

    #[test]
    fn what_python_reads_literally_in_a_class_is_refused() {
        for pattern in ["[a[b]", "[a&&b]", "[a--b]", "[a~~b]"] {
            let reason = reason(Pattern::full_match("target_modules", pattern));
            assert!(reason.contains("in a class"), "{reason}");
        }
        // Outside a class, escaped, or a `]` that opens the class: the same in both.
        assert!(full(r"a--b", "a--b"));
        assert!(full(r"[\[a]b", "[b"));
        assert!(full(r"[]x]y", "]y"));
        assert!(full(r"[^]x]y", "zy"));
    }

    #[test]
    fn a_layer_index_group_is_found_or_absent() {
        let pattern = Pattern::layer_index("layers_pattern", "layers").unwrap();
        assert_eq!(
            pattern.index_group("model.layers.12.q").unwrap(),
            Some(Some("12"))
        );
        assert_eq!(
            pattern.index_group("layers.3.experts.7.q").unwrap(),
            Some(Some("3"))
        );
        assert_eq!(pattern.index_group("model.xlayers.12.q").unwrap(), None);
        // Python's alternation reaches over the whole expression, so this matches without an index.
        let pattern = Pattern::layer_index("layers_pattern", "h|layers").unwrap();
        assert_eq!(pattern.index_group("h.0.q").unwrap(), Some(None));
    }
}
