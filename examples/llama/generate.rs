//! Generating text: one pass over the prompts, then one token at a time from the key-value cache.

use burn::tensor::{Int, Tensor, TensorData};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::attention::{KvCache, Layout};
use super::model::LlamaForCausalLm;

/// How the next token is chosen from the logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    /// The most likely token.
    Greedy,
    /// A random token of the `k` most likely ones, in proportion to `exp(logit / temperature)`.
    TopK {
        /// Number of candidates; at least 1.
        k: usize,
        /// Above 1 flatter, below 1 sharper; positive.
        temperature: f32,
        /// The same seed gives the same text.
        seed: u64,
    },
}

impl LlamaForCausalLm {
    /// Continues every prompt by at most `max_new_tokens` tokens, until one of `eos`, and returns the new tokens
    /// without it.
    ///
    /// Prompts of unequal length run as one batch, padded on the left; a prompt's text does not depend on the others
    /// (in greedy choice, up to rounding). Give it `model.valid()` if the model is in training.
    ///
    /// # Panics
    ///
    /// If a prompt is empty or holds a token outside of the vocabulary.
    pub fn generate(
        &self,
        prompts: &[Vec<u32>],
        max_new_tokens: usize,
        sampling: Sampling,
        eos: &[u32],
    ) -> Vec<Vec<u32>> {
        let batch = prompts.len();
        let mut texts = vec![Vec::new(); batch];
        let Some(longest) = prompts.iter().map(Vec::len).max() else {
            return texts;
        };
        assert!(
            prompts.iter().all(|prompt| !prompt.is_empty()),
            "a prompt without a token"
        );
        let device = self.model.norm.gamma.lazy_device();
        let padding: Vec<usize> = prompts
            .iter()
            .map(|prompt| longest - prompt.len())
            .collect();
        let mut rng = match sampling {
            Sampling::TopK { seed, .. } => StdRng::seed_from_u64(seed),
            Sampling::Greedy => StdRng::seed_from_u64(0),
        };
        let mut done = vec![false; batch];
        let mut cache = KvCache::default();
        // The padding's token is any of the vocabulary: nothing sees it.
        let mut next: Vec<i64> = prompts
            .iter()
            .zip(&padding)
            .flat_map(|(prompt, &pad)| {
                std::iter::repeat_n(0, pad).chain(prompt.iter().map(|&token| token.into()))
            })
            .collect();
        for _ in 0..max_new_tokens {
            let seq = next.len() / batch;
            let tokens = Tensor::<2, Int>::from_data(TensorData::new(next, [batch, seq]), &device);
            let layout = Layout::left_padded(&padding, seq, cache.len(), &device);
            let hidden = self.model.forward(tokens, &layout, Some(&mut cache));
            let logits = self.head(hidden.narrow(1, seq - 1, 1)).into_data();
            let logits: Vec<f32> = logits.iter::<f32>().collect();
            next = logits
                .chunks_exact(logits.len() / batch)
                .map(|logits| choose(logits, sampling, &mut rng).into())
                .collect();
            for (row, &token) in next.iter().enumerate() {
                done[row] |= eos.contains(&(token as u32));
                if !done[row] {
                    texts[row].push(token as u32);
                }
            }
            if done.iter().all(|&done| done) {
                break;
            }
        }
        texts
    }
}

/// The next token of one row.
fn choose(logits: &[f32], sampling: Sampling, rng: &mut StdRng) -> u32 {
    let mut ranked: Vec<usize> = (0..logits.len()).collect();
    let by_logit = |&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]).then(a.cmp(&b));
    let (k, temperature) = match sampling {
        Sampling::Greedy => (1, 1.0),
        Sampling::TopK { k, temperature, .. } => (k.clamp(1, logits.len()), temperature),
    };
    ranked.select_nth_unstable_by(k - 1, by_logit);
    ranked.truncate(k);
    ranked.sort_unstable_by(by_logit);
    let best = logits[ranked[0]];
    let weights: Vec<f32> = ranked
        .iter()
        .map(|&token| ((logits[token] - best) / temperature).exp())
        .collect();
    let mut left = rng.random::<f32>() * weights.iter().sum::<f32>();
    for (&token, weight) in ranked.iter().zip(weights) {
        left -= weight;
        if left <= 0.0 {
            return token as u32;
        }
    }
    ranked[k - 1] as u32
}
