//! What was sampled.

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Finish {
    /// By a stop token or a stop string. The policy chose to end.
    Stop,
    /// By the limit of new tokens, or by the model's limit.
    Length,
}

/// The continuation of one prompt, with the log-probabilities under which it was sampled.
///
/// Three distributions matter, and mixing them up biases the ratio of a policy loss:
///
/// | field | distribution of the token |
/// |---|---|
/// | `log_probs` | `softmax(z)`: the model |
/// | `tempered_log_probs` | `softmax(z / T)`: the policy at the temperature `T`, which training computes from logits divided by `T` |
/// | `sampled_log_probs` | what the token was drawn from: after repetition penalty, temperature and truncation, renormalised |
///
/// All three are equal with `T` 1, no penalty and no truncation, which is the default of [`Sampler`](super::Sampler). In greedy
/// choice, the last two are 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Index of the prompt in the call.
    pub prompt: usize,
    /// Which of the prompt's copies in the call, from 0.
    pub copy: usize,
    /// The new tokens. A stop token belongs to them, and so do the tokens of a stop string. Never empty.
    pub tokens: Vec<u32>,
    /// `ln p` of each token under the model, in nats.
    pub log_probs: Vec<f32>,
    /// `ln p` of each token under the model at the temperature.
    pub tempered_log_probs: Vec<f32>,
    /// `ln p` of each token under the distribution from which it was drawn.
    pub sampled_log_probs: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
    /// The text before the stop string, where one ended the completion.
    pub text_before_stop: Option<String>,
}

impl Completion {
    /// The tokens without the stop token at their end, if there is one of `stop`: what a reader wants to see.
    pub fn without_stop_token(&self, stop: &super::Stop) -> &[u32] {
        match self.tokens.split_last() {
            Some((last, before)) if stop.tokens.contains(last) => before,
            _ => &self.tokens,
        }
    }
}
