//! What becomes of the rows on their way into training: kept, cut, or skipped for a stated reason; and the count of each.

use std::collections::BTreeMap;
use std::fmt;

use super::{Boundary, Example, FeedbackExample, Place, PreferenceExample, ResponseExample};
use crate::{PeftError, Result};

/// Why a row cannot be trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RowFault {
    /// Nothing stands before the answer, so that its first token has nothing to be predicted from.
    EmptyPrompt,
    /// The answer has no text.
    EmptyAnswer,
    /// The preferred answer has the tokens of the other one.
    SameAnswers,
    /// The prompt leaves no room for an answer.
    PromptTooLong {
        /// The length of the prompt in tokens.
        tokens: usize,
        /// The most tokens of prompt and answer.
        limit: usize,
    },
    /// Prompt and answer are longer than the limit.
    TooLong {
        /// Their length in tokens.
        tokens: usize,
        /// The most that is allowed.
        limit: usize,
    },
    /// No token of the answer is supervised.
    NothingSupervised,
}

impl RowFault {
    /// The fault in two or three words, as a report counts it.
    fn title(self) -> &'static str {
        match self {
            Self::EmptyPrompt => "empty prompt",
            Self::EmptyAnswer => "empty answer",
            Self::SameAnswers => "answers of the same tokens",
            Self::PromptTooLong { .. } => "prompt too long",
            Self::TooLong { .. } => "too long",
            Self::NothingSupervised => "nothing supervised",
        }
    }
}

impl fmt::Display for RowFault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::EmptyPrompt => f.write_str(
                "has no tokens, so that the first token of the answer has nothing to be predicted from: expected a text, or a token set by \
                 `TokenizeConfig::with_bos`",
            ),
            Self::EmptyAnswer => f.write_str(
                "has no text, so that there is nothing to learn: expected an answer. `Intake::with_skip` skips such rows and counts them",
            ),
            Self::SameAnswers => f.write_str(
                "has the same tokens as the other answer, so that there is nothing to prefer: expected two different answers. \
                 `Intake::with_skip` skips such rows and counts them",
            ),
            Self::PromptTooLong { tokens, limit } => write!(
                f,
                "has {tokens} tokens, and prompt and answer may have {limit}: raise `TokenizeConfig::max_tokens`, cut the beginning of \
                 prompts by `Truncation::KeepEnd`, or skip such rows by `Intake::with_skip`"
            ),
            Self::TooLong { tokens, limit } => write!(
                f,
                "has {tokens} tokens with its prompt, at most {limit} are allowed: raise `TokenizeConfig::max_tokens`, cut longer ones by \
                 `TokenizeConfig::with_truncation`, or skip such rows by `Intake::with_skip`"
            ),
            Self::NothingSupervised => f.write_str(
                "has no supervised token left, so that there is nothing to learn: expected text of the assistant within the limit of \
                 tokens",
            ),
        }
    }
}

/// Counts rows, and decides whether an unfit one ends the reading or is skipped.
///
/// ```
/// # fn main() -> burn_peft::Result<()> {
/// use burn_peft::dataset::{Intake, JsonLines, PlainText, Preference, TokenizeConfig};
///
/// let text = br#"{"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}
/// {"prompt": "1 + 2?", "chosen": "3", "rejected": "3"}"#;
/// let bytes = |text: &str| Ok::<_, std::convert::Infallible>(text.bytes().map(u32::from).collect());
/// let config = TokenizeConfig::new().with_eos(256).with_max_tokens(512);
/// let mut intake = Intake::new().with_skip(true);
/// let mut pairs = Vec::new();
/// for row in JsonLines::<_, Preference>::new(&text[..], "pairs.jsonl") {
///     let row = row?;
///     let pair = config.tokenize_preference(&row.row, &PlainText, bytes);
///     pairs.extend(intake.take(&row.place, pair)?);
/// }
/// assert_eq!(pairs.len(), 1);
/// assert_eq!(
///     intake.to_string(),
///     "2 rows: 1 kept, 1 skipped (1 for answers of the same tokens, first pairs.jsonl:2)"
/// );
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Intake {
    skip: bool,
    kept: usize,
    cut: usize,
    merged: usize,
    skipped: BTreeMap<&'static str, (usize, Place)>,
}

