//! The commonest key of `rank_pattern`, a plain module name, matched without compiling an expression.
//!
//! Some adapters give a key to each of thousands of modules.

/// A key of plain characters, where `.` stands for any one character as in every regular expression.
#[derive(Clone, Debug)]
pub(super) struct PlainName {
    /// In reverse; `None` is any character but a line feed.
    reversed: Vec<Option<char>>,
    /// Written with a leading `^`: only the whole path matches.
    anchored: bool,
}

impl PlainName {
    /// The name that `key` is, if it holds nothing that needs an engine.
    pub(super) fn parse(key: &str) -> Option<Self> {
        let (anchored, key) = match key.strip_prefix('^') {
            Some(rest) => (true, rest),
            None => (false, key),
        };
        let key = key.strip_suffix('$').unwrap_or(key);
        let mut reversed = Vec::with_capacity(key.len());
        let mut chars = key.chars();
        while let Some(c) = chars.next() {
            reversed.push(match c {
                '.' => None,
                '\\' if chars.as_str().starts_with('.') => chars.next(),
                c if c.is_ascii_alphanumeric() || c == '_' || c == '-' => Some(c),
                _ => return None,
            });
        }
        reversed.reverse();
        Some(Self { reversed, anchored })
    }

    /// The path, or end of one, that it matches with a `.` for every character that may be any.
    pub(super) fn literal(&self) -> String {
        let chars = self.reversed.iter().rev();
        chars.map(|c| c.unwrap_or('.')).collect()
    }

    /// Whether it has a character that may be any.
    pub(super) fn has_any(&self) -> bool {
        self.reversed.contains(&None)
    }

    /// Whether `(.*\.)?(KEY)$` matches from the start of `path`.
    pub(super) fn is_suffix_of(&self, path: &str) -> bool {
        let mut rest = path.chars().rev();
        for want in &self.reversed {
            match (want, rest.next()) {
                (Some(want), Some(c)) if *want == c => {}
                (None, Some(c)) if c != '\n' => {}
                _ => return false,
            }
        }
        match rest.next() {
            None => true,
            // The prefix `(.*\.)?` crosses no line feed.
            Some(c) => !self.anchored && c == '.' && rest.all(|c| c != '\n'),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The plain engine is only a faster way to the answer of the expression it replaces.
        #[test]
        fn plain_names_match_as_their_expression(
            key in r"\^?([ab._-]|\\\.){0,6}\$?",
            path in r"[ab.\n]{0,9}",
        ) {
            let fast = PlainName::parse(&key).unwrap();
            let expression = regex::Regex::new(&format!(r"\A(?:(.*\.)?({key})$)")).unwrap();
            prop_assert_eq!(fast.is_suffix_of(&path), expression.is_match(&path));
        }
    }

    #[test]
    fn what_needs_an_engine_is_no_plain_name() {
        for key in ["a|b", "(a)", "a*", r"a\d", "a\\", "[a]", "a^b", "a$b", "é"] {
            assert!(PlainName::parse(key).is_none(), "{key}");
        }
    }
}
