//! ChatML: turns of a conversation between `<|im_start|>` and `<|im_end|>`, learned where the assistant speaks.
//!
//! ```text
//! <|im_start|>user
//! What is the capital of France?<|im_end|>
//! <|im_start|>assistant
//! Paris.<|im_end|>
//! ```
//!
//! The form of [OpenAI's ChatML](https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md), which Qwen,
//! SmolLM2 and others speak. The markers are meant to be special tokens of the tokenizer; text of a message that spells
//! a marker is not escaped. Nothing is added: where a model's own template puts a system message before conversations
//! that have none (SmolLM2: "You are a helpful AI assistant named SmolLM, trained by Hugging Face"), so must the caller.

use std::fmt;

use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

use super::instruction::in_key;
use super::{Instruction, Segment};

const START: &str = "<|im_start|>";
const END: &str = "<|im_end|>";
const ASSISTANT: &str = "assistant";
const TOOL_CALLS: &str = "tool_calls";

/// One turn of a conversation.
///
/// In JSON an object of these two keys, as OpenAI has it, or of `from` and `value`, as ShareGPT has it; there `human` reads
/// as `user` and `gpt` as `assistant`. Other keys are kept for chat templates. A message that calls tools, by the key `tool_calls`, needs
/// no text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the model knows.
    pub role: String,
    /// The text. Where the message calls tools it may be empty, and is then left out when the message is written.
    pub content: String,
    /// All other keys that are not null, such as `tool_calls`, `name` and `reasoning_content`. [`chatml`] does not write them.
    pub extra: Map<String, Value>,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            extra: Map::new(),
        }
    }

    /// Whether it calls tools.
    pub fn calls_tools(&self) -> bool {
        self.extra.contains_key(TOOL_CALLS)
    }

    /// Whether it has neither a text nor a call of a tool.
    pub fn is_empty(&self) -> bool {
        self.content.is_empty() && !self.calls_tools()
    }
}

/// A conversation: in JSON an object with the key `messages`, as OpenAI has it, or `conversations`, as ShareGPT has it, and perhaps with
/// `tools`, the descriptions of functions that the model may call. Other keys are ignored.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Conversation {
    /// Its turns.
    #[serde(alias = "conversations")]
    pub messages: Vec<Message>,
    /// The tools that a chat template writes into the prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<Value>>,
}

impl Conversation {
    /// A conversation without tools.
    pub fn new(messages: Vec<Message>) -> Self {
        Self {
            messages,
            tools: None,
        }
    }
}

impl Serialize for Message {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("role", &self.role)?;
        if !self.content.is_empty() || !self.extra.contains_key(TOOL_CALLS) {
            map.serialize_entry("content", &self.content)?;
        }
        for (key, value) in &self.extra {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Turn;

        impl<'de> Visitor<'de> for Turn {
            type Value = Message;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object with `role` and `content`, or `from` and `value`")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Message, A::Error> {
                let (mut role, mut content) = (None, None);
                let mut extra = Map::new();
                let mut null = None;
                while let Some(key) = map.next_key::<String>()? {
                    let part = match key.as_str() {
                        "role" | "from" => &mut role,
                        "content" | "value" => &mut content,
                        _ => {
                            let value: Value = map.next_value()?;
                            if extra.contains_key(&key) {
                                return Err(A::Error::custom(format!("`{key}` stands twice")));
                            }
                            if !value.is_null() {
                                extra.insert(key, value);
                            }
                            continue;
                        }
                    };
                    if part.is_some() {
                        let error = format!("`{key}` stands twice, or beside what means the same");
                        return Err(A::Error::custom(error));
                    }
                    let text: Option<String> = map
                        .next_value()
                        .map_err(|error| A::Error::custom(in_key(&key, &error)))?;
                    let text = match text {
                        None => {
                            null = Some(key);
                            continue;
                        }
                        Some(text) => text,
                    };
                    *part = Some(match (key.as_str(), text.as_str()) {
                        ("from", "human") => "user".to_owned(),
                        ("from", "gpt") => ASSISTANT.to_owned(),
                        _ => text,
                    });
                }
                let error = match null {
                    Some(key) => format!(
                        "the key `{key}` is null: only a message with `{TOOL_CALLS}` may lack a text"
                    ),
                    None => String::new(),
                };
                let missing = |field: &str| match error.is_empty() {
                    true => A::Error::custom(format!("missing field `{field}` of a message")),
                    false => A::Error::custom(&error),
                };
                let role = role.ok_or_else(|| missing("role"))?;
                let content = match content {
                    None if extra.contains_key(TOOL_CALLS) => String::new(),
                    content => content.ok_or_else(|| missing("content"))?,
                };
                Ok(Message {
                    role,
                    content,
                    extra,
                })
            }
        }