impl Intake {
    /// Lets an unfit row end the reading.
    pub fn new() -> Self {
        Self::default()
    }

    /// Skips unfit rows and counts them. Other errors, such as a failing tokenizer, still end the reading.
    pub fn with_skip(mut self, skip: bool) -> Self {
        self.skip = skip;
        self
    }

    /// Counts a row that became `made`; nothing if it is skipped.
    ///
    /// # Errors
    ///
    /// That of `made`, with the row's place, unless it says that the row is unfit and such rows are skipped.
    pub fn take<T: Taken>(&mut self, place: &Place, made: Result<T>) -> Result<Option<T>> {
        match made {
            Ok(example) => {
                self.kept += 1;
                self.cut += usize::from(example.is_cut());
                self.merged += usize::from(example.is_merged());
                Ok(Some(example))
            }
            Err(error) => match unfit(&error).filter(|_| self.skip) {
                Some(title) => {
                    let entry = self.skipped.entry(title);
                    entry.or_insert_with(|| (0, place.clone())).0 += 1;
                    Ok(None)
                }
                None => Err(error.at_row(place)),
            },
        }
    }

    /// How many rows were kept.
    pub fn kept(&self) -> usize {
        self.kept
    }

    /// How many of the kept rows lost tokens to a limit.
    pub fn cut(&self) -> usize {
        self.cut
    }

    /// In how many of the kept rows the tokenizer merges across the boundary of prompt and answer.
    pub fn merged(&self) -> usize {
        self.merged
    }

    /// How many rows were skipped.
    pub fn skipped(&self) -> usize {
        self.skipped.values().map(|(count, _)| count).sum()
    }

    /// How many rows were skipped for each reason, and the first of them.
    pub fn reasons(&self) -> impl Iterator<Item = (&'static str, usize, &Place)> {
        self.skipped
            .iter()
            .map(|(title, (count, place))| (*title, *count, place))
    }
}

impl fmt::Display for Intake {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let rows = self.kept + self.skipped();
        write!(
            f,
            "{rows} {}: {} kept",
            if rows == 1 { "row" } else { "rows" },
            self.kept
        )?;
        if self.cut > 0 {
            write!(f, ", {} of them cut", self.cut)?;
        }
        if self.merged > 0 {
            write!(
                f,
                ", {} of them with tokens merged across the boundary of prompt and answer",
                self.merged
            )?;
        }
        if self.skipped.is_empty() {
            return Ok(());
        }
        let reasons = self
            .reasons()
            .map(|(title, count, place)| format!("{count} for {title}, first {place}"));
        write!(
            f,
            ", {} skipped ({})",
            self.skipped(),
            reasons.collect::<Vec<_>>().join("; ")
        )
    }
}

/// The reason for which an error calls a row unfit.
fn unfit(error: &PeftError) -> Option<&'static str> {
    match error {
        PeftError::UnfitRow { fault, .. } => Some(fault.title()),
        PeftError::TooLong { .. } => Some("too long"),
        PeftError::NoSupervisedTokens { .. } => Some("nothing supervised"),
        _ => None,
    }
}

/// What [`Intake`] counts about an example.
pub trait Taken {
    /// Whether it lost tokens to a limit.
    fn is_cut(&self) -> bool {
        false
    }

    /// Whether the tokenizer merges across the boundary of prompt and answer.
    fn is_merged(&self) -> bool {
        false
    }
}

impl Taken for Example {}

/// The tokens of a prompt.
impl Taken for Vec<u32> {}

impl Taken for ResponseExample {
    fn is_cut(&self) -> bool {
        ResponseExample::is_cut(self)
    }

    fn is_merged(&self) -> bool {
        self.boundary() == Boundary::Merged
    }
}

impl Taken for PreferenceExample {
    fn is_cut(&self) -> bool {
        self.chosen().is_cut() || self.rejected().is_cut()
    }

    fn is_merged(&self) -> bool {
        self.chosen().is_merged() || self.rejected().is_merged()
    }
}

impl Taken for FeedbackExample {
    fn is_cut(&self) -> bool {
        self.answer().is_cut()
    }

    fn is_merged(&self) -> bool {
        self.answer().is_merged()
    }
}
