//! The command line.

use std::path::PathBuf;

use clap::Parser;
use llama::arguments::{self, Outputs};

/// Trains the base model of the example `finetune`.
#[derive(Parser)]
pub struct Args {
    /// Steps of the optimiser.
    #[arg(long, default_value_t = 2400, value_parser = arguments::count)]
    pub steps: usize,
    /// Windows of text in a step.
    #[arg(long, default_value_t = 16, value_parser = arguments::whole::<1, 65_536>)]
    pub batch: usize,
    /// Tokens in a window.
    #[arg(long, default_value_t = 128, value_parser = arguments::whole::<2, 65_536>)]
    pub seq_len: usize,
    /// Highest learning rate.
    #[arg(long, default_value_t = 3e-3, value_parser = arguments::positive)]
    pub lr: f64,
    /// Seed of the weights and of the order of the sentences.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where the model goes; an older one is replaced.
    #[arg(long, default_value = arguments::BASE)]
    pub out: PathBuf,
}

impl Args {
    /// Checks, before the work, that the model can be written.
    ///
    /// Error: the argument at fault, and why.
    pub fn check(&self) -> Result<(), String> {
        Outputs::new().directory("--out", &self.out)
    }
}
