//! Sampling completions of prompts.

use burn::tensor::{FloatDType, Tensor};
use rayon::prelude::*;

use super::completion::{Completion, Finish};
use super::decode::Decode;
use super::distribution::{Distribution, first_bad, log_sum};
use super::draws::{Draws, Uniform};
use super::sampler::Sampler;
use super::stop::Stop;
use super::text::StopText;
use crate::tensor::cast;
use crate::{PeftError, Result};

/// Continues every prompt `copies` times: the completions of prompt `p` are `[p · copies..(p + 1) · copies]` of the result.
///
/// Logits are taken to the host in f32. A row that has ended leaves the batch. No prompts give no completions.
///
/// All rows are in memory at once, with what the model remembers of each; spread many prompts over several calls, with
/// [`Draws::with_first_prompt`].
///
/// # Errors
///
/// [`PeftError::Config`] for options out of range and no copies. [`PeftError::Prompt`] for a prompt that is empty, has a token outside of
/// the vocabulary, or is longer than [`Stop::max_prompt_tokens`] or the model's limit. [`PeftError::Logits`] where the model gives NaN, +∞
/// or nothing but −∞: no token is drawn from such a row. [`PeftError::Shape`] where its logits are not of a row for each token.
/// [`PeftError::DeviceRead`]; [`PeftError::Tokenizer`] where the decoder of stop strings fails.
pub fn generate<'a>(
    model: &mut (impl Decode + ?Sized),
    prompts: &[Vec<u32>],
    copies: usize,
    sampler: &Sampler,
    stop: &Stop<'a>,
    draws: impl Into<Draws>,
) -> Result<Vec<Completion>> {
    let vocabulary = model.vocabulary();
    sampler.validate()?;
    stop.validate(vocabulary)?;
    if copies == 0 {
        return Err(PeftError::config("copies", 0, "at least 1"));
    }
    let limit = model.limit();
    for (index, prompt) in prompts.iter().enumerate() {
        check_prompt(prompt, vocabulary, limit, stop)
            .map_err(|reason| PeftError::Prompt { index, reason })?;
    }
    if prompts.is_empty() {
        return Ok(Vec::new());
    }

    let draws = draws.into();
    let places = (0..prompts.len()).flat_map(|prompt| (0..copies).map(move |copy| [prompt, copy]));
    let mut rows: Vec<Row> = places
        .map(|[prompt, copy]| Row {
            prompt: &prompts[prompt],
            max_tokens: stop.max_tokens.min(limit - prompts[prompt].len()),
            uniform: draws.stream(prompt, copy),
            text: StopText::default(),
            has_ended: false,
            completion: Completion::empty(prompt, copy),
        })
        .collect();

    let logits = model.prefill(prompts, copies);
    let mut logits = on_host(logits, prompts.len(), vocabulary)?;
    // Copies share the logits of their prompt, once.
    let mut share = copies;
    loop {
        let mut live: Vec<&mut Row> = rows.iter_mut().filter(|row| !row.has_ended).collect();
        let sampled = live.par_iter_mut().enumerate().map(|(at, row)| {
            let at = at / share;
            row.sample(&logits[at * vocabulary..][..vocabulary], sampler)
        });
        // Collected first, so that of several errors it is always that of the first row.
        let sampled: Vec<Result<()>> = sampled.collect();
        sampled.into_iter().collect::<Result<()>>()?;
        share = 1;
        let mut keep = Vec::with_capacity(live.len());
        let mut tokens = Vec::with_capacity(live.len());
        for (at, row) in live.into_iter().enumerate() {
            row.look_for_end(stop)?;
            if !row.has_ended {
                keep.push(at);
                tokens.extend(row.completion.tokens.last());
            }
        }
        if keep.is_empty() {
            return Ok(rows.into_iter().map(|row| row.completion).collect());
        }
        logits = on_host(model.step(&tokens, &keep), keep.len(), vocabulary)?;
    }
}

