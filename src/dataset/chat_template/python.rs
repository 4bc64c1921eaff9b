//! What templates take from Python and from transformers, beyond what minijinja has.

use minijinja::value::{Kwargs, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};

use super::json::tojson;

pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", tojson);
    environment.add_filter("trim", |text: &Value, chars: Option<String>| {
        strip(&text.to_string(), chars.as_deref(), true, true)
    });
    // Python asks for a length and items, or for an iterator: a text, a mapping and an undefined value have them, none has not.
    environment.add_test("sequence", |value: &Value| {
        use ValueKind::{Map, Seq, String, Undefined};
        matches!(value.kind(), Seq | String | Map | Undefined)
    });
    environment.add_test("iterable", |value: &Value| {
        use ValueKind::{Iterable, Map, Seq, String, Undefined};
        matches!(value.kind(), Seq | String | Map | Iterable | Undefined)
    });
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
    environment.add_function(
        "raise_exception",
        |message: Option<Value>| -> Result<Value, Error> {
            let message = message.map_or_else(String::new, |message| message.to_string());
            Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("the template refuses the messages: {message}"),
            ))
        },
    );
    environment.add_function("strftime_now", |format: String| {
        strftime(jiff::Timestamp::now(), &format)
    });
}

/// Fixes the time of `strftime_now`.
pub(super) fn set_now(environment: &mut Environment<'static>, seconds: i64) {
    environment.add_function("strftime_now", move |format: String| {
        let time =
            jiff::Timestamp::from_second(seconds).map_err(|error| invalid(error.to_string()))?;
        strftime(time, &format)
    });
}

fn strftime(time: jiff::Timestamp, format: &str) -> Result<String, Error> {
    let time = time.to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &time)
        .map_err(|error| invalid(format!("strftime_now: {error}")))
}

fn invalid(reason: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

/// Methods of texts and lists that minijinja's own compatibility leaves out, or has otherwise.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return match (value.kind(), name) {
            (ValueKind::Seq, "index") => {
                let (wanted,): (&Value,) = from_args(args)?;
                let found = value.try_iter()?.position(|item| item == *wanted);
                found
                    .map(Value::from)
                    .ok_or_else(|| invalid(format!("{wanted} is not in the list")))
            }
            (ValueKind::Map | ValueKind::Seq, "copy") => {
                let () = from_args(args)?;
                Ok(value.clone())
            }
            // Python's sandbox for templates refuses what changes a list or mapping.
            (
                ValueKind::Seq,
                "append" | "extend" | "insert" | "pop" | "remove" | "sort" | "reverse" | "clear",
            )
            | (ValueKind::Map, "pop" | "popitem" | "update" | "setdefault" | "clear") => {
                Err(invalid(format!(
                    "`{name}` would change a {}, which templates must not",
                    value.kind()
                )))
            }
            _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
        };
    };
    let strings = |parts: Vec<&str>| Value::from_iter(parts.into_iter().map(Value::from));
    Ok(match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<String>,) = from_args(args)?;
            strip(text, chars.as_deref(), name != "rstrip", name != "lstrip").into()
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (parts, last) = match name {
                "partition" => (text.split_once(separator), false),
                _ => (text.rsplit_once(separator), true),
            };
            strings(match (parts, last) {
                (Some((before, after)), _) => vec![before, separator, after],
                (None, false) => vec![text, "", ""],
                (None, true) => vec!["", "", text],
            })
        }
        "rsplit" => {
            let (separator, most, kwargs): (Option<String>, Option<i64>, Kwargs) = from_args(args)?;
            let most = most.map_or_else(
                || kwargs.get::<Option<i64>>("maxsplit"),
                |most| Ok(Some(most)),
            )?;
            kwargs.assert_all_used()?;
            let most = most.and_then(|most| usize::try_from(most).ok());
            strings(rsplit(text, separator.as_deref(), most))
        }
        "split" => {
            let (separator, most, kwargs): (Option<String>, Option<i64>, Kwargs) = from_args(args)?;
            let most = most.map_or_else(
                || kwargs.get::<Option<i64>>("maxsplit"),
                |most| Ok(Some(most)),
            )?;
            kwargs.assert_all_used()?;
            let most = most.and_then(|most| usize::try_from(most).ok());
            match separator.as_deref() {
                Some("") => return Err(invalid("empty separator".into())),
                Some(separator) => strings(match most {
                    Some(most) => text.splitn(most.saturating_add(1), separator).collect(),
                    None => text.split(separator).collect(),
                }),
                None => strings(split_space(text, most)),
            }
        }
        "index" | "rindex" => {
            let (wanted,): (&str,) = from_args(args)?;
            let found = if name == "index" {
                text.find(wanted)
            } else {
                text.rfind(wanted)
            };
            let found = found.ok_or_else(|| invalid("substring not found".into()))?;
            text[..found].chars().count().into()
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let fill = width.min(1 << 16).saturating_sub(text.chars().count());
            let (sign, digits) = match text.strip_prefix(['+', '-']) {
                Some(digits) => text.split_at(text.len() - digits.len()),
                None => ("", text),
            };
            format!("{sign}{}{digits}", "0".repeat(fill)).into()
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<String>) = from_args(args)?;
            let space = width.min(1 << 16).saturating_sub(text.chars().count());
            let fill = fill.unwrap_or_else(|| " ".into());
            let left = match name {
                "ljust" => 0,
                "rjust" => space,
                // Python puts the odd one to the left where the width is odd.
                _ => space / 2 + (space & width & 1),
            };
            format!("{}{text}{}", fill.repeat(left), fill.repeat(space - left)).into()
        }
        // Python begins a word after whatever is no letter.
        "title" => {
            let () = from_args(args)?;
            let mut inside = false;
            let mut title = String::with_capacity(text.len());
            for c in text.chars() {
                match inside {
                    true => title.extend(c.to_lowercase()),
                    false => title.extend(c.to_uppercase()),
                }
                inside = c.is_alphabetic();
            }
            title.into()
        }
        "casefold" => {
            let () = from_args(args)?;
            text.to_lowercase().into()
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swapped = text.chars().map(|c| match c.is_uppercase() {
                true => c.to_lowercase().collect::<String>(),
                false => c.to_uppercase().collect(),
            });
            swapped.collect::<String>().into()
        }
        _ => return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    })
}

