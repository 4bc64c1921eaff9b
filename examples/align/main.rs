//! Alignment of the small Llama of `examples/data`, each with the controls that would show a fake.
//!
//! ```text
//! cargo run --release --example align                       DPO: preferences on the form of answers
//! cargo run --release --example align -- --method grpo      GRPO: a reward for right answers, sampled from the model as it trains
//! ```
//!
//! The base is packed in NF4. An adapter is fine-tuned on answers first; that is the reference, and every run starts from it. Each run
//! is measured on held-out questions, over several seeds, and the results go to the terminal, to JSON lines and into a picture.

mod answers;
mod args;
mod dpo;
mod grpo;
mod measure;
mod plot;
mod policy;
mod report;
mod sft;

use std::error::Error;
use std::process::ExitCode;

use args::{Args, Method};
use llama::arguments;

fn main() -> ExitCode {
    let args: Args = arguments::parse();
    // In Rayon's pool, which Burn's CPU backend and the kernels share: its threads need not be woken for each operation.
    rayon::scope(|_| arguments::exit(run(&args)))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    args.check()?;
    match args.method {
        Method::Dpo => dpo::run(args),
        Method::Grpo => grpo::run(args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run of a few steps, to the end: its results and its picture are there.
    #[test]
    fn short_runs_write_their_results() {
        for method in ["dpo", "grpo"] {
            let scratch = tempfile::tempdir().unwrap();
            let out = scratch.path().join("out");
            let few = "--sft-steps 2 --steps 2 --questions 4 --seeds 1 --batch 2 --group 2";
            let mut arguments = vec!["align", "--method", method, "--out", out.to_str().unwrap()];
            arguments.extend(few.split(' '));
            run(&arguments::parse_from(&arguments).unwrap()).unwrap();
            let steps = std::fs::read_to_string(out.join("steps.jsonl")).unwrap();
            for line in steps.lines() {
                let line: serde_json::Value = serde_json::from_str(line).unwrap();
                assert!(line["loss"].as_f64().unwrap().is_finite());
            }
            assert!(steps.lines().count() >= 4, "{steps}");
            assert!(out.join("align.png").metadata().unwrap().len() > 1000);
        }
    }
}
