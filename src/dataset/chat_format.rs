//! What turns messages into text: a template, with the spans that the assistant writes.

use serde_json::Value;

use super::{Message, Segment, Text, chatml, chatml_prompt};
use crate::{PeftError, Result};

/// Renders messages as the text that a model was trained on.
pub trait ChatFormat {
    /// A whole conversation. Supervised is what the assistant writes, with what ends its turn.
    ///
    /// # Errors
    ///
    /// When the format cannot hold these messages.
    fn conversation(&self, messages: &[Message], tools: Option<&[Value]>) -> Result<Vec<Segment>>;

    /// A conversation with the head of the assistant's next turn, for it to go on from.
    ///
    /// # Errors
    ///
    /// When the format cannot hold these messages.
    fn prompt(&self, messages: &[Message], tools: Option<&[Value]>) -> Result<String>;

    /// A prompt and the answer that follows it: the text of [`prompt`](Self::prompt), and the rest of the whole conversation.
    ///
    /// # Errors
    ///
    /// When the format cannot hold these messages, or the conversation does not begin with the prompt, so that training and use
    /// would see different contexts.
    fn answered(
        &self,
        prompt: &[Message],
        answer: &[Message],
        tools: Option<&[Value]>,
    ) -> Result<(String, Vec<Segment>)> {
        let head = self.prompt(prompt, tools)?;
        let whole = self.conversation(&[prompt, answer].concat(), tools)?;
        let answer = after(&head, whole)?;
        Ok((head, answer))
    }
}

/// What follows `head` in the segments.
fn after(head: &str, segments: Vec<Segment>) -> Result<Vec<Segment>> {
    let mut head = head;
    let mut rest = Vec::new();
    for segment in segments {
        let common = head.len().min(segment.text.len());
        if head.as_bytes()[..common] != segment.text.as_bytes()[..common] {
            return Err(not_a_prefix(head, &segment.text));
        }
        let (_, left) = segment.text.split_at(common);
        if !left.is_empty() {
            rest.push(Segment {
                text: left.into(),
                supervised: segment.supervised,
            });
        }
        head = &head[common..];
    }
    match head.is_empty() {
        true => Ok(rest),
        false => Err(not_a_prefix(head, "")),
    }
}

fn not_a_prefix(expected: &str, found: &str) -> PeftError {
    let begin = |text: &str| text.chars().take(40).collect::<String>();
    PeftError::config(
        "chat format",
        format!("{:?}", begin(found)),
        format!(
            "{:?}, with which the prompt goes on: the conversation must begin with its prompt as the model sees it in use",
            begin(expected)
        ),
    )
}

/// [`chatml`] as a format. Tools are refused, since ChatML itself has no place for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChatMl;

impl ChatMl {
    fn check(messages: &[Message], tools: Option<&[Value]>) -> Result<()> {
        if tools.is_some_and(|tools| !tools.is_empty()) {
            return Err(PeftError::config(
                "tools",
                "given",
                "none: ChatML has no form for tools; render with the model's own chat template",
            ));
        }
        match messages
            .iter()
            .find(|message| message.content.is_empty() && message.calls_tools())
        {
            None => Ok(()),
            Some(message) => Err(PeftError::config(
                format!("message of `{}`", message.role),
                "calls of tools without a text",
                "a text: ChatML has no form for calls of tools; render with the model's own chat template",
            )),
        }
    }
}

impl ChatFormat for ChatMl {
    fn conversation(&self, messages: &[Message], tools: Option<&[Value]>) -> Result<Vec<Segment>> {
        Self::check(messages, tools)?;
        Ok(chatml(messages))
    }

    fn prompt(&self, messages: &[Message], tools: Option<&[Value]>) -> Result<String> {
        Self::check(messages, tools)?;
        Ok(chatml_prompt(messages))
    }
}

/// The format of data that is all texts: messages are an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlainText;

impl PlainText {
    fn refused<T>() -> Result<T> {
        Err(PeftError::config(
            "chat format",
            "PlainText",
            "`ChatMl` or a chat template: the row is a conversation",
        ))
    }
}

impl ChatFormat for PlainText {
    fn conversation(&self, _: &[Message], _: Option<&[Value]>) -> Result<Vec<Segment>> {
        Self::refused()
    }

    fn prompt(&self, _: &[Message], _: Option<&[Value]>) -> Result<String> {
        Self::refused()
    }
}

/// A prompt as text, with the segments of an answer, and whether both are texts of the data as they stand.
pub(super) fn render(
    prompt: &Text,
    answer: &Text,
    tools: Option<&[Value]>,
    format: &dyn ChatFormat,
) -> Result<(String, Vec<Segment>, bool)> {
    match (prompt, answer) {
        (Text::Plain(prompt), Text::Plain(answer)) => {
            Ok((prompt.clone(), vec![Segment::supervised(answer)], true))
        }
        (Text::Messages(prompt), Text::Messages(answer)) => {
            let (prompt, answer) = format.answered(prompt, answer, tools)?;
            Ok((prompt, answer, false))
        }
        _ => Err(PeftError::config(
            "answer",
            "of another form than the prompt",
            "both texts or both messages",
        )),
    }
}