/// What Python calls white space; Rust's does not have the four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn strip(text: &str, chars: Option<&str>, start: bool, end: bool) -> String {
    let strips = |c: char| match chars {
        Some(chars) => chars.contains(c),
        None => is_space(c),
    };
    let text = if start {
        text.trim_start_matches(strips)
    } else {
        text
    };
    if end {
        text.trim_end_matches(strips)
    } else {
        text
    }
    .to_owned()
}

/// `split` at white space, at most `most` times.
fn split_space(text: &str, most: Option<usize>) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        if most.is_some_and(|most| parts.len() >= most) {
            parts.push(rest);
            break;
        }
        let end = rest.find(is_space).unwrap_or(rest.len());
        parts.push(&rest[..end]);
        rest = rest[end..].trim_start_matches(is_space);
    }
    parts
}

/// `rsplit`, at most `most` times.
fn rsplit<'t>(text: &'t str, separator: Option<&str>, most: Option<usize>) -> Vec<&'t str> {
    let mut parts: Vec<&str> = match (separator, most) {
        (Some(separator), Some(most)) => text.rsplitn(most.saturating_add(1), separator).collect(),
        (Some(separator), None) => text.rsplit(separator).collect(),
        (None, _) => {
            let mut parts = Vec::new();
            let mut rest = text.trim_end_matches(is_space);
            while !rest.is_empty() {
                if most.is_some_and(|most| parts.len() >= most) {
                    parts.push(rest);
                    break;
                }
                let start = rest.char_indices().rev().find(|(_, c)| is_space(*c));
                let start = start.map_or(0, |(at, c)| at + c.len_utf8());
                parts.push(&rest[start..]);
                rest = rest[..start].trim_end_matches(is_space);
            }
            parts
        }
    };
    parts.reverse();
    parts
}
