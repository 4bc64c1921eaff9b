//! The marks `{% generation %}` .. `{% endgeneration %}`, an extension of transformers, as filters that put noncharacters around what
//! stands between them.

use std::ops::Range;
use std::sync::LazyLock;

use minijinja::{Environment, State, Value};
use regex::Regex;

/// Before what the assistant says. Unicode reserves it for use inside of programs.
pub(super) const START: char = '\u{fdd0}';
/// After it.
const END: char = '\u{fdd1}';
/// The filter's name.
const FILTER: &str = "burn_peft_generation";
/// The variable that turns the marks on.
pub(super) const SWITCH: &str = "burn_peft_marks";

/// The source with filter blocks in place of its marks, and whether it has any.
pub(super) fn with_filters(source: &str) -> (String, bool) {
    static MARK: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a valid pattern")
    });
    let marked = MARK.is_match(source);
    let replaced = MARK.replace_all(source, |found: &regex::Captures| {
        let (before, after) = (&found[1], &found[3]);
        // What is set inside stays inside, as in transformers.
        match found.get(2) {
            None => format!("{{%{before} with %}}{{% filter {FILTER} {after}%}}"),
            Some(_) => format!("{{%{before} endfilter %}}{{% endwith {after}%}}"),
        }
    });
    (replaced.into_owned(), marked)
}

pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_filter(FILTER, |state: &State, text: String| -> String {
        let on = state.lookup(SWITCH).as_ref().is_some_and(Value::is_true);
        if on {
            format!("{START}{text}{END}")
        } else {
            text
        }
    });
}

/// The text without marks, and the bytes between them; none if they do not pair up.
pub(super) fn take(marked: &str) -> Option<(String, Vec<Range<usize>>)> {
    let mut text = String::with_capacity(marked.len());
    let (mut spans, mut start) = (Vec::new(), None);
    for c in marked.chars() {
        match (c, start) {
            (START, None) => start = Some(text.len()),
            (END, Some(begin)) => {
                spans.push(begin..text.len());
                start = None;
            }
            (START | END, _) => return None,
            _ => text.push(c),
        }
    }
    start.is_none().then_some((text, spans))
}
