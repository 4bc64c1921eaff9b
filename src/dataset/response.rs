//! A prompt and the answers to it as tokens: one encoding of the prompt, limits that never leave an answer empty.

use std::error::Error;

use serde_json::Value;

use super::chat_format::render;
use super::example::encoded;
use super::response_example::Boundary;
use super::{
    ChatFormat, Conversation, Demonstration, Example, Feedback, FeedbackExample, Preference,
    PreferenceExample, Prompt, ResponseExample, RowFault, Segment, Text, TokenizeConfig,
    Truncation,
};
use crate::{PeftError, Result};

impl TokenizeConfig {
    /// Tokenises a pair. Both answers follow the same tokens of the prompt, which is encoded once.
    ///
    /// A [`Text::Plain`] answer gets the end-of-sequence token, supervised; an answer of messages ends as `format` ends it. The
    /// beginning-of-sequence token is put first unless the encoded prompt begins with it already.
    ///
    /// Where prompt and an answer have more than `max_tokens`, [`Truncation`] decides, and never leaves an answer empty:
    ///
    /// - `Refuse`: an error.
    /// - `KeepStart`: the end of the answer goes, and with it the end-of-sequence token. A prompt that fills the limit is an error.
    /// - `KeepEnd`: the beginning of the prompt goes, as much for both answers. An answer that leaves no room for a token of the prompt
    ///   is an error.
    ///
    /// `encode` gives the tokens of a text and must add none of its own at either end. It is also called with each joined text, to
    /// find whether the tokenizer merges across the boundary ([`ResponseExample::boundary`]).
    ///
    /// # Errors
    ///
    /// [`PeftError::UnfitRow`] for what cannot be trained on: an answer without a text, answers of the same tokens, lengths beyond the
    /// limit, nothing before the answer. [`PeftError::Tokenizer`] when `encode` fails, [`PeftError::NotFinite`] for the margin, and what `format` says.
    pub fn tokenize_preference<E: Into<Box<dyn Error + Send + Sync>>>(
        &self,
        row: &Preference,
        format: &dyn ChatFormat,
        encode: impl FnMut(&str) -> Result<Vec<u32>, E>,
    ) -> Result<PreferenceExample> {
        if let Some(margin) = row.margin.filter(|margin| !(*margin as f32).is_finite()) {
            return Err(PeftError::NotFinite {
                tensor: "margin".into(),
                index: 0,
                value: margin as f32,
            });
        }
        let answers = [("chosen", &row.chosen), ("rejected", &row.rejected)];
        let [chosen, rejected] =
            self.answers((&row.prompt, row.tools.as_deref()), answers, format, encode)?;
        Ok(PreferenceExample {
            chosen,
            rejected,
            margin: row.margin.map(|margin| margin as f32),
        })
    }

    /// Tokenises an answer with its label, as [`tokenize_preference`](Self::tokenize_preference) does a pair.
    ///
    /// # Errors
    ///
    /// As [`tokenize_preference`](Self::tokenize_preference).
    pub fn tokenize_feedback<E: Into<Box<dyn Error + Send + Sync>>>(
        &self,
        row: &Feedback,
        format: &dyn ChatFormat,
        encode: impl FnMut(&str) -> Result<Vec<u32>, E>,
    ) -> Result<FeedbackExample> {
        let answers = [("completion", &row.completion)];
        let [answer] =
            self.answers((&row.prompt, row.tools.as_deref()), answers, format, encode)?;
        Ok(FeedbackExample {
            answer,
            label: row.label,
        })
    }

    /// Tokenises a prompt with its answer, as [`tokenize_preference`](Self::tokenize_preference) does a pair.
    ///
    /// # Errors
    ///
    /// As [`tokenize_preference`](Self::tokenize_preference).
    pub fn tokenize_demonstration<E: Into<Box<dyn Error + Send + Sync>>>(
        &self,
        row: &Demonstration,
        format: &dyn ChatFormat,
        encode: impl FnMut(&str) -> Result<Vec<u32>, E>,
    ) -> Result<ResponseExample> {
        let answers = [("completion", &row.completion)];
        let [answer] =
            self.answers((&row.prompt, row.tools.as_deref()), answers, format, encode)?;
        Ok(answer)
    }

