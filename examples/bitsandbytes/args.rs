//! The command line.

use std::path::PathBuf;

use clap::Parser;
use llama::arguments::{self, Outputs};

/// Writes and reads checkpoints in bitsandbytes' format.
#[derive(Parser)]
pub enum Args {
    /// Packs a dense Llama in NF4 and writes it.
    Write {
        /// Directory of a dense Llama.
        #[arg(long, value_parser = arguments::directory())]
        model: PathBuf,
        /// Directory to write to.
        #[arg(long)]
        out: PathBuf,
        /// Most bytes of tensors in a file of the doubly quantised one.
        #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..))]
        max_shard_bytes: u64,
    },
    /// Reads a Llama and writes its logits.
    Read {
        /// Directory of a Llama, packed or not.
        #[arg(long, value_parser = arguments::directory())]
        model: PathBuf,
        /// A safetensors file with `input_ids`.
        #[arg(long, value_parser = arguments::file())]
        tokens: PathBuf,
        /// File to write to; an older one is replaced.
        #[arg(long)]
        out: PathBuf,
    },
}

impl Args {
    /// Checks, before the work, that what is written can be written, and not over what is read.
    ///
    /// Error: the argument at fault, and why.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Self::Write { model, out, .. } => {
                let outputs = Outputs::new().with_input("--model", model);
                ["plain", "double"]
                    .iter()
                    .try_for_each(|name| outputs.directory("--out", &out.join(name)))
            }
            Self::Read { tokens, out, .. } => Outputs::new()
                .with_input("--tokens", tokens)
                .file("--out", out),
        }
    }
}
