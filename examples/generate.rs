//! Continues texts by a Llama, with or without an adapter, dense or packed.
//!
//! ```text
//! cargo run --release --example generate -- --model DIR [--adapter DIR] [--quantize none|nf4|nf4-double] [--merge]
//!     [--tokens N] [--top-k K --temperature T --seed S] TEXT...
//! ```
//!
//! Several texts run as one batch. Without `--top-k` the most likely token is taken each time.

use std::error::Error;
use std::time::Instant;

use burn::tensor::Device;
use clap::Parser;

use llama::generate::Sampling;
use llama::open::ModelArgs;
use llama::tokenizer::Tokenizer;

/// Continues texts by a Llama.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Largest number of new tokens a text.
    #[arg(long, default_value_t = 64)]
    tokens: usize,
    /// Draw from the K most likely tokens.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Above 1 bolder, below 1 safer.
    #[arg(long, default_value_t = 1.0, requires = "top_k")]
    temperature: f32,
    /// The same seed draws the same text.
    #[arg(long, default_value_t = 0, requires = "top_k")]
    seed: u64,
    /// The texts to continue.
    #[arg(required = true)]
    texts: Vec<String>,
}

fn main() {
    if let Err(error) = run() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let (config, model) = args.model.open(&Device::default())?;
    let tokenizer = Tokenizer::from_dir(&args.model.model)?;
    let prompts: Vec<Vec<u32>> = args
        .texts
        .iter()
        .map(|text| tokenizer.encode(text, true))
        .collect::<Result<_, _>>()?;
    if prompts.iter().any(Vec::is_empty) {
        return Err("a text without a token".into());
    }
    let sampling = match args.top_k {
        None => Sampling::Greedy,
        Some(k) => Sampling::TopK {
            k,
            temperature: args.temperature,
            seed: args.seed,
        },
    };
    let start = Instant::now();
    let answers = model.generate(&prompts, args.tokens, sampling, &config.eos_token_ids);
    let seconds = start.elapsed().as_secs_f64();
    for (text, answer) in args.texts.iter().zip(&answers) {
        println!("{text}{}\n", tokenizer.decode(answer)?);
    }
    let count: usize = answers.iter().map(Vec::len).sum();
    eprintln!(
        "{count} tokens in {seconds:.1} s, {:.1} tokens/s",
        count as f64 / seconds
    );
    Ok(())
}
