//! From rendered segments to tokens and the mask of those that are learned.

use std::error::Error;

use super::Segment;
use crate::{PeftError, Result};

/// How much of a text an error repeats, in characters.
const QUOTED_CHARS: usize = 80;
/// Tokens are below this: devices hold them as 32-bit integers.
const TOKEN_LIMIT: usize = 1 << 31;

/// The tokens of one training sequence, and which of them are learned.
///
/// At least one token after the first is supervised: the first has nothing to be predicted from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    tokens: Vec<u32>,
    supervised: Vec<bool>,
}

impl Example {
    /// An example of `tokens`, of which those with `supervised` set count in the loss.
    ///
    /// # Errors
    ///
    /// [`PeftError::Shape`] when the two differ in length; [`PeftError::TokenRange`] for a token of 2^31 or more, which
    /// a device could not hold; [`PeftError::NoSupervisedTokens`] when none after the first is supervised.
    pub fn new(tokens: Vec<u32>, supervised: Vec<bool>) -> Result<Self> {
        if tokens.len() != supervised.len() {
            return Err(PeftError::Shape {
                tensor: "supervised".into(),
                expected: vec![tokens.len()],
                found: vec![supervised.len()],
            });
        }
        if let Some(column) = tokens
            .iter()
            .position(|&token| token as usize >= TOKEN_LIMIT)
        {
            return Err(PeftError::TokenRange {
                token: tokens[column].into(),
                row: 0,
                column,
                vocabulary: TOKEN_LIMIT,
            });
        }
        let example = Self { tokens, supervised };
        match example.supervised_count() {
            0 => Err(PeftError::NoSupervisedTokens {
                tokens: example.tokens.len().saturating_sub(1),
            }),
            _ => Ok(example),
        }
    }

    /// The tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Which tokens are supervised, one flag per token.
    pub fn supervised(&self) -> &[bool] {
        &self.supervised
    }

    /// How many tokens count in the loss: the supervised ones after the first.
    pub fn supervised_count(&self) -> usize {
        self.supervised.iter().skip(1).filter(|&&s| s).count()
    }
}

/// What to do with an example of more than the allowed number of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Truncation {
    /// Fail: nothing is lost unnoticed.
    #[default]
    Refuse,
    /// Keep the first tokens. The end of the response goes, and with it the end-of-sequence token, so that the model
    /// does not learn to stop in the middle.
    KeepStart,
    /// Keep the last tokens, behind the beginning-of-sequence token if there is one. The response stays whole, the
    /// prompt loses its beginning.
    KeepEnd,
}

/// How segments become tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenizeConfig {
    /// A token to put first, never supervised. Default: none.
    pub bos: Option<u32>,
    /// A token to put last, always supervised: the model learns to stop. Default: none, which is right for a
    /// rendering that writes its own end marker, such as ChatML.
    pub eos: Option<u32>,
    /// The most tokens an example may have, both of these included; a batch feeds the model one fewer. Default: no
    /// limit.
    pub max_tokens: Option<usize>,
    /// What to do with longer examples. Default: [`Truncation::Refuse`].
    pub truncation: Truncation,
}

impl TokenizeConfig {
    /// The defaults: no tokens are added, no length is too long.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `token` first.
    pub fn with_bos(mut self, token: u32) -> Self {
        self.bos = Some(token);
        self
    }

    /// Puts `token` last, supervised.
    pub fn with_eos(mut self, token: u32) -> Self {
        self.eos = Some(token);
        self
    }

    /// Allows examples at most this many tokens.
    pub fn with_max_tokens(mut self, max_tokens: usize) -> Self {
        self.max_tokens = Some(max_tokens);
        self
    }

    /// Chooses what happens to longer examples.
    pub fn with_truncation(mut self, truncation: Truncation) -> Self {
        self.truncation = truncation;
        self
    }

    /// Tokenises each segment on its own and joins the results.
    ///
    /// `encode` gives the tokens of a text and must add none of its own at either end. Generation that encodes its
    /// prompt alone then sees exactly the tokens that training put before the response.
    ///
    /// # Errors
    ///
    /// [`PeftError::Tokenizer`] when `encode` fails; [`PeftError::TooLong`] as [`Truncation::Refuse`] says; and as
    /// [`Example::new`], for instance when no supervised token is there or is left.
    pub fn tokenize<E: Into<Box<dyn Error + Send + Sync>>>(
        &self,
        segments: &[Segment],
        mut encode: impl FnMut(&str) -> Result<Vec<u32>, E>,
    ) -> Result<Example> {
        let mut tokens = Vec::from_iter(self.bos);
        let mut supervised = vec![false; tokens.len()];
        for segment in segments {
            tokens.extend(encoded(&segment.text, &mut encode)?);
            supervised.resize(tokens.len(), segment.supervised);
        }
        tokens.extend(self.eos);
        supervised.resize(tokens.len(), true);

        let limit = self.max_tokens.unwrap_or(usize::MAX);
        if tokens.len() > limit {
            match self.truncation {
                Truncation::Refuse => {
                    return Err(PeftError::TooLong {
                        tokens: tokens.len(),
                        limit,
                    });
                }
                Truncation::KeepStart => {
                    tokens.truncate(limit);
                    supervised.truncate(limit);
                }
                Truncation::KeepEnd => {
                    let start = usize::from(self.bos.is_some()).min(limit);
                    let cut = start..tokens.len() - (limit - start);
                    tokens.drain(cut.clone());
                    supervised.drain(cut);
                }
            }
        }
        Example::new(tokens, supervised)
    }
}

