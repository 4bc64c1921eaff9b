//! Two answers to one prompt. One of them is preferred.

use serde::de::{Deserializer, Error};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Text;
use super::fields::{Fields, same_form};
use crate::dataset::Message;

/// A prompt, the answer that is preferred and the one that is not.
///
/// In JSON an object of the keys `prompt`, `chosen`, `rejected` and perhaps `margin` and `tools`; other keys are ignored. All three are texts, or
/// all three have the form of conversations. ShareGPT's name of the prompt, `conversations`, reads too.
///
/// **Implicit prompts.** Where `prompt` is missing and the answers are conversations, the messages with which both begin are the
/// prompt. The same where the prompt is a text and both answers repeat it as their first message of a user, as UltraFeedback has it.
/// An implicit prompt of texts is refused: texts agree in the middle of a word, as "It is blue" and "It is black" do up to "It is bl".
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Preference {
    /// What both answer.
    pub prompt: Text,
    /// The preferred answer.
    pub chosen: Text,
    /// The other answer.
    pub rejected: Text,
    /// By how much the one is better than the other, in units of reward; finite.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub margin: Option<f64>,
    /// The tools that a chat template writes into the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<Value>>,
}

impl Preference {
    /// A pair without a margin.
    pub fn new(
        prompt: impl Into<Text>,
        chosen: impl Into<Text>,
        rejected: impl Into<Text>,
    ) -> Self {
        Self {
            prompt: prompt.into(),
            chosen: chosen.into(),
            rejected: rejected.into(),
            margin: None,
            tools: None,
        }
    }

    /// The pair as two rows without a pair: the preferred answer is desirable, the other is not.
    pub fn unpair(self) -> [super::Feedback; 2] {
        let tools = self.tools;
        let feedback = |prompt, completion, label| super::Feedback {
            prompt,
            completion,
            label,
            tools: tools.clone(),
        };
        [
            feedback(self.prompt.clone(), self.chosen, true),
            feedback(self.prompt, self.rejected, false),
        ]
    }
}

impl<'de> Deserialize<'de> for Preference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut fields = Fields::deserialize(deserializer)?;
        let prompt = fields.take::<Text, D::Error>(&["prompt", "conversations"])?;
        let chosen: Text = fields.need(&["chosen"])?;
        let rejected: Text = fields.need(&["rejected"])?;
        let margin = fields.number("margin")?;
        let tools = fields.tools()?;
        same_form(("chosen", &chosen), ("rejected", &rejected))?;
        let (prompt, chosen, rejected) = match (prompt, chosen, rejected) {
            (None, Text::Messages(chosen), Text::Messages(rejected)) => {
                split(chosen, rejected).map_err(D::Error::custom)?
            }
            (None, ..) => {
                return Err(D::Error::custom(
                    "missing field `prompt`: where two texts begin to differ is no end of a prompt, as they may agree in the middle of \
                     a word. Write the prompt into a field of its own, or make `chosen` and `rejected` lists of messages",
                ));
            }
            (Some((_, Text::Plain(prompt))), Text::Messages(chosen), Text::Messages(rejected)) => {
                let (common, chosen, rejected) = split(chosen, rejected).map_err(|reason| {
                    D::Error::custom(format!("`prompt` is a text, `chosen` and `rejected` are lists of messages, and {reason}"))
                })?;
                match common.messages() {
                    Some([.., last]) if last.role == "user" && last.content == prompt => {}
                    _ => {
                        return Err(D::Error::custom(
                            "`prompt` is a text, and `chosen` and `rejected` are lists of messages that do not begin with it as the message \
                             of a user: make `prompt` a list of messages, or leave it out where both answers begin with it",
                        ));
                    }
                }
                (common, chosen, rejected)
            }
            (Some((name, prompt)), chosen, rejected) => {
                same_form((name, &prompt), ("chosen", &chosen))?;
                (prompt, chosen, rejected)
            }
        };
        Ok(Self {
            prompt,
            chosen,
            rejected,
            margin,
            tools,
        })
    }
}

/// Splits both into the messages with which they begin alike and the rest of each.
fn split(
    mut chosen: Vec<Message>,
    mut rejected: Vec<Message>,
) -> Result<(Text, Text, Text), String> {
    let pairs = chosen.iter().zip(&rejected);
    let common = pairs.take_while(|(a, b)| a == b).count();
    if common == 0 {
        return Err("`chosen` and `rejected` have no first message in common, which would be the prompt: give a field `prompt`".into());
    }
    if common == chosen.len() && common == rejected.len() {
        return Err(
            "`chosen` and `rejected` are the same messages: there is nothing to prefer".into(),
        );
    }
    if common == chosen.len().min(rejected.len()) {
        let short = if chosen.len() < rejected.len() {
            "chosen"
        } else {
            "rejected"
        };
        return Err(format!(
            "the other answer begins with all messages of `{short}`, so that nothing is left of it as an answer: give a field `prompt`"
        ));
    }
    let (a, b) = (chosen.split_off(common), rejected.split_off(common));
    Ok((Text::Messages(chosen), Text::Messages(a), Text::Messages(b)))
}
