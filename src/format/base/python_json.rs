//! JSON byte for byte as Python's `json.dumps` writes it, of which the files of transformers and bitsandbytes are made.

use serde_json::{Map, Number, Value};

/// `json.dumps(value)`: on one line, keys in their order.
pub(super) fn on_one_line(value: &Value) -> String {
    let mut out = String::new();
    write(value, None, &mut out);
    out
}

/// `json.dumps(value, indent=2, sort_keys=True)` and the newline with which transformers ends a file.
pub(super) fn indented(value: &Value) -> String {
    let mut out = String::new();
    write(value, Some(0), &mut out);
    out.push('\n');
    out
}

/// Writes `value`, at `level` levels of indentation if there is any.
fn write(value: &Value, level: Option<usize>, out: &mut String) {
    match value {
        Value::Null | Value::Bool(_) => *out += &value.to_string(),
        Value::Number(number) => *out += &write_number(number),
        Value::String(text) => write_text(text, out),
        Value::Array(items) => {
            let items = items.iter().map(|item| (None, item));
            write_items(['[', ']'], items.collect(), level, out);
        }
        Value::Object(object) => {
            write_items(['{', '}'], entries(object, level.is_some()), level, out);
        }
    }
}

fn entries(object: &Map<String, Value>, sorted: bool) -> Vec<(Option<&str>, &Value)> {
    let entries = object
        .iter()
        .map(|(key, value)| (Some(key.as_str()), value));
    let mut entries: Vec<_> = entries.collect();
    if sorted {
        entries.sort_by_key(|(key, _)| *key);
    }
    entries
}

fn write_items(
    [open, close]: [char; 2],
    items: Vec<(Option<&str>, &Value)>,
    level: Option<usize>,
    out: &mut String,
) {
    out.push(open);
    let new_line = |level: usize, out: &mut String| {
        out.push('\n');
        *out += &"  ".repeat(level);
    };
    let is_empty = items.is_empty();
    for (index, (key, item)) in items.into_iter().enumerate() {
        if index > 0 {
            out.push(',');
        }
        match level {
            Some(level) => new_line(level + 1, out),
            None if index > 0 => out.push(' '),
            None => {}
        }
        if let Some(key) = key {
            write_text(key, out);
            *out += ": ";
        }
        write(item, level.map(|level| level + 1), out);
    }
    if let Some(level) = level.filter(|_| !is_empty) {
        new_line(level, out);
    }
    out.push(close);
}

/// A text in ASCII; what is beyond is escaped as UTF-16.
fn write_text(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => *out += "\\\"",
            '\\' => *out += "\\\\",
            '\n' => *out += "\\n",
            '\r' => *out += "\\r",
            '\t' => *out += "\\t",
            '\u{8}' => *out += "\\b",
            '\u{c}' => *out += "\\f",
            ' '..='\u{7f}' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    *out += &format!("\\u{unit:04x}");
                }
            }
        }
    }
    out.push('"');
}

/// A float as Python's `repr` has it: the shortest digits that lead back to it, with an exponent below `1e-4` and from
/// `1e16` on.
fn write_number(number: &Number) -> String {
    let text = number.to_string();
    if !number.is_f64() {
        return text;
    }
    // Digits are taken from here, since Rust's own breaks a tie between two that are as near upwards, not to the even one.
    let (sign, text) = match text.strip_prefix('-') {
        Some(text) => ("-", text),
        None => ("", text.as_str()),
    };
    let (mantissa, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let leading = digits.len() - digits.trim_start_matches('0').len();
    let digits = digits.trim_matches('0');
    if digits.is_empty() {
        return format!("{sign}0.0");
    }
    // How many digits are before the point.
    let point = whole.len() as i32 + exponent.parse().unwrap_or(0) - leading as i32;
    let text = match point {
        -3..=0 => format!("0.{}{digits}", "0".repeat(point.unsigned_abs() as usize)),
        1..=16 => {
            let point = point as usize;
            let digits = format!("{digits:0<point$}");
            let (whole, fraction) = digits.split_at(point);
            let fraction = if fraction.is_empty() { "0" } else { fraction };
            format!("{whole}.{fraction}")
        }
        _ => {
            let (first, rest) = digits.split_at(1);
            let dot = if rest.is_empty() { "" } else { "." };
            let exponent = point - 1;
            let direction = if exponent < 0 { '-' } else { '+' };
            format!("{first}{dot}{rest}e{direction}{:02}", exponent.abs())
        }
    };
    sign.to_owned() + &text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn floats_are_python_s() {
        // `repr` of Python 3.12.
        for (float, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (6.0, "6.0"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (9.999e-5, "9.999e-05"),
            (1e-6, "1e-06"),
            (-1.5e-300, "-1.5e-300"),
            (1e15, "1000000000000000.0"),
            (123456789012345680.0, "1.2345678901234568e+17"),
            (9999999999999998.0, "9999999999999998.0"),
            (1e16, "1e+16"),
            (1e100, "1e+100"),
            (0.052_505_493_164_062_5, "0.0525054931640625"),
            (5e-324, "5e-324"),
            (100.0, "100.0"),
            (-0.001, "-0.001"),
            // Two of as many digits are as near; Python takes the even one.
            (768.184_631_347_656_2, "768.1846313476562"),
            (f64::from(0.234_434_2_f32), "0.23443420231342316"),
        ] {
            assert_eq!(on_one_line(&json!(float)), text);
            assert_eq!(text.parse::<f64>().unwrap(), float);
        }
    }

    #[test]
    fn texts_are_ascii() {
        let text = "a\"\\\n\r\t\u{8}\u{c}\u{1}\u{7f}é\u{2028}𝕏/";
        let expected =
            r#""a\"\\\n\r\t\b\f\u0001"#.to_owned() + "\u{7f}" + r#"\u00e9\u2028\ud835\udd4f/""#;
        assert_eq!(on_one_line(&json!(text)), expected);
    }

    #[test]
    fn objects_keep_their_order_on_one_line_and_are_sorted_over_several() {
        let value = json!({"b": [1, [], {}, {"x": null}], "a": true, "B": -3});
        assert_eq!(
            on_one_line(&value),
            r#"{"b": [1, [], {}, {"x": null}], "a": true, "B": -3}"#
        );
        let expected = "{\n  \"B\": -3,\n  \"a\": true,\n  \"b\": [\n    1,\n    [],\n    {},\n    {\n      \"x\": null\n    }\n  ]\n}\n";
        assert_eq!(indented(&value), expected);
        assert_eq!(indented(&json!({})), "{}\n");
    }
}