/// The tokens of a text, or an error that shows its beginning.
pub(super) fn encoded<E: Into<Box<dyn Error + Send + Sync>>>(
    text: &str,
    encode: &mut impl FnMut(&str) -> Result<Vec<u32>, E>,
) -> Result<Vec<u32>> {
    encode(text).map_err(|e| PeftError::Tokenizer {
        text: text.chars().take(QUOTED_CHARS).collect(),
        source: e.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::convert::Infallible;

    fn bytes(text: &str) -> Result<Vec<u32>, Infallible> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn segments() -> [Segment; 3] {
        [
            Segment::context("ab"),
            Segment::supervised("cd"),
            Segment::context("e"),
        ]
    }

    /// Tokens as text, supervised ones in upper case; `^` is BOS, `$` is EOS.
    fn show(example: &Example) -> String {
        let pairs = example.tokens().iter().zip(example.supervised());
        pairs
            .map(|(&token, &supervised)| {
                let c = char::from_u32(token).unwrap();
                if supervised {
                    c.to_ascii_uppercase()
                } else {
                    c
                }
            })
            .collect()
    }

    fn config() -> TokenizeConfig {
        TokenizeConfig::new()
            .with_bos('^'.into())
            .with_eos('$'.into())
    }

    #[test]
    fn the_mask_follows_the_spans() {
        let example = TokenizeConfig::new().tokenize(&segments(), bytes).unwrap();
        assert_eq!(show(&example), "abCDe");
        assert_eq!(example.supervised_count(), 2);
        let example = config().tokenize(&segments(), bytes).unwrap();
        assert_eq!(show(&example), "^abCDe$");
        assert_eq!(
            example.supervised(),
            [false, false, false, true, true, false, true]
        );
    }

    #[test]
    fn truncation_keeps_what_it_says() {
        let keep = |truncation, limit| {
            let config = config().with_max_tokens(limit).with_truncation(truncation);
            config.tokenize(&segments(), bytes)
        };
        assert_eq!(show(&keep(Truncation::KeepStart, 4).unwrap()), "^abC");
        assert_eq!(show(&keep(Truncation::KeepEnd, 4).unwrap()), "^De$");
        assert_eq!(show(&keep(Truncation::KeepEnd, 2).unwrap()), "^$");
        assert_eq!(show(&keep(Truncation::Refuse, 7).unwrap()), "^abCDe$");
        assert!(matches!(
            keep(Truncation::Refuse, 6),
            Err(PeftError::TooLong {
                tokens: 7,
                limit: 6
            })
        ));
    }

    #[test]
    fn an_example_without_anything_to_learn_is_an_error() {
        let short = config()
            .with_max_tokens(3)
            .with_truncation(Truncation::KeepStart);
        let error = short.tokenize(&segments(), bytes).unwrap_err();
        assert!(
            matches!(error, PeftError::NoSupervisedTokens { tokens: 2 }),
            "{error}"
        );
        // A supervised first token is never predicted.
        assert!(Example::new(vec![1, 2], vec![true, false]).is_err());
        assert!(Example::new(vec![], vec![]).is_err());
        assert!(matches!(
            Example::new(vec![1, 2], vec![true]),
            Err(PeftError::Shape { .. })
        ));
        assert!(matches!(
            Example::new(vec![1, 1 << 31], vec![true; 2]),
            Err(PeftError::TokenRange { column: 1, .. })
        ));
    }

    #[test]
    fn a_failing_tokenizer_is_reported_with_its_text() {
        let error = config().tokenize(&segments(), |text| match text {
            "cd" => Err("no such letter"),
            _ => Ok(vec![1]),
        });
        assert_eq!(
            error.unwrap_err().to_string(),
            "the tokenizer failed on \"cd\": no such letter"
        );
    }

    proptest! {
        /// Whatever the limit, what is left is a part of the whole at the promised end, and never longer.
        #[test]
        fn truncation_never_exceeds_its_limit(
            limit in 0usize..12, bos: bool, eos: bool, keep_end: bool,
        ) {
            let mut config = TokenizeConfig::new();
            config.bos = bos.then_some('^'.into());
            config.eos = eos.then_some('$'.into());
            let whole = show(&config.tokenize(&segments(), bytes).unwrap());
            config.max_tokens = Some(limit);
            config.truncation = if keep_end { Truncation::KeepEnd } else { Truncation::KeepStart };
            if let Ok(example) = config.tokenize(&segments(), bytes) {
                let text = show(&example);
                prop_assert_eq!(text.len(), limit.min(whole.len()));
                let tail = text.strip_prefix('^').unwrap_or(&text);
                let kept = if keep_end { whole.ends_with(tail) } else { whole.starts_with(&text) };
                prop_assert!(kept, "{} of {}", text, whole);
                prop_assert_eq!(text.starts_with('^'), bos);
            }
        }
    }
}
