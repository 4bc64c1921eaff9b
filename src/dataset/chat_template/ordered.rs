//! Mappings that keep the order of their keys, as Python's do.
//!
//! minijinja sorts keys unless its feature `preserve_order` is on, which turns on features of `indexmap` that all of Burn would be built
//! with. So the data comes as objects of our own, and mappings that a template writes out are made by a function.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectRepr, Value};
use minijinja::{Environment, Error, ErrorKind};

/// The function that makes a mapping of a list of keys and values in turn.
const FUNCTION: &str = "burn_peft_dict";

struct Ordered {
    entries: Vec<(Value, Value)>,
    places: HashMap<Value, usize>,
}

impl FromIterator<(Value, Value)> for Ordered {
    fn from_iter<I: IntoIterator<Item = (Value, Value)>>(pairs: I) -> Self {
        let mut ordered = Self {
            entries: Vec::new(),
            places: HashMap::new(),
        };
        for (key, value) in pairs {
            match ordered.places.get(&key) {
                // The last value of a key, at its first place.
                Some(&place) => ordered.entries[place].1 = value,
                None => {
                    ordered.places.insert(key.clone(), ordered.entries.len());
                    ordered.entries.push((key, value));
                }
            }
        }
        ordered
    }
}

impl fmt::Debug for Ordered {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_map()
            .entries(self.entries.iter().map(|(key, value)| (key, value)))
            .finish()
    }
}

impl Object for Ordered {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let place = *self.places.get(key)?;
        Some(self.entries[place].1.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.entries.iter().map(|(key, _)| key.clone()).collect())
    }
}

/// JSON as a value of templates.
pub(super) fn from_json(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::Number(number) => {
            match (number.as_i64(), number.as_u64(), number.as_f64()) {
                (Some(value), ..) => Value::from(value),
                (None, Some(value), _) => Value::from(value),
                (None, None, value) => Value::from(value.unwrap_or(f64::NAN)),
            }
        }
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(from_json).collect(),
        serde_json::Value::Object(map) => {
            let pairs = map
                .iter()
                .map(|(key, value)| (Value::from(key.as_str()), from_json(value)));
            Value::from_object(pairs.collect::<Ordered>())
        }
    }
}

pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_function(FUNCTION, |items: Vec<Value>| -> Result<Value, Error> {
        let pairs = items
            .chunks_exact(2)
            .map(|pair| (pair[0].clone(), pair[1].clone()));
        match items.len() % 2 {
            0 => Ok(Value::from_object(pairs.collect::<Ordered>())),
            _ => Err(Error::new(
                ErrorKind::SyntaxError,
                "a key of a mapping has no value",
            )),
        }
    });
}

/// The source with calls of the function in place of the mappings written out in it: `{"a": 1}` becomes `burn_peft_dict(["a", 1])`.
pub(super) fn with_calls(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest
        .find("{{")
        .into_iter()
        .chain(rest.find("{%"))
        .chain(rest.find("{#"))
        .min()
    {
        out += &rest[..at];
        rest = &rest[at..];
        let len = match &rest[..2] {
            "{#" => rest.find("#}").map_or(rest.len(), |end| end + 2),
            "{%" if is_tag(rest, "raw") => raw_len(rest),
            open => {
                let (code, len) = expression(&rest[2..], if open == "{{" { "}}" } else { "%}" });
                out += open;
                out += &code;
                rest = &rest[2 + len..];
                continue;
            }
        };
        out += &rest[..len];
        rest = &rest[len..];
    }
    out + rest
}

/// Whether a block begins with this word.
fn is_tag(block: &str, word: &str) -> bool {
    let inside = block[2..].trim_start_matches(['-', '+']).trim_start();
    inside
        .strip_prefix(word)
        .is_some_and(|after| !after.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
}

/// The length of what no expression is in, up to the block that ends it.
fn raw_len(block: &str) -> usize {
    let mut from = 2;
    while let Some(at) = block[from..].find("{%") {
        from += at;
        if is_tag(&block[from..], "endraw") {
            return from;
        }
        from += 2;
    }
    block.len()
}

/// The code up to its `end`, rewritten, and how much of the text it is.
fn expression(text: &str, end: &str) -> (String, usize) {
    let mut out = String::new();
    let mut open: Vec<char> = Vec::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        if open.is_empty() && text[at..].starts_with(end) {
            return (out, at);
        }
        match c {
            '"' | '\'' => {
                out.push(c);
                let mut escaped = false;
                for (_, inside) in chars.by_ref() {
                    out.push(inside);
                    if !escaped && inside == c {
                        break;
                    }
                    escaped = !escaped && inside == '\\';
                }
            }
            '(' | '[' => {
                open.push(c);
                out.push(c);
            }
            '{' => {
                open.push(c);
                out += FUNCTION;
                out += "([";
            }
            '}' if open.last() == Some(&'{') => {
                open.pop();
                out += "])";
            }
            ')' | ']' => {
                open.pop();
                out.push(c);
            }
            ':' if open.last() == Some(&'{') => out.push(','),
            c => out.push(c),
        }
    }
    (out, text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_become_calls_and_nothing_else_changes() {
        for same in [
            "a { b: c } {# {\"a\": 1} #} {{ x[1:2] }}{% raw %}{{ {1: 2} }}{% endraw %}{% if a %}:{% endif %}",
            "{{ '{\"a\": 1}' }}{{ \"it's {\\\" 1: \" }}",
            "{{ broken",
        ] {
            assert_eq!(with_calls(same), same);
        }
        for (source, expected) in [
            ("{{ {} }}", "{{ burn_peft_dict([]) }}"),
            ("{{{'a': x[1:]}}}", "{{burn_peft_dict(['a', x[1:]])}}"),
            (
                "{%- set d = {'a': {'b': f(1)}, c: '}'} -%}",
                "{%- set d = burn_peft_dict(['a', burn_peft_dict(['b', f(1)]), c, '}']) -%}",
            ),
        ] {
            assert_eq!(with_calls(source), expected);
        }
    }
}
