//! Rendering messages.

use std::ops::Range;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::python::is_space;
use super::{ChatTemplate, RenderOptions, TEMPLATE, failed, ordered, spans};
use crate::dataset::{ChatFormat, Message, Segment};
use crate::{PeftError, Result};

/// What transformers puts behind the last message to find it again.
const CONTINUED: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// The names under which a message's reasoning is passed; the first is that which templates read.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

impl ChatTemplate {
    /// Renders messages; each serialises as an object of `role`, `content` and what else the template reads. Keys of null are left out,
    /// as transformers leaves them out.
    ///
    /// # Errors
    ///
    /// [`PeftError::ChatTemplate`] when there are no messages, when the template refuses them or fails, when it does not end within its
    /// steps ([`with_fuel`](Self::with_fuel)), and when a message that is to be continued is not in the text.
    pub fn render<M: Serialize>(&self, messages: &[M], options: &RenderOptions) -> Result<String> {
        let mut messages = self.objects(messages)?;
        if !options.continue_final_message {
            return self.run(messages, options, false);
        }
        if options.add_generation_prompt {
            return Err(self.error("it cannot both continue the last message and begin a new one"));
        }
        let last = messages.last_mut().and_then(|last| last.get_mut("content"));
        let text = match last {
            Some(Value::String(text)) => Some(text),
            Some(Value::Array(parts)) => {
                parts
                    .iter_mut()
                    .rev()
                    .find_map(|part| match part.get_mut("text") {
                        Some(Value::String(text)) => Some(text),
                        _ => None,
                    })
            }
            _ => None,
        };
        if !self.source().contains("content") {
            return Err(self.error(
                "it does not read the `content` of messages, so that there is none to continue",
            ));
        }
        let Some(text) = text else {
            return Err(self.error("the last message has no text to continue"));
        };
        let content = text.trim_matches(is_space).to_owned();
        *text += CONTINUED;
        let mut rendered = self.run(messages, options, false)?;
        let tag = CONTINUED.trim_end();
        match rendered.rfind(tag) {
            Some(at) if rendered.contains(&content) => {
                let spaced = rendered[at..].starts_with(CONTINUED);
                rendered.truncate(at);
                if !spaced {
                    rendered.truncate(rendered.trim_end_matches(is_space).len());
                }
                Ok(rendered)
            }
            _ => Err(self.error(
                "the message to continue is not in the rendered text as it stands in the data",
            )),
        }
    }

    /// Renders messages, and says which bytes the assistant writes: the spans of the template's `{% generation %}` marks, or, where it has
    /// none, for each message of the assistant what stands between the rendering of the turns before it with the generation
    /// prompt and the rendering of the turns up to it. Such a span ends with the end-of-sequence token, if only white space follows.
    ///
    /// # Errors
    ///
    /// As [`render`](Self::render), and when these renderings are no beginnings of the whole one, for instance as the template
    /// changes earlier turns.
    pub fn render_spans<M: Serialize>(
        &self,
        messages: &[M],
        options: &RenderOptions,
    ) -> Result<(String, Vec<Range<usize>>)> {
        if options.continue_final_message {
            return Err(self.error(
                "a continued message has no spans of the assistant: it is given, not learned",
            ));
        }
        let objects = self.objects(messages)?;
        let whole = self.run(objects.clone(), options, false)?;
        if self.marked {
            let text = self.run(objects, options, true)?;
            let (text, spans) = spans::take(&text).ok_or_else(|| {
                self.error(format!(
                    "a text holds U+{:04X}, which is no character",
                    spans::START as u32
                ))
            })?;
            if text != whole {
                return Err(self.error("it changes the text of its own `generation` blocks, so that what the assistant says cannot be told"));
            }
            return Ok((whole, spans));
        }
        let mut found = Vec::new();
        for index in 0..objects.len() {
            if objects[index].get("role").and_then(Value::as_str) != Some("assistant") {
                continue;
            }
            let before = options.clone().with_generation_prompt(true);
            let before = self.prefix(&whole, index, objects[..index].to_vec(), &before)?;
            let up_to = options.clone().with_generation_prompt(false);
            let after = if index + 1 == objects.len() && !options.add_generation_prompt {
                whole.len()
            } else {
                self.prefix(&whole, index, objects[..=index].to_vec(), &up_to)?
            };
            if before > after {
                return Err(self.error(format!(
                    "message {index} of the assistant adds nothing to the prompt before it, so that what it says cannot be told"
                )));
            }
            found.push(before..self.turn_end(&whole, before, after));
        }
        Ok((whole, found))
    }

