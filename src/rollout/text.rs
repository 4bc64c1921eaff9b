//! Stop strings in a text that grows by tokens.

use super::stop::Stop;
use crate::Result;

/// A character in several tokens shows as replacement characters, of three bytes each, until its last token is there. By so many bytes
/// at most is the text of the last tokens too long.
const INCOMPLETE: usize = 12;

/// Looks for stop strings in the text of a completion, token by token.
///
/// It decodes the tokens from `from` on, which is as far back as a stop string that ends in the next token may begin, and one token
/// more: a decoder may strip the first token's space.
#[derive(Default)]
pub(super) struct StopText {
    from: usize,
}

impl StopText {
    /// The text of all `tokens` before a stop string, if the last token completes one.
    pub(super) fn before_stop(&mut self, tokens: &[u32], stop: &Stop) -> Result<Option<String>> {
        let Some(detokenize) = &stop.detokenize else {
            return Ok(None);
        };
        let Some(longest) = stop.strings.iter().map(String::len).max() else {
            return Ok(None);
        };
        let recent = detokenize(&tokens[self.from..])?;
        if first_of(&stop.strings, &recent).is_some() {
            let whole = detokenize(tokens)?;
            // Only a decoder that depends on tokens far before has a string in the recent text and not in the whole.
            let text = first_of(&stop.strings, &whole).map_or(whole.as_str(), |at| &whole[..at]);
            return Ok(Some(text.to_owned()));
        }
        while self.from + 2 < tokens.len()
            && detokenize(&tokens[self.from + 2..])?.len() >= longest + INCOMPLETE
        {
            self.from += 1;
        }
        Ok(None)
    }
}

/// Where the first of the strings that occur begins.
fn first_of(strings: &[String], text: &str) -> Option<usize> {
    strings.iter().filter_map(|string| text.find(string)).min()
}
