//! The data of the example `finetune` that is in the repository.

use std::collections::HashSet;
use std::path::PathBuf;

use burn_peft::dataset::{Instruction, read_json_lines};

fn data(name: &str) -> PathBuf {
    crate::repository().join("examples/data").join(name)
}

fn triples(name: &str) -> Vec<Instruction> {
    read_json_lines(data(name)).unwrap()
}

#[test]
fn no_held_out_question_is_trained_on_in_any_wording() {
    let (train, heldout) = (triples("train.jsonl"), triples("heldout.jsonl"));
    assert!(heldout.len() >= 200);
    // Not even the same input with the same response under another instruction.
    let known: HashSet<(&str, &str)> = train.iter().map(|t| (&*t.input, &*t.response)).collect();
    for triple in &heldout {
        assert!(
            !known.contains(&(&*triple.input, &*triple.response)),
            "{triple:?}"
        );
    }
    let instructions: HashSet<&str> = heldout.iter().map(|t| &*t.instruction).collect();
    assert!(
        instructions.len() >= 9,
        "three kinds in three wordings are the least"
    );
}

#[test]
fn the_task_is_no_string_copy() {
    // A few cannot be helped: the country of Mexico City is Mexico. At most 2 %.
    let heldout = triples("heldout.jsonl");
    let copies = heldout
        .iter()
        .filter(|t| t.input.contains(&t.response))
        .count();
    assert!(
        copies * 50 <= heldout.len(),
        "{copies} of {} responses stand in their input, more than 2 %",
        heldout.len()
    );
}

#[test]
fn the_base_was_never_shown_an_instruction() {
    let text = std::fs::read_to_string(data("pretrain.txt")).unwrap();
    let instructions: HashSet<String> = triples("train.jsonl")
        .into_iter()
        .chain(triples("heldout.jsonl"))
        .map(|t| t.instruction)
        .collect();
    for instruction in instructions {
        assert!(!text.contains(&instruction), "{instruction}");
    }
}

#[test]
fn the_base_is_small() {
    let bytes: u64 = std::fs::read_dir(data("base"))
        .unwrap()
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum();
    assert!(bytes <= 4 << 20, "{bytes} bytes");
}
