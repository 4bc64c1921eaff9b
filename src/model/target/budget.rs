//! A limit on what the patterns of one configuration may cost, however many they are.

use super::pattern::Pattern;
use crate::{PeftError, Result};

/// How much one configuration may make us compile: so many expressions, or a sixteenth of it with look-around. Plain
/// names are free.
///
/// Bounds what a hostile configuration can take at about one gibibyte and a few seconds.
const MAX_EXPRESSIONS: usize = 256;

/// How much of [`MAX_EXPRESSIONS`] is spent.
#[derive(Default)]
pub(super) struct Budget(usize);

impl Budget {
    /// Returns the pattern if it is still affordable.
    pub(super) fn spend(&mut self, pattern: Pattern) -> Result<Pattern> {
        self.0 += pattern.cost();
        if self.0 <= MAX_EXPRESSIONS {
            return Ok(pattern);
        }
        Err(PeftError::config(
            "expressions in patterns",
            format!("more than {MAX_EXPRESSIONS}"),
            format!(
                "at most {MAX_EXPRESSIONS}, where one with look-around counts as 16 and a plain name as none"
            ),
        ))
    }
}
