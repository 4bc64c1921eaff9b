//! Hugging Face's `tokenizer.json`, by the `tokenizers` crate.

use std::path::{Path, PathBuf};

use super::error::{LlamaError, Result};

/// Text to tokens and back.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
}

impl Tokenizer {
    /// Reads `dir/tokenizer.json`. Error: the file is absent or is not a tokenizer.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().join("tokenizer.json");
        let text = std::fs::read(&path).map_err(LlamaError::io(&path))?;
        let inner = tokenizers::Tokenizer::from_bytes(text).map_err(LlamaError::file(&path))?;
        Ok(Self { inner, path })
    }

    /// The tokens of `text`. With `special`, those that the tokenizer puts around every text are added (for Llama 3,
    /// the beginning of text); special tokens written in `text` are always recognised.
    ///
    /// Error: the tokenizer has no token for something in the text, which byte-level ones always have.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, special)
            .map_err(LlamaError::file(&self.path))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `tokens`, without special tokens. Error: the tokenizer's decoder rejects them.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.inner
            .decode(tokens, true)
            .map_err(LlamaError::file(&self.path))
    }

    /// The number of a special or ordinary token.
    pub fn token(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }
}
