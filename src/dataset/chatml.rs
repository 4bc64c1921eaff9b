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

use serde::{Deserialize, Serialize};

use super::{Instruction, Segment};

const START: &str = "<|im_start|>";
const END: &str = "<|im_end|>";
const ASSISTANT: &str = "assistant";

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the model knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
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
pub fn chatml(messages: &[Message]) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut context = String::new();
    for Message { role, content } in messages {
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
