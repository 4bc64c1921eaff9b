//! When a completion ends.

use std::error::Error;
use std::fmt;

use crate::{PeftError, Result};

/// Tokens to text, with a typed error.
pub(super) type Detokenize<'a> = dyn Fn(&[u32]) -> Result<String> + 'a;

/// When a completion ends: at one of several tokens, at one of several strings in its text, or at a number of tokens.
pub struct Stop<'a> {
    /// The most new tokens of a completion; at least 1.
    pub max_tokens: usize,
    /// The most tokens of a prompt. A longer one is an error, since cutting it would change the question.
    pub max_prompt_tokens: Option<usize>,
    /// Tokens that end a completion. The one that does belongs to it.
    pub tokens: Vec<u32>,
    pub(super) strings: Vec<String>,
    pub(super) detokenize: Option<Box<Detokenize<'a>>>,
}

impl<'a> Stop<'a> {
    /// Ends completions after this many new tokens.
    pub fn new(max_tokens: usize) -> Self {
        Self {
            max_tokens,
            max_prompt_tokens: None,
            tokens: Vec::new(),
            strings: Vec::new(),
            detokenize: None,
        }
    }

    /// Ends completions at any of these tokens.
    pub fn with_tokens(mut self, tokens: impl IntoIterator<Item = u32>) -> Self {
        self.tokens = tokens.into_iter().collect();
        self
    }

    /// Refuses prompts of more tokens.
    pub fn with_max_prompt_tokens(mut self, max_prompt_tokens: usize) -> Self {
        self.max_prompt_tokens = Some(max_prompt_tokens);
        self
    }

    /// Ends completions as soon as their text holds any of these strings, wherever the boundaries of tokens are.
    ///
    /// `detokenize` is the tokenizer's decoder. It sees some of the last tokens of a completion, since decoding all of them after each
    /// token would take time that grows with the square of the length; so the text of tokens must not depend on tokens far before
    /// them, which is true of all usual tokenizers.
    pub fn with_strings<E: Into<Box<dyn Error + Send + Sync>>>(
        mut self,
        strings: impl IntoIterator<Item = impl Into<String>>,
        detokenize: impl Fn(&[u32]) -> Result<String, E> + 'a,
    ) -> Self {
        self.strings = strings.into_iter().map(Into::into).collect();
        self.detokenize = Some(Box::new(move |tokens| {
            detokenize(tokens).map_err(|error| PeftError::Tokenizer {
                text: format!(
                    "the tokens {:?}",
                    &tokens[tokens.len().saturating_sub(16)..]
                ),
                source: error.into(),
            })
        }));
        self
    }

    /// The strings that end a completion.
    pub fn strings(&self) -> &[String] {
        &self.strings
    }

    /// Checks the options against a model's vocabulary.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for no new tokens, a stop token outside of the vocabulary, and an empty stop string.
    pub fn validate(&self, vocabulary: usize) -> Result<()> {
        if self.max_tokens == 0 {
            return Err(PeftError::config("Stop::max_tokens", 0, "at least 1"));
        }
        if let Some(token) = self
            .tokens
            .iter()
            .find(|token| **token as usize >= vocabulary)
        {
            let expected = format!("one of the {vocabulary} tokens of the vocabulary");
            return Err(PeftError::config("token of Stop::tokens", token, expected));
        }
        if self.strings.iter().any(String::is_empty) {
            let expected = "at least one character: an empty string is in every text";
            return Err(PeftError::config(
                "string of Stop::strings",
                "\"\"",
                expected,
            ));
        }
        Ok(())
    }
}

impl fmt::Debug for Stop<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Stop")
            .field("max_tokens", &self.max_tokens)
            .field("max_prompt_tokens", &self.max_prompt_tokens)
            .field("tokens", &self.tokens)
            .field("strings", &self.strings)
            .finish_non_exhaustive()
    }
}
