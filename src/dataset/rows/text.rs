//! A prompt or an answer: a text, or messages that a chat template renders.

use serde::de::{Deserializer, Error};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dataset::Message;

/// A prompt or an answer as the data has it.
///
/// In JSON a string, a list of messages, or one message as an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(untagged)]
pub enum Text {
    /// A text, which the tokenizer sees as it stands.
    Plain(String),
    /// Turns of a conversation, which a template renders first.
    Messages(Vec<Message>),
}

impl Text {
    /// Whether there is nothing to learn from it: no text, or no message with a text or a call of a tool.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Plain(text) => text.is_empty(),
            Self::Messages(messages) => messages.iter().all(Message::is_empty),
        }
    }

    /// The text, if it is one.
    pub fn plain(&self) -> Option<&str> {
        match self {
            Self::Plain(text) => Some(text),
            Self::Messages(_) => None,
        }
    }

    /// The messages, if it has the form of a conversation.
    pub fn messages(&self) -> Option<&[Message]> {
        match self {
            Self::Plain(_) => None,
            Self::Messages(messages) => Some(messages),
        }
    }

    /// The form in words, for errors.
    pub(super) fn form(&self) -> &'static str {
        match self {
            Self::Plain(_) => "a text",
            Self::Messages(_) => "a list of messages",
        }
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self::Plain(text.into())
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self::Plain(text)
    }
}

impl From<Vec<Message>> for Text {
    fn from(messages: Vec<Message>) -> Self {
        Self::Messages(messages)
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(text) => Ok(Self::Plain(text)),
            Value::Array(messages) => {
                let message = |(index, message)| {
                    Message::deserialize::<Value>(message)
                        .map_err(|error| D::Error::custom(format!("message {index}: {error}")))
                };
                let messages: Result<_, _> =
                    messages.into_iter().enumerate().map(message).collect();
                Ok(Self::Messages(messages?))
            }
            message @ Value::Object(_) => {
                let message = Message::deserialize(message).map_err(D::Error::custom)?;
                Ok(Self::Messages(vec![message]))
            }
            other => Err(D::Error::custom(format!(
                "expected a text or a list of messages, found {}",
                kind(&other)
            ))),
        }
    }
}

/// The type of a JSON value with its article.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
