//! A stretch of a rendered prompt that is wholly learned or wholly given.

/// Text, and whether the model is trained to produce it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The text.
    pub text: String,
    /// Whether its tokens count in the loss.
    pub supervised: bool,
}

impl Segment {
    /// Text that is given to the model.
    pub fn context(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            supervised: false,
        }
    }

    /// Text that the model is trained to produce.
    pub fn supervised(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            supervised: true,
        }
    }
}
