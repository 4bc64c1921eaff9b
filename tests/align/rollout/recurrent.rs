//! A model of somebody else's, which is no transformer: `h ← h/2 + E[token]`, logits `h·Eᵀ`.

use burn::tensor::{Device, Distribution, Int, Tensor};
use burn_peft::rollout::Decode;

pub const VOCABULARY: usize = 24;

pub struct Recurrent {
    /// `[vocabulary, width]`.
    embedding: Tensor<2>,
    /// `[rows, width]`.
    state: Tensor<2>,
    /// What it was asked for.
    pub calls: Vec<String>,
    pub limit: usize,
}

impl Recurrent {
    pub fn new() -> Self {
        // Numbers of its own: the device's generator is shared by the tests of a process.
        let values = (0..VOCABULARY * 8).map(|i| ((i * i * 37 + i * 11) % 97) as f32 / 40.0 - 1.2);
        let values: Vec<f32> = values.collect();
        let embedding = Tensor::<1>::from_floats(values.as_slice(), &Device::default());
        let embedding = embedding.reshape([VOCABULARY, 8]);
        Self {
            state: Tensor::random([1, 8], Distribution::Default, &Device::default()),
            embedding,
            calls: Vec::new(),
            limit: usize::MAX,
        }
    }

    fn read(&mut self, tokens: &[u32]) {
        let tokens = Tensor::<1, Int>::from_data(tokens, &self.state.device());
        let read = self.embedding.clone().select(0, tokens);
        self.state = self.state.clone() * 0.5 + read;
    }

    fn logits(&self) -> Tensor<2> {
        self.state
            .clone()
            .matmul(self.embedding.clone().transpose())
    }
}

impl Decode for Recurrent {
    fn vocabulary(&self) -> usize {
        VOCABULARY
    }

    fn limit(&self) -> usize {
        self.limit
    }

    fn prefill(&mut self, prompts: &[Vec<u32>], copies: usize) -> Tensor<2> {
        self.calls
            .push(format!("prefill {} x {copies}", prompts.len()));
        let states = prompts.iter().map(|prompt| {
            self.state = Tensor::zeros([1, 8], &self.state.device());
            prompt.iter().for_each(|token| self.read(&[*token]));
            self.state.clone()
        });
        self.state = Tensor::cat(states.collect(), 0);
        let logits = self.logits();
        let rows = (0..prompts.len() * copies).map(|row| (row / copies) as i32);
        let rows: Vec<i32> = rows.collect();
        let rows = Tensor::<1, Int>::from_data(rows.as_slice(), &self.state.device());
        self.state = self.state.clone().select(0, rows);
        logits
    }

    fn step(&mut self, tokens: &[u32], keep: &[usize]) -> Tensor<2> {
        self.calls.push(format!("step {tokens:?} {keep:?}"));
        let keep: Vec<i32> = keep.iter().map(|row| *row as i32).collect();
        let keep = Tensor::<1, Int>::from_data(keep.as_slice(), &self.state.device());
        self.state = self.state.clone().select(0, keep);
        self.read(tokens);
        self.logits()
    }
}
