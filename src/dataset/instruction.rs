//! The unit of instruction data: what is asked, what about, and the answer to learn.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

/// One (instruction, input, response) triple.
///
/// In JSON an object of these three keys; `input` may be missing or null, `output` (Alpaca's word) reads as `response`, and
/// other keys are ignored. [`InstructionKeys`] reads objects of other keys.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Instruction {
    /// The task, in words.
    pub instruction: String,
    /// What the task is about; empty where the instruction says it all.
    pub input: String,
    /// The answer to learn.
    pub response: String,
}

/// What the keys of a triple are called in JSON, for [`read_instructions`](super::read_instructions).
///
/// ```
/// # fn main() -> burn_peft::Result<()> {
/// use burn_peft::dataset::{InstructionKeys, parse_instructions};
///
/// let keys = InstructionKeys::new().with_instruction("question").with_response("answer");
/// let line = br#"{"question": "1 + 1?", "answer": "2"}"#;
/// let data = parse_instructions(&line[..], "data.jsonl", &keys)?;
/// assert_eq!(data[0].response, "2");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InstructionKeys {
    /// The task. Default: `instruction`.
    pub instruction: Vec<String>,
    /// What it is about; may be missing or null. Default: `input`.
    pub input: Vec<String>,
    /// The answer. Default: `response` or `output`.
    pub response: Vec<String>,
}

impl Default for InstructionKeys {
    fn default() -> Self {
        Self {
            instruction: vec!["instruction".into()],
            input: vec!["input".into()],
            response: vec!["response".into(), "output".into()],
        }
    }
}

impl InstructionKeys {
    /// Those of [`Instruction`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls the task `key`.
    pub fn with_instruction(mut self, key: impl Into<String>) -> Self {
        self.instruction = vec![key.into()];
        self
    }

    /// Calls what the task is about `key`.
    pub fn with_input(mut self, key: impl Into<String>) -> Self {
        self.input = vec![key.into()];
        self
    }

    /// Calls the answer `key`.
    pub fn with_response(mut self, key: impl Into<String>) -> Self {
        self.response = vec![key.into()];
        self
    }
}

impl<'de> Deserialize<'de> for Instruction {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        InstructionKeys::default().deserialize(deserializer)
    }
}

impl<'de> DeserializeSeed<'de> for &InstructionKeys {
    type Value = Instruction;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Instruction, D::Error> {
        deserializer.deserialize_map(Triple(self))
    }
}

impl<'de> DeserializeSeed<'de> for InstructionKeys {
    type Value = Instruction;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Instruction, D::Error> {
        (&self).deserialize(deserializer)
    }
}

struct Triple<'a>(&'a InstructionKeys);

impl<'de> Visitor<'de> for Triple<'_> {
    type Value = Instruction;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "an object with `{}` and `{}`",
            self.0.instruction.join("` or `"),
            self.0.response.join("` or `")
        )
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Instruction, A::Error> {
        let Self(keys) = self;
        let parts = [&keys.instruction, &keys.input, &keys.response];
        // Under which key a part was found, and its text.
        let mut found: [Option<(String, Option<String>)>; 3] = [None, None, None];
        while let Some(key) = map.next_key::<String>()? {
            let Some(part) = parts.iter().position(|names| names.contains(&key)) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if let Some((other, _)) = &found[part] {
                return Err(A::Error::custom(match *other == key {
                    true => format!("the key `{key}` stands twice"),
                    false => format!("both `{other}` and `{key}`, which mean the same"),
                }));
            }
            let text = map
                .next_value()
                .map_err(|error| A::Error::custom(in_key(&key, &error)))?;
            found[part] = Some((key, text));
        }
        let mut texts = found
            .into_iter()
            .zip(parts)
            .map(|(found, names)| match found {
                Some((_, Some(text))) => Ok(text),
                Some((key, None)) => Err(A::Error::custom(format!(
                    "the key `{key}` is null: expected a text"
                ))),
                None => Err(A::Error::custom(format!("missing field `{}`", names[0]))),
            });
        let mut next = || texts.next().expect("three parts");
        let (instruction, input, response) = (next(), next(), next());
        Ok(Instruction {
            instruction: instruction?,
            // Missing or null, it is empty.
            input: input.unwrap_or_default(),
            response: response?,
        })
    }
}

/// An error about the value of a key, without the place in the text, which is added again.
pub(super) fn in_key(key: &str, error: &impl fmt::Display) -> String {
    let error = error.to_string();
    let error = error.split(" at line ").next().unwrap_or_default();
    format!("the key `{key}`: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(json: &str) -> String {
        let error = serde_json::from_str::<Instruction>(json).unwrap_err();
        error.to_string()
    }

    #[test]
    fn the_keys_of_alpaca_read_too() {
        let alpaca = r#"{"instruction": "a", "output": "c", "text": "ignored"}"#;
        let ours = r#"{"instruction":"a","input":"","response":"c"}"#;
        let triple: Instruction = serde_json::from_str(alpaca).unwrap();
        assert_eq!(serde_json::to_string(&triple).unwrap(), ours);
        assert_eq!(serde_json::from_str::<Instruction>(ours).unwrap(), triple);
    }

    #[test]
    fn an_input_of_null_is_empty_and_nothing_else_may_be_null() {
        let json = r#"{"instruction": "a", "input": null, "output": "c"}"#;
        assert_eq!(serde_json::from_str::<Instruction>(json).unwrap().input, "");
        let found = error(r#"{"instruction": "a", "output": null}"#);
        assert!(found.contains("the key `output` is null"), "{found}");
    }

    #[test]
    fn a_triple_without_response_is_an_error() {
        let found = error(r#"{"instruction": "a"}"#);
        assert!(found.contains("missing field `response`"), "{found}");
    }

    #[test]
    fn what_is_no_text_or_stands_twice_is_named_with_its_key() {
        for (json, named) in [
            (
                r#"{"instruction": "a", "output": 42}"#,
                "the key `output`: invalid type: integer `42`, expected a string",
            ),
            (
                r#"{"instruction": ["a"], "output": "b"}"#,
                "the key `instruction`: invalid type: sequence",
            ),
            (
                r#"{"instruction": "a", "instruction": "b", "output": "c"}"#,
                "the key `instruction` stands twice",
            ),
            (
                r#"{"instruction": "a", "output": "b", "response": "c"}"#,
                "both `output` and `response`",
            ),
            (
                "[1]",
                "expected an object with `instruction` and `response` or `output`",
            ),
        ] {
            let found = error(json);
            assert!(found.contains(named), "{found}");
        }
        assert!(error(r#"{"instruction": "a", "output": 42}"#).contains("column 3"));
    }
}
