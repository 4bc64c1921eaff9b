//! Rows of one answer or none: demonstrations, judged answers, prompts alone.

use serde::de::{Deserializer, Error};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Text;
use super::fields::{Fields, same_form};

/// A prompt and the answer to learn: in JSON an object of the keys `prompt` and `completion`, both texts or both lists of messages, and perhaps `tools`.
/// Other keys are ignored.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Demonstration {
    /// What is answered.
    pub prompt: Text,
    /// The answer.
    pub completion: Text,
    /// The tools that a chat template writes into the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<Value>>,
}

impl<'de> Deserialize<'de> for Demonstration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut fields = Fields::deserialize(deserializer)?;
        let (prompt, completion) = answered(&mut fields)?;
        let tools = fields.tools()?;
        Ok(Self {
            prompt,
            completion,
            tools,
        })
    }
}

/// An answer that is desirable or not, without a second one to compare it with: in JSON an object of the keys `prompt`, `completion`
/// and `label`, a boolean (0 and 1 read too). Other keys are ignored.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Feedback {
    /// What is answered.
    pub prompt: Text,
    /// The answer.
    pub completion: Text,
    /// Whether the answer is desirable.
    pub label: bool,
    /// The tools that a chat template writes into the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<Value>>,
}

impl Feedback {
    /// A judged answer.
    pub fn new(prompt: impl Into<Text>, completion: impl Into<Text>, label: bool) -> Self {
        Self {
            prompt: prompt.into(),
            completion: completion.into(),
            label,
            tools: None,
        }
    }
}

impl<'de> Deserialize<'de> for Feedback {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut fields = Fields::deserialize(deserializer)?;
        let (prompt, completion) = answered(&mut fields)?;
        let label = match fields.need::<Value, D::Error>(&["label"])? {
            Value::Bool(label) => label,
            Value::Number(n) if n.as_f64() == Some(1.0) => true,
            Value::Number(n) if n.as_f64() == Some(0.0) => false,
            other => {
                return Err(D::Error::custom(format!(
                    "the key `label`: expected true or false, found {other}"
                )));
            }
        };
        Ok(Self {
            prompt,
            completion,
            label,
            tools: fields.tools()?,
        })
    }
}

/// A prompt whose answers the model samples, with what a reward wants to know about it.
///
/// In JSON an object of the key `prompt`, a text or a list of messages. All other keys are kept, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Prompt {
    /// What is to be answered.
    pub prompt: Text,
    /// All other fields of the row.
    #[serde(flatten)]
    pub columns: Map<String, Value>,
}

impl Prompt {
    /// A prompt without further fields.
    pub fn new(prompt: impl Into<Text>) -> Self {
        Self {
            prompt: prompt.into(),
            columns: Map::new(),
        }
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut fields = Fields::deserialize(deserializer)?;
        Ok(Self {
            prompt: fields.need(&["prompt"])?,
            columns: fields.rest(),
        })
    }
}

fn answered<E: Error>(fields: &mut Fields) -> Result<(Text, Text), E> {
    let prompt: Text = fields.need(&["prompt"])?;
    let completion: Text = fields.need(&["completion"])?;
    same_form(("prompt", &prompt), ("completion", &completion))?;
    Ok((prompt, completion))
}
