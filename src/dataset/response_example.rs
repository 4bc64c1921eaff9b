//! A prompt with its answers as tokens.

use super::Example;

/// What the tokenizer does where an answer follows its prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Boundary {
    /// Prompt and answer encoded apart are the encoding of the joined text.
    Clean,
    /// The joined text has other tokens, for instance one that spans the boundary. Training uses the tokens of the parts, as generation
    /// from the prompt does; the joined text, read by the model as one, looks otherwise.
    Merged,
}

/// A prompt and one answer: the whole as an [`Example`], and where the answer begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResponseExample {
    pub(super) example: Example,
    pub(super) prompt_len: usize,
    pub(super) boundary: Boundary,
    pub(super) cut: bool,
}

impl ResponseExample {
    /// Prompt and answer.
    pub fn example(&self) -> &Example {
        &self.example
    }

    /// The tokens of the prompt, with the beginning-of-sequence token if there is one; at least one.
    pub fn prompt(&self) -> &[u32] {
        &self.example.tokens()[..self.prompt_len]
    }

    /// The tokens of the answer, with the end-of-sequence token if there is one; at least one is supervised.
    pub fn response(&self) -> &[u32] {
        &self.example.tokens()[self.prompt_len..]
    }

    /// How the tokenizer treats the place where the two meet.
    pub fn boundary(&self) -> Boundary {
        self.boundary
    }

    /// Whether tokens were cut away to keep a limit.
    pub fn is_cut(&self) -> bool {
        self.cut
    }
}

/// A prompt and two answers, with the same tokens of the prompt before both.
#[derive(Clone, Debug, PartialEq)]
pub struct PreferenceExample {
    pub(super) chosen: ResponseExample,
    pub(super) rejected: ResponseExample,
    pub(super) margin: Option<f32>,
}

impl PreferenceExample {
    /// The tokens of the prompt.
    pub fn prompt(&self) -> &[u32] {
        self.chosen.prompt()
    }

    /// The prompt with the preferred answer.
    pub fn chosen(&self) -> &ResponseExample {
        &self.chosen
    }

    /// The prompt with the other answer.
    pub fn rejected(&self) -> &ResponseExample {
        &self.rejected
    }

    /// By how much the one is better, if the data says so.
    pub fn margin(&self) -> Option<f32> {
        self.margin
    }
}

/// A prompt, an answer, and whether the answer is desirable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeedbackExample {
    pub(super) answer: ResponseExample,
    pub(super) label: bool,
}

impl FeedbackExample {
    /// The prompt with the answer.
    pub fn answer(&self) -> &ResponseExample {
        &self.answer
    }

    /// Whether the answer is desirable.
    pub fn label(&self) -> bool {
        self.label
    }
}
