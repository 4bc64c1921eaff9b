//! The command line.

use std::path::PathBuf;

use clap::Parser;
use llama::arguments::{self, Outputs};
use llama::open::ModelArgs;

/// Writes the logits of a Llama for given tokens.
#[derive(Parser)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    /// File with `input_ids`.
    #[arg(long, value_parser = arguments::file())]
    pub tokens: PathBuf,
    /// File to write `logits` to; an older one is replaced.
    #[arg(long)]
    pub out: PathBuf,
}

impl Args {
    /// Checks, before the work, that the logits can be written, and not over the tokens.
    ///
    /// Error: the argument at fault, and why.
    pub fn check(&self) -> Result<(), String> {
        Outputs::new()
            .with_input("--tokens", &self.tokens)
            .file("--out", &self.out)
    }
}
