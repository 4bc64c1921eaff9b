//! Padded batches of pairs and judged answers, and the labels of their sequences.

use burn_peft::dataset::{
    Feedback, FeedbackExample, PaddedBatcher, PlainText, Preference, PreferenceExample,
    TokenizeConfig,
};

use super::bytes;

fn config() -> TokenizeConfig {
    TokenizeConfig::new().with_eos(36)
}

fn pairs(margins: [Option<f64>; 2]) -> Vec<PreferenceExample> {
    let rows = [("ab", "cd", "e"), ("f", "g", "hij")];
    rows.into_iter()
        .zip(margins)
        .map(|((prompt, chosen, rejected), margin)| {
            let mut row = Preference::new(prompt, chosen, rejected);
            row.margin = margin;
            config()
                .tokenize_preference(&row, &PlainText, bytes)
                .unwrap()
        })
        .collect()
}

#[test]
fn the_preferred_answers_come_first() {
    let made = PaddedBatcher::new(36)
        .collate_preferences(&pairs([Some(1.0), Some(0.5)]))
        .unwrap();
    assert_eq!((made.pairs, made.batch.rows, made.batch.columns), (2, 4, 4));
    assert_eq!(made.margins, Some(vec![1.0, 0.5]));
    let row = |row: usize| {
        let row = &made.batch.tokens[4 * row..][..4];
        row.iter()
            .map(|&token| token as u8 as char)
            .collect::<String>()
    };
    assert_eq!(
        [row(0), row(1), row(2), row(3)],
        ["abcd", "fg$$", "abe$", "fhij"]
    );
    // Position, token: the answers with their ends, although the padding is the end's token.
    let labels = made.batch.labels();
    assert_eq!(labels.lens, [3, 2, 2, 4]);
    let shown: Vec<Vec<(usize, char)>> = labels
        .sequences()
        .map(|pairs| {
            pairs
                .iter()
                .map(|&(at, token)| (at, token as u8 as char))
                .collect()
        })
        .collect();
    assert_eq!(shown[0], [(1, 'c'), (2, 'd'), (3, '$')]);
    assert_eq!(shown[1], [(4, 'g'), (5, '$')]);
    assert_eq!(shown[2], [(9, 'e'), (10, '$')]);
    assert_eq!(shown[3], [(12, 'h'), (13, 'i'), (14, 'j'), (15, '$')]);
}

#[test]
fn margins_are_for_all_pairs_or_none() {
    let batcher = PaddedBatcher::new(0);
    assert_eq!(
        batcher
            .collate_preferences(&pairs([None, None]))
            .unwrap()
            .margins,
        None
    );
    let error = batcher
        .collate_preferences(&pairs([Some(1.0), None]))
        .unwrap_err();
    assert!(
        error.to_string().contains("given for 1 of 2 pairs"),
        "{error}"
    );
}

#[test]
fn mismatched_answers_are_those_of_the_prompt_before() {
    let rows = [("ab", "cd", true), ("f", "g", false), ("h", "i", true)];
    let answers: Vec<FeedbackExample> = rows
        .into_iter()
        .map(|(prompt, answer, label)| {
            let row = Feedback::new(prompt, answer, label);
            config().tokenize_feedback(&row, &PlainText, bytes).unwrap()
        })
        .collect();
    let made = PaddedBatcher::new(0).collate_feedback(&answers).unwrap();
    assert_eq!(made.labels, [true, false, true]);
    let columns = made.mismatched.columns;
    let row = |row: usize| {
        let row = &made.mismatched.tokens[columns * row..][..columns];
        row.iter()
            .filter(|&&t| t != 0)
            .map(|&t| t as u8 as char)
            .collect::<String>()
    };
    assert_eq!([row(0), row(1), row(2)], ["abi", "fcd", "hg"]);
    assert_eq!(made.mismatched.labels().lens, [2, 3, 2]);
    // A batch of one would compare the answer with itself.
    let error = PaddedBatcher::new(0)
        .collate_feedback(&answers[..1])
        .unwrap_err();
    assert!(error.to_string().contains("at least 2"), "{error}");
}