    /// The length of the rendering of some messages, which must begin the whole.
    fn prefix(
        &self,
        whole: &str,
        index: usize,
        messages: Vec<Map<String, Value>>,
        options: &RenderOptions,
    ) -> Result<usize> {
        let text = match messages.is_empty() {
            true => {
                return Err(self.error(
                    "the first message is the assistant's: nothing is before it to answer",
                ));
            }
            false => self.run(messages, options, false)?,
        };
        match whole.starts_with(&text) {
            true => Ok(text.len()),
            false => {
                let same = whole
                    .bytes()
                    .zip(text.bytes())
                    .take_while(|(a, b)| a == b)
                    .count();
                Err(self.error(format!(
                    "it renders the turns around message {index} of the assistant otherwise by themselves than in the whole conversation, from \
                     byte {same} on, so that what the assistant says cannot be told: mark it by `{{% generation %}}` in the template, or train \
                     on the last turn of each conversation only"
                )))
            }
        }
    }

    /// Where a turn of the assistant ends: with the end-of-sequence token, if only white space follows.
    fn turn_end(&self, whole: &str, start: usize, end: usize) -> usize {
        let Some(eos) = self.variables.get("eos_token").and_then(Value::as_str) else {
            return end;
        };
        match whole[start..end].rfind(eos).filter(|_| !eos.is_empty()) {
            Some(at) if whole[start + at + eos.len()..end].trim().is_empty() => {
                start + at + eos.len()
            }
            _ => end,
        }
    }

    /// Messages as objects, without keys of null and with reasoning under the names that templates read.
    fn objects<M: Serialize>(&self, messages: &[M]) -> Result<Vec<Map<String, Value>>> {
        if messages.is_empty() {
            return Err(self.error("there are no messages"));
        }
        let object = |(index, message)| match serde_json::to_value(message) {
            Ok(Value::Object(mut object)) => {
                object.retain(|_, value| !value.is_null());
                let reasoning = REASONING.iter().find_map(|key| object.get(*key)).cloned();
                if let Some(reasoning) = reasoning {
                    let mut aliased = Map::new();
                    aliased.insert("thinking".into(), reasoning.clone());
                    aliased.extend(object);
                    aliased.insert("reasoning_content".into(), reasoning);
                    object = aliased;
                }
                Ok(object)
            }
            Ok(other) => Err(self.error(format!("message {index} is {other}, not an object"))),
            Err(error) => Err(self.error(format!("message {index}: {error}"))),
        };
        messages.iter().enumerate().map(object).collect()
    }

    fn run(
        &self,
        messages: Vec<Map<String, Value>>,
        options: &RenderOptions,
        marks: bool,
    ) -> Result<String> {
        let mut context = self.variables.clone();
        context.insert(
            "messages".into(),
            messages.into_iter().map(Value::Object).collect(),
        );
        context.insert("tools".into(), json!(options.tools));
        context.insert("documents".into(), json!(options.documents));
        context.insert(
            "add_generation_prompt".into(),
            options.add_generation_prompt.into(),
        );
        context.insert(spans::SWITCH.into(), marks.into());
        let context = Value::Object(context);
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(
            self.fuel
                .saturating_add(16 * context.to_string().len() as u64),
        ));
        let template = environment.get_template(TEMPLATE);
        let rendered = template.and_then(|template| template.render(ordered::from_json(&context)));
        rendered.map_err(|error| failed(&self.name, &error))
    }

    fn error(&self, reason: impl Into<String>) -> PeftError {
        PeftError::ChatTemplate {
            name: self.name.clone(),
            reason: reason.into(),
        }
    }
}

impl ChatFormat for ChatTemplate {
    fn conversation(&self, messages: &[Message], tools: Option<&[Value]>) -> Result<Vec<Segment>> {
        let options = RenderOptions {
            tools: tools.map(<[Value]>::to_vec),
            ..RenderOptions::new()
        };
        let (text, spans) = self.render_spans(messages, &options)?;
        let mut segments = Vec::new();
        let mut at = 0;
        for span in spans {
            if at < span.start {
                segments.push(Segment::context(&text[at..span.start]));
            }
            if !span.is_empty() {
                segments.push(Segment::supervised(&text[span.clone()]));
            }
            at = span.end;
        }
        if at < text.len() {
            segments.push(Segment::context(&text[at..]));
        }
        Ok(segments)
    }

    fn prompt(&self, messages: &[Message], tools: Option<&[Value]>) -> Result<String> {
        let options = RenderOptions {
            add_generation_prompt: true,
            tools: tools.map(<[Value]>::to_vec),
            ..RenderOptions::new()
        };
        self.render(messages, &options)
    }
}
