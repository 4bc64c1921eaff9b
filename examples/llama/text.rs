//! Plain text as a training task: next-token prediction over windows of equal length.

use burn_peft::dataset::Example;

use super::{error::Result, tokenizer::Tokenizer};

/// Tokenises the lines, each a text of its own that `end` ends, one after the other, and cuts windows of `length + 1`
/// tokens, so that every token but the very first is learned once; what is left over at the end is dropped.
pub fn windows<'l>(
    lines: impl IntoIterator<Item = &'l str>,
    tokenizer: &Tokenizer,
    end: u32,
    length: usize,
) -> Result<Vec<Example>> {
    let mut tokens = Vec::new();
    for line in lines {
        tokens.extend(tokenizer.encode(line, false)?);
        tokens.push(end);
    }
    let starts = (0..tokens.len().saturating_sub(1) / length).map(|window| window * length);
    let windows = starts.map(|start| {
        let window = tokens[start..=start + length].to_vec();
        Example::new(window, vec![true; length + 1]).expect("every token of a window is supervised")
    });
    Ok(windows.collect())
}
