//! Changes to inputs: of any bytes, of JSON by its structure, of a header in front of values.

use serde_json::{Value, json};

use super::driver::Rng;

/// Numbers at which something often goes wrong.
const NUMBERS: [u64; 20] = [
    0,
    1,
    2,
    3,
    4,
    8,
    63,
    64,
    65,
    255,
    256,
    65536,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    1 << 53,
    1 << 62,
    1 << 63,
    u64::MAX - 7,
    u64::MAX,
];

/// What has a meaning in the texts.
const TOKENS: [&str; 36] = [
    "\"",
    "\\",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "null",
    "true",
    "false",
    "-",
    "1e400",
    "0.5",
    "1e-320",
    "-0",
    "\\u0000",
    "\\ud800",
    "\u{feff}",
    "\u{1b}",
    "é",
    "lora_A",
    "lora_B",
    "lora_a",
    ".weight",
    "base_model.model.",
    "_orig_mod.",
    "__metadata__",
    "m",
    "F32",
    "BF16",
    "(?=a)",
    "(a|b)*",
    "$",
    "\"r\":2,",
    "\"dtype\":\"F32\",",
];

/// Changes bytes with no regard for what they mean.
pub fn bytes(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..1 + rng.below(3) {
        let (at, end) = (rng.below(bytes.len() + 1), rng.below(bytes.len() + 1));
        let (from, to) = (at.min(end), at.max(end).min(at.min(end) + 64));
        match rng.below(8) {
            0 if !bytes.is_empty() => {
                let at = rng.below(bytes.len());
                bytes[at] ^= 1 << rng.below(8);
            }
            1 if !bytes.is_empty() => {
                let at = rng.below(bytes.len());
                bytes[at] = rng.next() as u8;
            }
            2 => drop(bytes.drain(from..to)),
            3 => {
                let part = bytes[from..to].to_vec();
                bytes.splice(at..at, part);
            }
            4 => {
                let token = rng.choose(&TOKENS).as_bytes();
                bytes.splice(at..at, token.iter().copied());
            }
            5 => {
                let start = rng.below(other.len());
                let part = &other[start..(start + rng.below(64)).min(other.len())];
                bytes.splice(from..to, part.iter().copied());
            }
            6 => bytes.truncate(at),
            _ => bytes.push(rng.next() as u8),
        }
    }
    bytes
}

/// Changes bytes, or puts one of the numbers where a number of eight or four bytes or a float may be.
pub fn numbers(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    if rng.below(3) == 0 {
        return bytes(rng, input, other);
    }
    let mut changed = input.to_vec();
    for _ in 0..1 + rng.below(2) {
        // The numbers are in front.
        let at = rng.below(changed.len().min(32));
        let number = *rng.choose(&NUMBERS);
        let float = *rng.choose(&[f32::NAN, f32::INFINITY, f32::MAX, -0.0, f32::MIN_POSITIVE]);
        let part = match rng.below(4) {
            0 => number.to_le_bytes().to_vec(),
            1 => (number as u32).to_le_bytes().to_vec(),
            2 => (number as u16).to_le_bytes().to_vec(),
            _ => float.to_le_bytes().to_vec(),
        };
        let at = if rng.below(2) == 0 { at / 8 * 8 } else { at };
        for (place, byte) in changed.iter_mut().skip(at).zip(part) {
            *place = byte;
        }
    }
    changed
}

/// Changes a text of JSON by its structure where it has one, otherwise by its bytes.
pub fn json(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    match serde_json::from_slice::<Value>(input) {
        Ok(mut value) if rng.below(4) > 0 => {
            for _ in 0..1 + rng.below(2) {
                change(rng, &mut value);
            }
            let text = value.to_string();
            match rng.below(8) {
                0 => twice(rng, text).into_bytes(),
                1 => bytes(rng, text.as_bytes(), other),
                _ => text.into_bytes(),
            }
        }
        _ => bytes(rng, input, other),
    }
}

