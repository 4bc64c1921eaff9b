//! The command line.

use burn_peft::rollout::Sampler;
use clap::Parser;
use llama::arguments;
use llama::open::ModelArgs;

/// Continues texts by a Llama.
#[derive(Parser)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Largest number of new tokens per text.
    #[arg(long, default_value_t = 64, value_parser = arguments::whole::<1, 1_048_576>)]
    pub tokens: usize,
    /// Draw from the K most likely tokens, or from all if there are fewer.
    #[arg(long, value_name = "K", value_parser = arguments::count)]
    top_k: Option<usize>,
    /// Above 1 bolder, below 1 safer.
    #[arg(long, default_value_t = 1.0, requires = "top_k", value_parser = arguments::positive)]
    temperature: f64,
    /// The same seed draws the same text.
    #[arg(long, default_value_t = 0, requires = "top_k")]
    pub seed: u64,
    /// The texts to continue.
    #[arg(required = true, value_parser = arguments::text)]
    pub texts: Vec<String>,
}

impl Args {
    /// How the next token is chosen.
    pub fn sampler(&self) -> Sampler {
        match self.top_k {
            None => Sampler::greedy(),
            Some(k) => Sampler::new()
                .with_top_k(k)
                .with_temperature(self.temperature),
        }
    }
}
