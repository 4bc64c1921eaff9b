//! The command line.

use std::path::PathBuf;

use clap::Parser;
use llama::arguments::{self, Outputs};

/// Writes an adapter of every option, with the outputs that it gives.
#[derive(Parser)]
pub struct Args {
    /// Directory of a Llama in Hugging Face's layout.
    #[arg(long, value_parser = arguments::directory())]
    pub model: PathBuf,
    /// Directory with `base.safetensors` of the model with a layer of every kind.
    #[arg(long, value_parser = arguments::directory())]
    pub kinds: PathBuf,
    /// Directory to write to.
    #[arg(long)]
    pub out: PathBuf,
}

impl Args {
    /// Checks, before the work, that the adapters can be written, and not beside what is read.
    ///
    /// Error: the argument at fault, and why.
    pub fn check(&self) -> Result<(), String> {
        Outputs::new()
            .with_input("--model", &self.model)
            .with_input("--kinds", &self.kinds)
            .directory("--out", &self.out)
    }
}