        deserializer.deserialize_map(Turn)
    }
}

impl Instruction {
    /// The triple as a user's turn and the assistant's answer; an input follows the instruction after a blank line.
    pub fn messages(&self) -> Vec<Message> {
        let Self {
            instruction, input, ..
        } = self;
        let question = if input.is_empty() {
            instruction.clone()
        } else {
            format!("{instruction}\n\n{input}")
        };
        vec![
            Message::new("user", question),
            Message::new(ASSISTANT, &self.response),
        ]
    }
}

/// Renders a conversation. Supervised is what the assistant says, with the `<|im_end|>` that ends its turn.
///
/// Roles and texts alone are written. Calls of tools need the model's own template.
pub fn chatml(messages: &[Message]) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut context = String::new();
    for Message { role, content, .. } in messages {
        context += &format!("{START}{role}\n");
        if role == ASSISTANT {
            segments.push(Segment::context(std::mem::take(&mut context)));
            segments.push(Segment::supervised(format!("{content}{END}")));
            context += "\n";
        } else {
            context += &format!("{content}{END}\n");
        }
    }
    if !context.is_empty() {
        segments.push(Segment::context(context));
    }
    segments
}

/// Renders a conversation and the head of the assistant's next turn, for generation.
pub fn chatml_prompt(messages: &[Message]) -> String {
    let segments = chatml(messages);
    let mut text: String = segments.into_iter().map(|segment| segment.text).collect();
    text += &format!("{START}{ASSISTANT}\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_assistants_turns_alone_are_supervised() {
        let messages = [
            Message::new("system", "Be brief."),
            Message::new("user", "1+1?"),
            Message::new("assistant", "2"),
            Message::new("user", "2+2?"),
            Message::new("assistant", "4"),
        ];
        let segments = chatml(&messages);
        assert_eq!(
            segments,
            [
                Segment::context(
                    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
                ),
                Segment::supervised("2<|im_end|>"),
                Segment::context("\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"),
                Segment::supervised("4<|im_end|>"),
                Segment::context("\n"),
            ]
        );
    }

    #[test]
    fn conversations_of_either_form_are_read() {
        let expected = Conversation {
            messages: vec![
                Message::new("system", "s"),
                Message::new("user", "1+1?"),
                Message::new("assistant", "2"),
            ],
            tools: None,
        };
        let sharegpt = r#"{"id": "x", "conversations": [{"from": "system", "value": "s"},
            {"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2", "weight": null}]}"#;
        let openai = r#"{"messages": [{"role": "system", "content": "s"},
            {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}"#;
        for json in [sharegpt, openai] {
            let found: Conversation = serde_json::from_str(json).unwrap();
            assert_eq!(found, expected);
            let json = serde_json::to_string(&found).unwrap();
            assert_eq!(
                serde_json::from_str::<Conversation>(&json).unwrap(),
                expected
            );
        }
        for (json, named) in [
            (r#"{"role": "user"}"#, "missing field `content`"),
            (r#"{"role": "user", "content": null}"#, "`content` is null"),
            (
                r#"{"role": "user", "content": [{"type": "text"}]}"#,
                "the key `content`: invalid type: sequence",
            ),
            (
                r#"{"role": "user", "from": "human", "value": "x"}"#,
                "`from` stands twice",
            ),
        ] {
            let error = serde_json::from_str::<Message>(json)
                .unwrap_err()
                .to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_prompt_is_what_training_put_before_the_answer() {
        let triple = Instruction {
            instruction: "Add.".into(),
            input: "1 and 2".into(),
            response: "3".into(),
        };
        let messages = triple.messages();
        assert_eq!(
            chatml_prompt(&messages[..1]),
            "<|im_start|>user\nAdd.\n\n1 and 2<|im_end|>\n<|im_start|>assistant\n"
        );
        assert_eq!(chatml_prompt(&messages[..1]), chatml(&messages)[0].text);
    }
}
