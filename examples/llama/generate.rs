//! A Llama as what text is sampled from: prompts in one pass, then one token at a time from the key-value cache.

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::fused::Visible;
use burn_peft::rollout::Decode;

use super::attention::Layout;
use super::cache::KvCache;
use super::model::LlamaForCausalLm;

/// A Llama with its key-value cache, to be given to [`generate`](burn_peft::rollout::generate).
///
/// Prompts are read one after another as one row, so that none is padded; each token sees its own prompt. What is remembered of a prompt
/// is then copied to the rows that continue it, aligned on the right.
#[derive(Debug)]
pub struct Decoder {
    model: LlamaForCausalLm,
    cache: KvCache,
    /// Places before the tokens of each row that nothing sees.
    padding: Vec<usize>,
    device: Device,
    limit: usize,
}

impl LlamaForCausalLm {
    /// The model as it is now, its active adapters included, without dropout.
    pub fn decoder(&self) -> Decoder {
        let model = self.valid();
        Decoder {
            device: model.model.norm.gamma.val().device(),
            model,
            cache: KvCache::default(),
            padding: Vec::new(),
            limit: usize::MAX,
        }
    }
}

impl Decoder {
    /// Ends rows at this number of tokens, for instance at the configuration's `max_position_embeddings`.
    pub fn with_limit(mut self, limit: usize) -> Self {
        self.limit = limit;
        self
    }

    /// Hidden states `[batch, seq, hidden_size]` of tokens `[batch, seq]`, row-major.
    fn read(&mut self, tokens: &[u32], shape: [usize; 2], layout: &Layout) -> Tensor<3> {
        let tokens: Vec<i64> = tokens.iter().map(|&token| token.into()).collect();
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, shape), &self.device);
        self.model
            .model
            .forward(tokens, layout, Some(&mut self.cache))
    }

    /// Hidden states `[1, rows, hidden_size]` to logits `[rows, vocab_size]`.
    fn logits(&self, hidden: Tensor<3>) -> Tensor<2> {
        self.model.head(hidden).squeeze_dim(0)
    }
}

impl Decode for Decoder {
    fn vocabulary(&self) -> usize {
        self.model.model.embed_tokens.weight.lazy_shape()[0]
    }

    fn limit(&self) -> usize {
        self.limit
    }

    fn prefill(&mut self, prompts: &[Vec<u32>], copies: usize) -> Tensor<2> {
        self.cache = KvCache::default();
        let lens: Vec<usize> = prompts.iter().map(Vec::len).collect();
        let longest = lens.iter().copied().max().unwrap_or(0);
        let padding = lens.iter().map(|len| longest - len);
        self.padding = padding
            .flat_map(|pad| std::iter::repeat_n(pad, copies))
            .collect();

        let (mut positions, mut visible, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for &len in &lens {
            let start = positions.len();
            positions.extend((0..len).map(|at| at as i64));
            visible.extend((0..len).map(|at| start..start + at + 1));
            last.push((start + len - 1) as i64);
        }
        let total = positions.len();
        let layout = Layout {
            positions: Tensor::from_data(TensorData::new(positions, [1, total]), &self.device),
            visible: Visible::from_ranges(&visible, total, total),
        };
        let hidden = self.read(&prompts.concat(), [1, total], &layout);
        self.cache.spread(&lens, copies);
        let last = TensorData::new(last, [lens.len()]);
        self.logits(hidden.select(1, Tensor::from_data(last, &self.device)))
    }

    fn step(&mut self, tokens: &[u32], keep: &[usize]) -> Tensor<2> {
        if keep.len() < self.padding.len() {
            self.cache.keep(keep, &self.device);
            self.padding = keep.iter().map(|&row| self.padding[row]).collect();
        }
        let layout = Layout::left_padded(&self.padding, 1, self.cache.len(), &self.device);
        let hidden = self.read(tokens, [tokens.len(), 1], &layout);
        self.logits(hidden.swap_dims(0, 1))
    }
}