    /// Tokenises a conversation: supervised is what `format` says the assistant writes. No end-of-sequence token is added: `format`
    /// writes what ends a turn.
    ///
    /// # Errors
    ///
    /// As [`tokenize`](Self::tokenize), and what `format` says.
    pub fn tokenize_conversation<E: Into<Box<dyn Error + Send + Sync>>>(
        &self,
        row: &Conversation,
        format: &dyn ChatFormat,
        mut encode: impl FnMut(&str) -> Result<Vec<u32>, E>,
    ) -> Result<Example> {
        let segments = format.conversation(&row.messages, row.tools.as_deref())?;
        let mut config = self.clone();
        config.eos = None;
        if let (Some(bos), Some(first)) = (self.bos, segments.first())
            && encoded(&first.text, &mut encode)?.first() == Some(&bos)
        {
            config.bos = None;
        }
        config.tokenize(&segments, encode)
    }

    /// Tokenises a prompt for generation: the tokens that training puts before an answer. A list in the column `tools` goes into a prompt
    /// of messages.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnfitRow`] for a prompt without tokens, or of more than `max_tokens`; [`Truncation::KeepEnd`] cuts its beginning
    /// instead, [`Truncation::KeepStart`] its end. [`PeftError::Tokenizer`] when `encode` fails, and what `format` says.
    pub fn tokenize_prompt<E: Into<Box<dyn Error + Send + Sync>>>(
        &self,
        row: &Prompt,
        format: &dyn ChatFormat,
        mut encode: impl FnMut(&str) -> Result<Vec<u32>, E>,
    ) -> Result<Vec<u32>> {
        let text = match &row.prompt {
            Text::Plain(text) => text.clone(),
            Text::Messages(messages) => {
                let tools = row.columns.get("tools").and_then(Value::as_array);
                format.prompt(messages, tools.map(Vec::as_slice))?
            }
        };
        let (mut tokens, bos) = self.prompt(&text, &mut encode)?;
        let limit = self.max_tokens.unwrap_or(usize::MAX);
        if tokens.len() > limit {
            match self.truncation {
                Truncation::KeepStart if limit > bos => tokens.truncate(limit),
                Truncation::KeepEnd if limit > bos => {
                    tokens.drain(bos..tokens.len() - (limit - bos));
                }
                _ => {
                    let tokens = tokens.len();
                    return Err(unfit("prompt", RowFault::PromptTooLong { tokens, limit }));
                }
            }
        }
        Ok(tokens)
    }

    /// The tokens of a prompt, and how many of them are the beginning-of-sequence token.
    fn prompt<E: Into<Box<dyn Error + Send + Sync>>>(
        &self,
        text: &str,
        encode: &mut impl FnMut(&str) -> Result<Vec<u32>, E>,
    ) -> Result<(Vec<u32>, usize)> {
        let mut tokens = encoded(text, encode)?;
        self.begin(&mut tokens);
        if tokens.is_empty() {
            return Err(unfit("prompt", RowFault::EmptyPrompt));
        }
        Ok((tokens, usize::from(self.bos.is_some())))
    }

    /// Puts the beginning-of-sequence token first, unless it is there.
    fn begin(&self, tokens: &mut Vec<u32>) {
        if let Some(bos) = self.bos
            && tokens.first() != Some(&bos)
        {
            tokens.insert(0, bos);
        }
    }

