//! How the next token is chosen.

use super::distribution::{self, Distribution};
use crate::{PeftError, Result};

/// How the next token is chosen from logits, in the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.
///
/// The default draws from the model's own distribution, which is what a policy gradient assumes. Every truncation is off then.
///
/// Sources: temperature and top-k: A. Fan, M. Lewis, Y. Dauphin, <https://arxiv.org/abs/1805.04833>; top-p: A. Holtzman et al.,
/// <https://arxiv.org/abs/1904.09751>; min-p: M. Nguyen et al., <https://arxiv.org/abs/2407.01082>; repetition penalty: N. Keskar
/// et al., <https://arxiv.org/abs/1909.05858>.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// Divides the logits; at least 0. Above 1 flatter, below 1 sharper. 0 takes the most likely token, the first of equal ones.
    pub temperature: f64,
    /// Keeps the `k` most likely tokens, and those that are as likely as the last of them; at least 1.
    pub top_k: Option<usize>,
    /// Keeps the most likely tokens until their probabilities sum to this; in `(0, 1]`. The token that crosses it is kept.
    pub top_p: f64,
    /// Drops tokens less likely than this share of the most likely one; in `[0, 1]`.
    pub min_p: f64,
    /// Positive logits of tokens in the prompt or the completion are divided by this, negative ones multiplied; above 0, and 1 does
    /// nothing.
    pub repetition_penalty: f64,
}

impl Default for Sampler {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }
}

impl Sampler {
    /// Draws from the model's own distribution.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the most likely token each time, the first of equal ones.
    pub fn greedy() -> Self {
        Self::new().with_temperature(0.0)
    }

    /// Sets what divides the logits; 0 is greedy.
    pub fn with_temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }

    /// Keeps the `top_k` most likely tokens.
    pub fn with_top_k(mut self, top_k: usize) -> Self {
        self.top_k = Some(top_k);
        self
    }

    /// Keeps the most likely tokens up to this sum of probabilities.
    pub fn with_top_p(mut self, top_p: f64) -> Self {
        self.top_p = top_p;
        self
    }

    /// Drops tokens less likely than this share of the most likely one.
    pub fn with_min_p(mut self, min_p: f64) -> Self {
        self.min_p = min_p;
        self
    }

    /// Makes tokens that occurred already less likely.
    pub fn with_repetition_penalty(mut self, repetition_penalty: f64) -> Self {
        self.repetition_penalty = repetition_penalty;
        self
    }

    /// Whether the most likely token is taken each time.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether tokens are drawn from the model's own distribution at the temperature, with no penalty and no truncation.
    pub fn is_untruncated(&self) -> bool {
        !self.is_greedy()
            && self.top_k.is_none()
            && self.top_p >= 1.0
            && self.min_p <= 0.0
            && self.repetition_penalty == 1.0
    }

    /// Checks the options.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for one that is out of its range.
    pub fn validate(&self) -> Result<()> {
        let config = |name: &str, value: String, expected: &str| {
            Err(PeftError::config(
                format!("Sampler::{name}"),
                value,
                expected,
            ))
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            let expected = "a finite number of at least 0, and 0 for greedy choice";
            return config("temperature", self.temperature.to_string(), expected);
        }
        // The largest logits of a model, divided by less, would be infinite.
        if self.temperature > 0.0 && self.temperature < 1e-6 {
            let expected = "at least 1e-6, or 0 for greedy choice";
            return config("temperature", self.temperature.to_string(), expected);
        }
        if self.top_k == Some(0) {
            return config("top_k", "0".into(), "at least 1, or `None` for all tokens");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let expected = "above 0 and at most 1, which keeps all tokens";
            return config("top_p", self.top_p.to_string(), expected);
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            let expected = "from 0, which keeps all tokens, to 1";
            return config("min_p", self.min_p.to_string(), expected);
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            let expected = "a finite number above 0, and 1 for no penalty";
            return config(
                "repetition_penalty",
                self.repetition_penalty.to_string(),
                expected,
            );
        }
        Ok(())
    }

    /// The distribution from which the next token is drawn, given the `logits` of one row and the tokens before it.
    ///
    /// # Errors
    ///
    /// Those of [`validate`](Self::validate). [`PeftError::NotFinite`] if a logit is NaN or +∞, or all are −∞, or there is none. A logit of
    /// −∞ beside others is a token that is never drawn. [`PeftError::Config`] for a token of `context` beyond the logits.
    pub fn distribution(&self, logits: &[f32], context: &[u32]) -> Result<Distribution> {
        self.validate()?;
        if let Some(token) = context
            .iter()
            .find(|token| **token as usize >= logits.len())
        {
            let expected = format!("one of the {} tokens of the logits", logits.len());
            return Err(PeftError::config("token of the context", token, expected));
        }
        if let Some(index) = distribution::first_bad(logits) {
            return Err(PeftError::NotFinite {
                tensor: "logits".into(),
                index,
                value: logits.get(index).copied().unwrap_or(f32::NAN),
            });
        }
        Ok(Distribution::new(self, logits, context.iter().copied()))
    }
}
