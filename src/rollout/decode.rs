//! What a model does for text to be sampled from it.

use burn::tensor::Tensor;

/// A language model that remembers what it has read.
///
/// The implementor owns its memory, usually keys and values of attention. It sees tokens and gives logits; sampling, stopping and
/// log-probabilities are [`generate`](super::generate)'s.
///
/// # Rows
///
/// [`prefill`](Self::prefill) makes `prompts · copies` rows: the row `p · copies + c` is the copy `c` of the prompt `p`. Each
/// [`step`](Self::step) first drops the rows that are not kept and then numbers the others anew, in order. So after a step there are
/// as many rows as it was given tokens.
///
/// Sampling takes the logits as they are: adapters as they are active, without dropout. A model that trains is given by its `valid()`.
pub trait Decode {
    /// The number of tokens that the model knows, which are `0..vocabulary`.
    fn vocabulary(&self) -> usize;

    /// The most tokens that a row may have, prompt and completion together. Rows end there by [`Finish::Length`](super::Finish::Length).
    fn limit(&self) -> usize {
        usize::MAX
    }

    /// Forgets everything, reads the prompts, and gives the logits after the last token of each: `[prompts, vocabulary]`.
    ///
    /// Prompts have at least one token and may differ in length; there is at least one. Each is read once and then continued by
    /// `copies` rows, at least one.
    fn prefill(&mut self, prompts: &[Vec<u32>], copies: usize) -> Tensor<2>;

    /// Keeps the rows `keep`, which ascend, appends one token to each, and gives the logits after it: `[keep, vocabulary]`.
    ///
    /// `tokens` are as many as `keep`, at least one.
    fn step(&mut self, tokens: &[u32], keep: &[usize]) -> Tensor<2>;
}

impl<D: Decode + ?Sized> Decode for &mut D {
    fn vocabulary(&self) -> usize {
        (**self).vocabulary()
    }

    fn limit(&self) -> usize {
        (**self).limit()
    }

    fn prefill(&mut self, prompts: &[Vec<u32>], copies: usize) -> Tensor<2> {
        (**self).prefill(prompts, copies)
    }

    fn step(&mut self, tokens: &[u32], keep: &[usize]) -> Tensor<2> {
        (**self).step(tokens, keep)
    }
}
