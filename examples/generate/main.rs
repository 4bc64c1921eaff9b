//! Continues texts by a Llama, with or without an adapter, dense or packed.
//!
//! ```text
//! cargo run --release --example generate -- --model DIR [--adapter DIR] [--quantize none|nf4|nf4-double] [--merge]
//!     [--tokens N] [--top-k K --temperature T --seed S] TEXT...
//! ```
//!
//! Several texts run as one batch. Without `--top-k` the most likely token is taken each time.

mod args;

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::Device;
use burn_peft::rollout::{Stop, generate};

use args::Args;
use llama::arguments;
use llama::tokenizer::Tokenizer;

fn main() -> ExitCode {
    arguments::exit(run(&arguments::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    // Before the model, which takes longer.
    let tokenizer = Tokenizer::from_dir(&args.model.model)?;
    let mut prompts = Vec::with_capacity(args.texts.len());
    for text in &args.texts {
        let tokens = tokenizer.encode(text, true)?;
        if tokens.is_empty() {
            return Err(format!("the text {text:?} has no token: give a longer one").into());
        }
        prompts.push(tokens);
    }
    let (config, model) = args.model.open(&Device::default())?;
    let start = Instant::now();
    let stop = Stop::new(args.tokens).with_tokens(config.eos_token_ids);
    let mut decoder = model.decoder();
    let answers = generate(&mut decoder, &prompts, 1, &args.sampler(), &stop, args.seed)?;
    let seconds = start.elapsed().as_secs_f64();
    for (text, answer) in args.texts.iter().zip(&answers) {
        let answer = answer.without_stop_token(&stop);
        println!("{text}{}\n", tokenizer.decode(answer)?);
    }
    let count: usize = answers.iter().map(|answer| answer.tokens.len()).sum();
    eprintln!(
        "{count} tokens in {seconds:.1} s, {:.1} tokens/s",
        count as f64 / seconds
    );
    Ok(())
}
