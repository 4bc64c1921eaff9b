//! What a run prints and writes.

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use llama::estimate::Estimate;
use serde::Serialize;

use crate::measure::{Scores, estimate};

/// What is logged of one step.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// The run: `dpo`, `random labels`, ...
    pub run: String,
    /// Its seed.
    pub seed: u64,
    /// From 1.
    pub step: usize,
    /// The loss that was differentiated.
    pub loss: f64,
    /// What the run raises: the share of pairs told apart, or the mean reward.
    pub reward: f64,
    /// How far the policy has gone, in nats: DPO's mean log-ratio of the preferred answers to the reference, or half of the mean square of the
    /// log-ratios to the policy that sampled (0 with one step for each sampling).
    pub distance: f64,
    /// Entropy by token, in nats.
    pub entropy: f64,
    /// Tokens of a completion.
    pub tokens: f64,
}

/// The steps of all runs, in a file of JSON lines as they come.
pub struct Log {
    file: BufWriter<File>,
    /// All of them.
    pub steps: Vec<Step>,
}

impl Log {
    /// `steps.jsonl` in this directory, which is made.
    pub fn new(out: &Path) -> Result<Self, Box<dyn Error>> {
        fs::create_dir_all(out)?;
        Ok(Self {
            file: BufWriter::new(File::create(out.join("steps.jsonl"))?),
            steps: Vec::new(),
        })
    }

    /// Takes in a step.
    pub fn add(&mut self, step: Step) -> Result<(), Box<dyn Error>> {
        serde_json::to_writer(&mut self.file, &step)?;
        writeln!(self.file)?;
        self.file.flush()?;
        self.steps.push(step);
        Ok(())
    }
}

/// A table of what held-out questions say, a row for each run.
pub fn table(runs: &[(String, Scores)]) -> String {
    let mut text = String::from(
        "| policy | sentences, % | right, % | right when greedy, % | KL, nats | tokens | ended, % | distinct, % | loss on the base's text |\n\
         |---|---|---|---|---|---|---|---|---|",
    );
    for (name, scores) in runs {
        let percent = |pairs: &[(f64, f64)]| estimate(pairs).times(100.0);
        let plain = |pairs: &[(f64, f64)]| Estimate::ratio(pairs).value;
        text += &format!(
            "\n| {name} | {:.1} | {:.1} | {:.1} | {:.2} | {:.1} | {:.1} | {:.1} | {:.3} |",
            percent(&scores.sentence),
            percent(&scores.right),
            Estimate::ratio(&scores.greedy).times(100.0),
            estimate(&scores.kl),
            plain(&scores.tokens),
            100.0 * plain(&scores.ended),
            100.0 * plain(&scores.distinct),
            plain(&scores.text),
        );
    }
    text + "\nin brackets the 95 % confidence interval over held-out questions and seeds, by bootstrap"
}