/// A value that is like none that should stand there.
fn strange(rng: &mut Rng) -> Value {
    match rng.below(12) {
        0 => Value::Null,
        1 => json!(rng.below(2) == 0),
        2 => json!(rng.choose(&NUMBERS)),
        3 => json!(-(*rng.choose(&NUMBERS) as i64 >> 1)),
        4 => json!(*rng.choose(&[0.5, -0.5, 1e300, 1e39, 1e-320, f64::MIN_POSITIVE, 1.0])),
        5 => json!([]),
        6 => json!({}),
        7 => json!(*rng.choose(&TOKENS)),
        8 => json!([*rng.choose(&TOKENS), *rng.choose(&TOKENS)]),
        9 => json!({*rng.choose(&TOKENS): *rng.choose(&NUMBERS)}),
        10 => json!(*rng.choose(&[
            "all-linear",
            ".*",
            "q|v",
            "(?!v).*",
            "(a+)+(?=b)",
            "\\Z",
            "[[a]",
            "LORA",
            "lora"
        ])),
        _ => (0..rng.below(40)).fold(Value::Null, |inner, _| json!([inner])),
    }
}

/// Changes a place somewhere in `value`.
fn change(rng: &mut Rng, value: &mut Value) {
    let deeper = rng.below(4) > 0;
    match value {
        Value::Object(entries) if deeper && !entries.is_empty() => {
            let n = rng.below(entries.len());
            let key = entries.keys().nth(n).unwrap().clone();
            match rng.below(6) {
                0 => drop(entries.remove(&key)),
                1 => {
                    let entry = entries.remove(&key).unwrap();
                    let mut key = key;
                    let token = *rng.choose(&TOKENS);
                    let places: Vec<_> = key
                        .char_indices()
                        .map(|(place, _)| place)
                        .chain([key.len()])
                        .collect();
                    key.insert_str(*rng.choose(&places), token);
                    entries.insert(key, entry);
                }
                2 => drop(entries.insert(rng.choose(&TOKENS).to_string(), strange(rng))),
                _ => change(rng, &mut entries[&key]),
            }
        }
        Value::Array(items) if deeper && !items.is_empty() => {
            let n = rng.below(items.len());
            match rng.below(5) {
                0 => drop(items.remove(n)),
                1 => items.push(strange(rng)),
                _ => change(rng, &mut items[n]),
            }
        }
        value => *value = strange(rng),
    }
}

/// The text of an object with one of its first entries once more, with the same or another value.
fn twice(rng: &mut Rng, text: String) -> String {
    let Ok(Value::Object(entries)) = serde_json::from_str(&text) else {
        return text;
    };
    let n = rng.below(entries.len());
    let Some((key, value)) = entries.iter().nth(n) else {
        return text;
    };
    let value = if rng.below(2) == 0 {
        value.clone()
    } else {
        strange(rng)
    };
    text.replacen('{', &format!("{{{}:{value},", json!(key)), 1)
}

/// Changes a file of tensors: its header by the structure of that, with the length right again, or any bytes.
pub fn safetensors(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    let length = input
        .first_chunk()
        .map_or(u64::MAX, |length| u64::from_le_bytes(*length));
    let Some(header) = usize::try_from(length)
        .ok()
        .and_then(|n| input.get(8..)?.get(..n))
    else {
        return bytes(rng, input, other);
    };
    let values = &input[8 + header.len()..];
    match rng.below(8) {
        0 => bytes(rng, input, other),
        1 => {
            let number = *rng.choose(&NUMBERS);
            [&number.to_le_bytes(), header, values].concat()
        }
        2 => [&input[..8], header, &bytes(rng, values, other)].concat(),
        _ => {
            let header = json(rng, header, other);
            [&(header.len() as u64).to_le_bytes()[..], &header, values].concat()
        }
    }
}
