//! The triples of one run, checked and tokenised.

use std::collections::HashSet;
use std::error::Error;
use std::fs;

use burn_peft::dataset::{Example, Instruction, read_json_lines};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::args::Args;
use crate::prompt::Prompter;
use llama::text;

/// Tokens in a window of the base's own text.
const TEXT_WINDOW: usize = 128;

/// What a run trains on and what it is measured on.
pub struct Data {
    /// Training triples, tokenised.
    pub train: Vec<Example>,
    /// Held-out triples.
    pub heldout: Vec<Instruction>,
    /// The same, tokenised with their responses, after the examples of `--few-shot`.
    pub heldout_examples: Vec<Example>,
    /// Windows of text of the base's own task; empty if there is no such text.
    pub text: Vec<Example>,
}

impl Data {
    /// Reads, checks and tokenises the files that `args` names, and says on the terminal what there is.
    ///
    /// # Errors
    ///
    /// When a file cannot be read, when nothing is left of it, or when a held-out triple has the instruction and the
    /// input of a training triple.
    pub fn load(args: &Args, prompter: &Prompter) -> Result<Self, Box<dyn Error>> {
        let mut train: Vec<Instruction> = read_json_lines(&args.data)?;
        let mut heldout: Vec<Instruction> = read_json_lines(args.heldout_path())?;
        check_disjoint(&train, &heldout)?;
        heldout.truncate(args.eval.unwrap_or(usize::MAX));
        let copies = heldout
            .iter()
            .filter(|triple| triple.input.contains(&triple.response))
            .count();

        let shots: Vec<Instruction> = train
            .iter()
            .take(args.few_shot.unwrap_or(0))
            .cloned()
            .collect();
        if args.shuffle_responses {
            shuffle_responses(&mut train, args.seed);
        }
        let (_, examples) = tokenize(train, &[], args.seq_len, prompter)?;
        let (heldout, heldout_examples) = tokenize(heldout, &shots, args.seq_len, prompter)?;
        if examples.is_empty() || heldout.is_empty() {
            return Err(format!(
                "no triple of at most {} tokens to train on, or none held out",
                args.seq_len
            )
            .into());
        }
        let text = match args.text_path() {
            Some(path) => text::windows(
                fs::read_to_string(path)?.lines(),
                &prompter.tokenizer,
                prompter.eos[0],
                TEXT_WINDOW,
            )?,
            None => Vec::new(),
        };
        println!(
            "{} training triples, {} held out; {copies} of these responses can be copied from their input",
            examples.len(),
            heldout.len(),
        );
        Ok(Self {
            train: examples,
            heldout,
            heldout_examples,
            text,
        })
    }
}

/// An error if a question is in both.
fn check_disjoint(train: &[Instruction], heldout: &[Instruction]) -> Result<(), String> {
    let question = |triple: &Instruction| (triple.instruction.clone(), triple.input.clone());
    let known: HashSet<_> = train.iter().map(question).collect();
    match heldout
        .iter()
        .find(|triple| known.contains(&question(triple)))
    {
        Some(triple) => Err(format!(
            "held-out question {:?} {:?} is also trained on",
            triple.instruction, triple.input
        )),
        None => Ok(()),
    }
}

/// Gives every triple the response of another.
fn shuffle_responses(triples: &mut [Instruction], seed: u64) {
    let mut order: Vec<usize> = (0..triples.len()).collect();
    order.shuffle(&mut StdRng::seed_from_u64(seed));
    let responses: Vec<String> = triples
        .iter()
        .map(|triple| triple.response.clone())
        .collect();
    for (&to, &from) in order.iter().zip(order.iter().cycle().skip(1)) {
        triples[to].response.clone_from(&responses[from]);
    }
}

/// Tokenises the triples, after the `shots`, and leaves out those that are too long without them.
fn tokenize(
    triples: Vec<Instruction>,
    shots: &[Instruction],
    seq_len: usize,
    prompter: &Prompter,
) -> burn_peft::Result<(Vec<Instruction>, Vec<Example>)> {
    let total = triples.len();
    let mut kept = (Vec::new(), Vec::new());
    for triple in triples {
        if prompter.example(&triple, &[])?.tokens().len() <= seq_len {
            kept.1.push(prompter.example(&triple, shots)?);
            kept.0.push(triple);
        }
    }
    if kept.0.len() < total {
        println!(
            "{} of {total} triples have more than {seq_len} tokens and are left out",
            total - kept.0.len()
        );
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn triples(responses: &[&str]) -> Vec<Instruction> {
        let triple = |(i, response): (usize, &&str)| Instruction {
            instruction: "Do.".into(),
            input: i.to_string(),
            response: response.to_string(),
        };
        responses.iter().enumerate().map(triple).collect()
    }

    #[test]
    fn a_question_in_both_is_an_error() {
        let train = triples(&["a", "b"]);
        let error = check_disjoint(&train, &train[1..]).unwrap_err();
        assert!(error.contains("\"Do.\" \"1\""), "{error}");
        assert!(check_disjoint(&train[..1], &train[1..]).is_ok());
    }

    #[test]
    fn shuffling_leaves_no_response_in_its_place_and_loses_none() {
        let before = triples(&["a", "b", "c", "d", "e"]);
        let mut after = before.clone();
        shuffle_responses(&mut after, 7);
        assert!(
            before
                .iter()
                .zip(&after)
                .all(|(b, a)| b.response != a.response && b.input == a.input)
        );
        let mut responses: Vec<String> = after.into_iter().map(|triple| triple.response).collect();
        responses.sort();
        assert_eq!(responses, ["a", "b", "c", "d", "e"]);
    }
}