/// What is wrong with a prompt.
fn check_prompt(
    prompt: &[u32],
    vocabulary: usize,
    limit: usize,
    stop: &Stop,
) -> Result<(), String> {
    let len = prompt.len();
    if len == 0 {
        return Err(
            "it has no token: give at least one, for instance the token that begins every text"
                .into(),
        );
    }
    let outside = |token: &u32| *token as usize >= vocabulary;
    if let Some(at) = prompt.iter().position(outside) {
        return Err(format!(
            "token {} at {at}: expected one of the {vocabulary} tokens of the vocabulary. Does the tokenizer belong to another model?",
            prompt[at]
        ));
    }
    if let Some(most) = stop.max_prompt_tokens.filter(|most| len > *most) {
        return Err(format!(
            "it has {len} tokens, at most {most} are allowed: raise `Stop::max_prompt_tokens`, or leave it out"
        ));
    }
    if len >= limit {
        return Err(format!(
            "it has {len} tokens, and the model takes {limit} with the completion: shorten it, or leave it out"
        ));
    }
    Ok(())
}

/// Logits `[rows, vocabulary]` as they lie on the host.
fn on_host(logits: Tensor<2>, rows: usize, vocabulary: usize) -> Result<Vec<f32>> {
    if logits.dims() != [rows, vocabulary] {
        return Err(PeftError::Shape {
            tensor: "logits".into(),
            expected: vec![rows, vocabulary],
            found: logits.dims().to_vec(),
        });
    }
    let values = cast(logits.detach(), FloatDType::F32).try_into_vec_as();
    values.map_err(|error| PeftError::DeviceRead {
        tensor: "logits".into(),
        reason: error.to_string(),
    })
}

/// One completion as it grows.
struct Row<'a> {
    prompt: &'a [u32],
    max_tokens: usize,
    uniform: Uniform,
    text: StopText,
    has_ended: bool,
    completion: Completion,
}

impl Row<'_> {
    /// Draws the next token.
    fn sample(&mut self, logits: &[f32], sampler: &Sampler) -> Result<()> {
        let own = &mut self.completion;
        if let Some(token) = first_bad(logits) {
            return Err(PeftError::Logits {
                prompt: own.prompt,
                copy: own.copy,
                step: own.tokens.len(),
                token,
                value: logits[token],
            });
        }
        let context = self.prompt.iter().chain(&own.tokens).copied();
        let distribution = Distribution::new(sampler, logits, context);
        // A number for each token, also in greedy choice: the numbers of a token follow from its place.
        let (token, sampled) = distribution.draw(self.uniform.next());
        let logit = f64::from(logits[token as usize]);
        let (full, tempered) = match sampler.temperature {
            0.0 => (logit - log_sum(logits, 1.0), 0.0),
            1.0 if sampler.is_untruncated() => (sampled, sampled),
            1.0 => {
                let full = logit - log_sum(logits, 1.0);
                (full, full)
            }
            t => {
                let tempered = match sampler.is_untruncated() {
                    true => sampled,
                    false => logit / t - log_sum(logits, t),
                };
                (logit - log_sum(logits, 1.0), tempered)
            }
        };
        own.tokens.push(token);
        own.log_probs.push(full as f32);
        own.tempered_log_probs.push(tempered as f32);
        own.sampled_log_probs.push(sampled as f32);
        Ok(())
    }

    /// Ends the row if its last token does.
    fn look_for_end(&mut self, stop: &Stop) -> Result<()> {
        let own = &mut self.completion;
        let last = own.tokens.last().expect("a token was drawn");
        let before_stop = self.text.before_stop(&own.tokens, stop)?;
        if stop.tokens.contains(last) || before_stop.is_some() {
            own.text_before_stop = before_stop;
            self.has_ended = true;
        } else if own.tokens.len() >= self.max_tokens {
            own.finish = Finish::Length;
            self.has_ended = true;
        }
        Ok(())
    }
}

impl Completion {
    fn empty(prompt: usize, copy: usize) -> Self {
        Self {
            prompt,
            copy,
            tokens: Vec::new(),
            log_probs: Vec::new(),
            tempered_log_probs: Vec::new(),
            sampled_log_probs: Vec::new(),
            finish: Finish::Stop,
            text_before_stop: None,
        }
    }
}
