//! The command line.

use std::path::PathBuf;

use burn_peft::model::TargetConfig;
use clap::{Parser, ValueEnum};
use llama::arguments::{self, Outputs};

/// Highest rank of an adapter that files can have.
const MAX_RANK: usize = burn_peft::format::MAX_RANK;

/// Seeds are counted on from the first.
const MAX_SEED: u64 = u64::MAX - 1000;

/// Fine-tunes a Llama on (instruction, input, response) triples by QLoRA.
///
/// Without arguments it takes the small base model and the data in `examples/data`.
#[derive(Parser, Clone, Debug)]
pub struct Args {
    /// Hugging Face directory of the base model: config.json, model.safetensors, tokenizer.json.
    #[arg(long, default_value = arguments::BASE, value_parser = arguments::directory())]
    pub model: PathBuf,
    /// Training triples, JSON lines.
    #[arg(long, default_value = arguments::TRIPLES, value_parser = arguments::file())]
    pub data: PathBuf,
    /// Held-out triples, JSON lines. Default: `heldout.jsonl` beside the training data.
    #[arg(long, value_parser = arguments::file())]
    pub heldout: Option<PathBuf>,
    /// Held-out lines of text of the base's own task, on which forgetting is measured. Default:
    /// `pretrain_heldout.txt` beside the training data, if there is one.
    #[arg(long, value_parser = arguments::file())]
    pub text: Option<PathBuf>,

    /// Rank of the adapter.
    #[arg(long, default_value_t = 8, value_parser = arguments::whole::<1, MAX_RANK>)]
    pub rank: usize,
    /// Scale of the adapter times its rank.
    #[arg(long, default_value_t = 16.0, value_parser = arguments::positive)]
    pub alpha: f64,
    /// Probability of dropout on the adapter's input.
    #[arg(long, default_value_t = 0.0, value_parser = arguments::dropout)]
    pub dropout: f64,
    /// Modules that get an adapter: `all-linear`, or names with commas such as `q_proj,v_proj`.
    #[arg(long, default_value = "all-linear", value_parser = arguments::names)]
    pub targets: String,
    /// Keep the base dense: LoRA in place of QLoRA.
    #[arg(long)]
    pub no_quantize: bool,

    /// Steps of the optimiser.
    #[arg(long, default_value_t = 400, value_parser = arguments::count)]
    pub steps: usize,
    /// Triples in a step.
    #[arg(long, default_value_t = 16, value_parser = arguments::whole::<1, 65_536>)]
    pub batch: usize,
    /// Most tokens of a prompt with its response; longer triples are left out.
    #[arg(long, default_value_t = 256, value_parser = arguments::whole::<2, 1_048_576>)]
    pub seq_len: usize,
    /// Highest learning rate.
    #[arg(long, default_value_t = 3e-3, value_parser = arguments::positive)]
    pub lr: f64,
    /// Highest learning rate of the full fine-tune that `--compare` makes.
    #[arg(long, default_value_t = 1e-3, value_parser = arguments::positive)]
    pub full_lr: f64,
    /// Seed of the factors and of the order of the triples.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=MAX_SEED))]
    pub seed: u64,

    /// How prompts are rendered. Default: `chat` if the tokenizer has ChatML's markers.
    #[arg(long, value_enum)]
    pub prompt: Option<PromptStyle>,
    /// System message of a chat. Default: none.
    #[arg(long, default_value = "")]
    pub system: String,
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 32, value_parser = arguments::whole::<1, 1_048_576>)]
    pub max_new_tokens: usize,
    /// Evaluate on the first so many held-out triples. Default: all.
    #[arg(long, value_parser = arguments::count)]
    pub eval: Option<usize>,
    /// Only evaluate the base, with this many training triples and their answers in every prompt.
    #[arg(long, value_parser = arguments::whole::<1, 1024>)]
    pub few_shot: Option<usize>,
    /// Control: train on responses that belong to other triples, from which only the form can be learned.
    #[arg(long)]
    pub shuffle_responses: bool,

    /// Compare QLoRA, LoRA and full fine-tuning at the same data and steps, and what each forgets.
    #[arg(long)]
    pub compare: bool,
    /// Seeds of the comparison: `seed`, `seed + 1`, ...
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub seeds: u64,

    /// File that says where the run stands, written ten times a run. A run that finds one goes on from it, to the bit, if
    /// its other arguments and its data are the same.
    #[arg(long, conflicts_with = "compare")]
    pub checkpoint: Option<PathBuf>,

    /// Where the adapter and the loss curve go; files there are replaced.
    #[arg(long, default_value = "out/finetune")]
    pub out: PathBuf,
}

/// How a triple becomes text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PromptStyle {
    /// ChatML, `<|im_start|>user ...`.
    Chat,
    /// Stanford Alpaca's, `### Instruction: ...`.
    Alpaca,
}

impl Args {
    /// Which modules get an adapter.
    pub fn target_config(&self) -> TargetConfig {
        match &*self.targets {
            "all-linear" => TargetConfig::all_linear(),
            names => TargetConfig::list(names.split(',').map(str::trim)),
        }
    }

    /// Checks what no single argument shows, before the work: that what the run writes can be written and is nothing that it reads, and
    /// that the held-out triples, which need not be named, are there.
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
        if self.few_shot.is_some() || self.compare {
            // Neither writes anything.
            return Ok(());
        }
        let outputs = Outputs::new()
            .with_input("--model", &self.model)
            .with_input("--data", &self.data)
            .with_input("--heldout", &heldout);
        outputs.directory("--out", &self.out)?;
        if let Some(checkpoint) = &self.checkpoint {
            outputs.file("--checkpoint", checkpoint)?;
        }
        Ok(())
    }

    /// Where the held-out triples are.
    pub fn heldout_path(&self) -> PathBuf {
        self.heldout
            .clone()
            .unwrap_or_else(|| self.data.with_file_name("heldout.jsonl"))
    }

    /// Where the text of the base's own task is, if anywhere.
    pub fn text_path(&self) -> Option<PathBuf> {
        let beside = self.data.with_file_name("pretrain_heldout.txt");
        self.text
            .clone()
            .or_else(|| beside.exists().then_some(beside))
    }
}
