//! Writes the data of the default fine-tune: `cargo run --release --example make_data`.
//!
//! From `examples/data/facts.tsv`, a small world of words, countries and sums, it makes
//! - `pretrain.txt` and `pretrain_heldout.txt`: every fact in several declarative phrasings, shuffled; one phrasing of every
//!   fourth fact or so is held out, so that the held-out text is new sentences about known facts;
//! - `train.jsonl` and `heldout.jsonl`: (instruction, input, response) triples. A fact that is asked for in the one is asked
//!   for in the other in no wording, so what fine-tuning must carry over is the skill, and the facts must come from the base.
//!
//! The same files come out on every machine; a test holds the committed ones to it.

mod facts;
mod sentences;
mod triples;

use std::{collections::BTreeMap, fs, path::Path, process::ExitCode};

use facts::Fact;
use llama::arguments;

/// Share of the facts that are asked for in the held-out triples only: one in this many.
const HELD_OUT: usize = 5;

fn main() -> ExitCode {
    if std::env::args_os().len() > 1 {
        eprintln!("error: this program takes no arguments");
        return ExitCode::FAILURE;
    }
    arguments::exit(run())
}

fn run() -> std::io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
    for (name, text) in files(&fs::read_to_string(folder.join("facts.tsv"))?) {
        println!(
            "{name}: {} lines, {} bytes",
            text.lines().count(),
            text.len()
        );
        fs::write(folder.join(name), text)?;
    }
    Ok(())
}

/// The text of every file, by name.
fn files(tsv: &str) -> [(&'static str, String); 4] {
    let facts = facts::facts(tsv);
    let mut random = SplitMix(0);
    let (mut text, mut text_heldout) = (Vec::new(), Vec::new());
    for fact in &facts {
        let mut phrasings = sentences::sentences(fact);
        if random.below(4) == 0 {
            text_heldout.push(phrasings.remove(random.below(phrasings.len())));
        }
        text.append(&mut phrasings);
    }
    random.shuffle(&mut text);
    random.shuffle(&mut text_heldout);

    let (mut train, mut heldout) = (Vec::new(), Vec::new());
    let asked_later = held_out_groups(&facts, &mut random);
    for fact in &facts {
        let lines = if asked_later.contains(&&*fact.group) {
            &mut heldout
        } else {
            &mut train
        };
        for question in triples::questions(fact, random.below(5)) {
            let instruction = question.instructions[random.below(3)];
            // Written by hand for the order of the keys.
            lines.push(format!(
                r#"{{"instruction": {}, "input": {}, "response": {}}}"#,
                json(instruction),
                json(&question.input),
                json(&question.response)
            ));
        }
    }
    random.shuffle(&mut train);
    random.shuffle(&mut heldout);
    let join = |lines: Vec<String>| lines.join("\n") + "\n";
    [
        ("pretrain.txt", join(text)),
        ("pretrain_heldout.txt", join(text_heldout)),
        ("train.jsonl", join(train)),
        ("heldout.jsonl", join(heldout)),
    ]
}

fn json(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// One in [`HELD_OUT`] of the groups of every relation.
fn held_out_groups<'f>(facts: &'f [Fact], random: &mut SplitMix) -> Vec<&'f str> {
    let mut relations: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for fact in facts {
        let relation = fact.group.split(' ').next().unwrap_or_default();
        let groups = relations.entry(relation).or_default();
        if !groups.contains(&&*fact.group) {
            groups.push(&fact.group);
        }
    }
    let mut chosen = Vec::new();
    for mut groups in relations.into_values() {
        random.shuffle(&mut groups);
        chosen.extend(groups.iter().take(groups.len() / HELD_OUT));
    }
    chosen
}

/// Sebastiano Vigna's SplitMix64: a few lines that give the same numbers everywhere and always.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_files_are_those_this_program_writes() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
        for (name, text) in files(&fs::read_to_string(folder.join("facts.tsv")).unwrap()) {
            // Not assert_eq: a difference would print both files.
            assert!(
                fs::read_to_string(folder.join(name)).unwrap() == text,
                "{name} is stale: run this example"
            );
        }
    }
}
