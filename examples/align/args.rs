//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use llama::arguments::{self, Outputs};

/// Seeds are counted on from the first.
const MAX_SEED: u64 = u64::MAX - 1000;

/// Aligns the small Llama of examples/data by DPO or GRPO, with controls, and measures what that changed.
#[derive(Parser, Clone, Debug)]
pub struct Args {
    /// How the model is aligned.
    #[arg(long, value_enum, default_value = "dpo")]
    pub method: Method,
    /// Hugging Face directory of the base model: config.json, model.safetensors, tokenizer.json.
    #[arg(long, default_value = arguments::BASE, value_parser = arguments::directory())]
    pub model: PathBuf,
    /// Training triples, JSON lines.
    #[arg(long, default_value = arguments::TRIPLES, value_parser = arguments::file())]
    pub data: PathBuf,
    /// Held-out triples, JSON lines. Default: `heldout.jsonl` beside the training data.
    #[arg(long, value_parser = arguments::file())]
    pub heldout: Option<PathBuf>,
    /// Held-out lines of text of the base's own task, on which forgetting is measured.
    #[arg(long, default_value = arguments::TEXT, value_parser = arguments::file())]
    pub text: PathBuf,

    /// Steps of supervised fine-tuning, which make the reference.
    #[arg(long, default_value_t = 100, value_parser = arguments::count)]
    pub sft_steps: usize,
    /// Steps of each run. Default: 20 for DPO, 25 for GRPO.
    #[arg(long, value_parser = arguments::count)]
    pub steps: Option<usize>,
    /// Pairs, or prompts, in a step.
    #[arg(long, default_value_t = 16, value_parser = arguments::whole::<1, 65_536>)]
    pub batch: usize,
    /// Completions of each prompt (GRPO).
    #[arg(long, default_value_t = 8, value_parser = arguments::whole::<2, 1024>)]
    pub group: usize,
    /// Rank of the adapter.
    #[arg(long, default_value_t = 8, value_parser = arguments::whole::<1, 65_536>)]
    pub rank: usize,
    /// Learning rate. Default: 5e-4 for DPO, 1e-3 for GRPO.
    #[arg(long, value_parser = arguments::positive)]
    pub lr: Option<f64>,
    /// Strength of the reference (DPO).
    #[arg(long, default_value_t = 0.1, value_parser = arguments::positive)]
    pub beta: f64,

    /// Measure on so many held-out questions.
    #[arg(long, default_value_t = 64, value_parser = arguments::count)]
    pub questions: usize,
    /// First seed.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=MAX_SEED))]
    pub seed: u64,
    /// Seeds of each run: `seed`, `seed + 1`, ...
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub seeds: u64,
    /// Where the results go: steps.jsonl and align.png, which are replaced.
    #[arg(long, default_value = "out/align")]
    pub out: PathBuf,
}

/// How the model is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Method {
    /// Direct preference optimisation: whole sentences are preferred to bare words.
    Dpo,
    /// Group relative policy optimisation: the reward is 1 for the right answer, else 0.
    Grpo,
}

impl Args {
    /// Checks what no single argument shows, before the work.
    ///
    /// Error: the argument at fault, and why.
    pub fn check(&self) -> Result<(), String> {
        let heldout = self.heldout_path();
        if !heldout.is_file() {
            return Err(format!(
                "--heldout: there is no file {}: name one",
                heldout.display()
            ));
        }
        let outputs = Outputs::new()
            .with_input("--model", &self.model)
            .with_input("--data", &self.data)
            .with_input("--heldout", &heldout);
        outputs.directory("--out", &self.out)
    }

    /// Where the held-out triples are.
    pub fn heldout_path(&self) -> PathBuf {
        self.heldout
            .clone()
            .unwrap_or_else(|| self.data.with_file_name("heldout.jsonl"))
    }
}