    /// Tokenises `N` answers to one prompt.
    fn answers<const N: usize, E: Into<Box<dyn Error + Send + Sync>>>(
        &self,
        (prompt, tools): (&Text, Option<&[Value]>),
        answers: [(&'static str, &Text); N],
        format: &dyn ChatFormat,
        mut encode: impl FnMut(&str) -> Result<Vec<u32>, E>,
    ) -> Result<[ResponseExample; N]> {
        let mut rendered = Vec::with_capacity(N);
        for (field, answer) in answers {
            if answer.is_empty() {
                return Err(unfit(field, RowFault::EmptyAnswer));
            }
            rendered.push((field, render(prompt, answer, tools, format)?));
        }
        let text = rendered[0].1.0.clone();
        let (mut prompt, bos) = self.prompt(&text, &mut encode)?;
        let mut parts = Vec::with_capacity(N);
        for (field, (other, segments, plain)) in rendered {
            if other != text {
                return Err(PeftError::config(
                    "chat format",
                    "another prompt before each answer",
                    "the same prompt before both answers",
                ));
            }
            let before = (&text[..], &prompt[..]);
            parts.push(self.part(field, &segments, plain, before, &mut encode)?);
        }
        self.fit(&mut prompt, bos, &mut parts)?;
        if let [first, others @ ..] = &parts[..]
            && others.iter().any(|other| other.tokens == first.tokens)
        {
            return Err(unfit(first.field, RowFault::SameAnswers));
        }
        let mut made = Vec::with_capacity(N);
        for part in parts {
            if !part.supervised.contains(&true) {
                return Err(unfit(part.field, RowFault::NothingSupervised));
            }
            let supervised = [vec![false; prompt.len()], part.supervised].concat();
            made.push(ResponseExample {
                example: Example::new([&prompt[..], &part.tokens].concat(), supervised)?,
                prompt_len: prompt.len(),
                boundary: part.boundary,
                cut: part.cut,
            });
        }
        let Ok(made) = made.try_into() else {
            unreachable!("one of each answer")
        };
        Ok(made)
    }

    /// Tokenises one answer; `before` is the prompt, as text and as tokens.
    fn part<E: Into<Box<dyn Error + Send + Sync>>>(
        &self,
        field: &'static str,
        segments: &[Segment],
        plain: bool,
        (text, prompt): (&str, &[u32]),
        encode: &mut impl FnMut(&str) -> Result<Vec<u32>, E>,
    ) -> Result<Part> {
        let mut part = Part {
            field,
            tokens: Vec::new(),
            supervised: Vec::new(),
            boundary: Boundary::Clean,
            cut: false,
        };
        for segment in segments.iter().filter(|segment| !segment.text.is_empty()) {
            let tokens = encoded(&segment.text, encode)?;
            if part.tokens.is_empty() {
                let mut joined = encoded(&format!("{text}{}", segment.text), encode)?;
                self.begin(&mut joined);
                if [prompt, &tokens].concat() != joined {
                    part.boundary = Boundary::Merged;
                }
            }
            part.tokens.extend(tokens);
            part.supervised
                .resize(part.tokens.len(), segment.supervised);
        }
        if part.tokens.is_empty() {
            return Err(unfit(field, RowFault::EmptyAnswer));
        }
        if plain
            && let Some(eos) = self.eos
            && part.tokens.last() != Some(&eos)
        {
            part.tokens.push(eos);
            part.supervised.push(true);
        }
        Ok(part)
    }

    /// Cuts what is beyond the limit, as far as [`Truncation`] allows.
    fn fit(&self, prompt: &mut Vec<u32>, bos: usize, parts: &mut [Part]) -> Result<()> {
        let limit = self.max_tokens.unwrap_or(usize::MAX);
        let Some(longest) = parts.iter().max_by_key(|part| part.tokens.len()) else {
            return Ok(());
        };
        let (field, answer) = (longest.field, longest.tokens.len());
        let tokens = prompt.len() + answer;
        if tokens <= limit {
            return Ok(());
        }
        match self.truncation {
            // A prompt that leaves no room for an answer is the prompt's fault.
            Truncation::Refuse | Truncation::KeepStart if prompt.len() >= limit => {
                let tokens = prompt.len();
                Err(unfit("prompt", RowFault::PromptTooLong { tokens, limit }))
            }
            Truncation::Refuse => Err(unfit(field, RowFault::TooLong { tokens, limit })),
            Truncation::KeepStart => {
                let room = limit - prompt.len();
                for part in parts.iter_mut().filter(|part| part.tokens.len() > room) {
                    part.tokens.truncate(room);
                    part.supervised.truncate(room);
                    part.cut = true;
                }
                Ok(())
            }
            Truncation::KeepEnd => {
                // A token of the prompt besides the beginning-of-sequence token stays, if there is one.
                let least = (bos + 1).min(prompt.len());
                if answer + least > limit {
                    return Err(unfit(field, RowFault::TooLong { tokens, limit }));
                }
                prompt.drain(bos..bos + tokens - limit);
                parts.iter_mut().for_each(|part| part.cut = true);
                Ok(())
            }
        }
    }
}

/// An answer before it is put behind its prompt.
struct Part {
    field: &'static str,
    tokens: Vec<u32>,
    supervised: Vec<bool>,
    boundary: Boundary,
    cut: bool,
}

fn unfit(field: &str, fault: RowFault) -> PeftError {
    PeftError::UnfitRow {
        field: field.into(),
        fault,
    }
}
