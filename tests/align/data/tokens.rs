//! Prompts and answers as tokens: limits, ends, merges, and what cannot be trained on.

use std::convert::Infallible;

use burn_peft::PeftError;
use burn_peft::dataset::{
    Boundary, ChatMl, Conversation, Feedback, Intake, JsonLines, Message, PlainText, Preference,
    PreferenceExample, Prompt, ResponseExample, RowFault, TokenizeConfig, Truncation,
};
use proptest::prelude::*;

use super::bytes;

/// Tokens as text, supervised ones in upper case; `^` is BOS, `$` is EOS.
fn show(answer: &ResponseExample) -> String {
    let example = answer.example();
    let pairs = example.tokens().iter().zip(example.supervised());
    let letter = |(&token, &supervised): (&u32, &bool)| {
        let c = char::from_u32(token).unwrap();
        if supervised {
            c.to_ascii_uppercase()
        } else {
            c
        }
    };
    pairs.map(letter).collect()
}

fn config() -> TokenizeConfig {
    TokenizeConfig::new()
        .with_bos('^'.into())
        .with_eos('$'.into())
}

fn pair(
    config: &TokenizeConfig,
    prompt: &str,
    chosen: &str,
    rejected: &str,
) -> Result<[String; 2], PeftError> {
    let row = Preference::new(prompt, chosen, rejected);
    let pair = config.tokenize_preference(&row, &PlainText, bytes)?;
    assert_eq!(pair.prompt(), pair.rejected().prompt());
    Ok([show(pair.chosen()), show(pair.rejected())])
}

fn fault(result: Result<[String; 2], PeftError>) -> (String, RowFault) {
    match result.unwrap_err() {
        PeftError::UnfitRow { field, fault } => (field, fault),
        other => panic!("{other}"),
    }
}

#[test]
fn the_end_is_learned_and_both_ends_stand_once() {
    assert_eq!(
        pair(&config(), "ab", "cd", "e").unwrap(),
        ["^abCD$", "^abE$"]
    );
    // The texts have them already.
    assert_eq!(
        pair(&config(), "^ab", "cd$", "e").unwrap(),
        ["^abCD$", "^abE$"]
    );
    let example = config()
        .tokenize_preference(&Preference::new("ab", "cd", "e"), &PlainText, bytes)
        .unwrap();
    assert_eq!(
        example.chosen().example().supervised(),
        [false, false, false, true, true, true]
    );
    assert_eq!(example.chosen().response(), b"cd$".map(u32::from));
}

#[test]
fn the_prompt_is_encoded_once_for_both_answers() {
    let mut encoded = Vec::new();
    let encode = |text: &str| {
        encoded.push(text.to_owned());
        bytes(text)
    };
    config()
        .tokenize_preference(&Preference::new("ab", "cd", "e"), &PlainText, encode)
        .unwrap();
    assert_eq!(encoded.iter().filter(|text| *text == "ab").count(), 1);
}

#[test]
fn messages_end_as_their_format_ends_them() {
    let row = Preference::new(
        vec![Message::new("user", "a")],
        vec![Message::new("assistant", "b")],
        vec![Message::new("assistant", "c")],
    );
    let pair = config().tokenize_preference(&row, &ChatMl, bytes).unwrap();
    assert_eq!(
        show(pair.chosen()),
        "^<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nB<|IM_END|>\n"
    );
    let prompt = Prompt::new(vec![Message::new("user", "a")]);
    assert_eq!(
        config().tokenize_prompt(&prompt, &ChatMl, bytes).unwrap(),
        pair.prompt()
    );
    // Messages need a format.
    let error = config()
        .tokenize_preference(&row, &PlainText, bytes)
        .unwrap_err();
    assert!(error.to_string().contains("`ChatMl`"), "{error}");

    let talk = Conversation::new(vec![
        Message::new("user", "a"),
        Message::new("assistant", "b"),
    ]);
    let example = config()
        .tokenize_conversation(&talk, &ChatMl, bytes)
        .unwrap();
    assert_eq!(example.tokens(), pair.chosen().example().tokens());
    assert_eq!(example.supervised(), pair.chosen().example().supervised());
}

#[test]
fn calls_of_tools_are_not_lost_in_chatml() {
    let mut call = Message::new("assistant", "");
    call.extra
        .insert("tool_calls".into(), serde_json::json!([]));
    let talk = Conversation::new(vec![Message::new("user", "a"), call]);
    let error = config()
        .tokenize_conversation(&talk, &ChatMl, bytes)
        .unwrap_err();
    assert!(error.to_string().contains("calls of tools"), "{error}");
}

#[test]
fn limits_refuse_or_keep_what_they_say() {
    let limited = |truncation, limit| config().with_max_tokens(limit).with_truncation(truncation);
    let whole = ["^abcDEF$", "^abcG$"];
    assert_eq!(
        pair(&limited(Truncation::Refuse, 8), "abc", "def", "g").unwrap(),
        whole
    );
    let refused = fault(pair(&limited(Truncation::Refuse, 7), "abc", "def", "g"));
    assert_eq!(
        refused,
        (
            "chosen".into(),
            RowFault::TooLong {
                tokens: 8,
                limit: 7
            }
        )
    );
    let refused = fault(pair(&limited(Truncation::Refuse, 4), "abc", "def", "g"));
    assert_eq!(
        refused,
        (
            "prompt".into(),
            RowFault::PromptTooLong {
                tokens: 4,
                limit: 4
            }
        )
    );

    assert_eq!(
        pair(&limited(Truncation::KeepStart, 6), "abc", "def", "g").unwrap(),
        ["^abcDE", "^abcG$"]
    );
    let refused = fault(pair(&limited(Truncation::KeepStart, 4), "abc", "def", "g"));
    assert_eq!(
        refused,
        (
            "prompt".into(),
            RowFault::PromptTooLong {
                tokens: 4,
                limit: 4
            }
        )
    );
    // What is left of both answers is the same.
    let same = fault(pair(&limited(Truncation::KeepStart, 5), "abc", "de", "df"));
    assert_eq!(same, ("chosen".into(), RowFault::SameAnswers));

    // As much is cut from the prompt of both answers.
    assert_eq!(
        pair(&limited(Truncation::KeepEnd, 6), "abc", "def", "g").unwrap(),
        ["^cDEF$", "^cG$"]
    );
    let refused = fault(pair(&limited(Truncation::KeepEnd, 5), "abc", "def", "g"));
    assert_eq!(
        refused,
        (
            "chosen".into(),
            RowFault::TooLong {
                tokens: 8,
                limit: 5
            }
        )
    );

    let prompt = |truncation, limit| {
        limited(truncation, limit).tokenize_prompt(&Prompt::new("abc"), &PlainText, bytes)
    };
    assert_eq!(
        prompt(Truncation::KeepEnd, 3).unwrap(),
        b"^bc".map(u32::from)
    );
    assert_eq!(
        prompt(Truncation::KeepStart, 3).unwrap(),
        b"^ab".map(u32::from)
    );
    assert!(prompt(Truncation::Refuse, 3).is_err());
    assert!(prompt(Truncation::KeepEnd, 1).is_err());
}

#[test]
fn what_cannot_be_trained_on_is_named() {
    let plain = TokenizeConfig::new();
    assert_eq!(
        fault(pair(&plain, "", "a", "b")),
        ("prompt".into(), RowFault::EmptyPrompt)
    );
    assert_eq!(
        fault(pair(&config(), "p", "", "b")),
        ("chosen".into(), RowFault::EmptyAnswer)
    );
    assert_eq!(
        fault(pair(&config(), "p", "a", "")),
        ("rejected".into(), RowFault::EmptyAnswer)
    );
    assert_eq!(
        fault(pair(&config(), "p", "a", "a")),
        ("chosen".into(), RowFault::SameAnswers)
    );
    // Two texts, but the tokenizer makes them the same.
    let row = Preference::new("p", "a", "A");
    let error = config()
        .tokenize_preference(&row, &PlainText, |text| bytes(&text.to_lowercase()))
        .unwrap_err();
    assert!(
        matches!(
            error,
            PeftError::UnfitRow {
                fault: RowFault::SameAnswers,
                ..
            }
        ),
        "{error}"
    );
    let mut row = Preference::new("p", "a", "b");
    row.margin = Some(f64::INFINITY);
    let error = config()
        .tokenize_preference(&row, &PlainText, bytes)
        .unwrap_err();
    assert!(error.to_string().contains("margin"), "{error}");
}

/// A token per byte, but "bc" is one.
fn merging(text: &str) -> Result<Vec<u32>, Infallible> {
    let text = text.replace("bc", "\u{1}");
    bytes(&text)
}

#[test]
fn a_merge_across_the_boundary_is_reported_and_not_made() {
    let row = Preference::new("ab", "cd", "d");
    let pair = config()
        .tokenize_preference(&row, &PlainText, merging)
        .unwrap();
    assert_eq!(pair.chosen().boundary(), Boundary::Merged);
    assert_eq!(pair.rejected().boundary(), Boundary::Clean);
    assert_eq!(show(pair.chosen()), "^abCD$");
    let place = JsonLines::<_, Prompt>::new(&b"{\"prompt\": \"\"}"[..], "x")
        .next()
        .unwrap()
        .unwrap()
        .place;
    let mut intake = Intake::new();
    intake.take(&place, Ok(pair)).unwrap();
    assert_eq!(intake.merged(), 1);
    assert!(
        intake.to_string().contains("1 of them with tokens merged"),
        "{intake}"
    );
}

#[test]
fn unfit_rows_end_the_reading_or_are_skipped_and_counted() {
    let text = br#"{"prompt": "p", "chosen": "a", "rejected": "b"}
{"prompt": "p", "chosen": "a", "rejected": ""}
{"prompt": "p", "chosen": "a", "rejected": "a"}
{"prompt": "pppppppp", "chosen": "a", "rejected": "b"}
{"prompt": "p", "chosen": "", "rejected": "b"}
"#;
    let config = config().with_max_tokens(8);
    let read = |mut intake: Intake| -> Result<(Vec<PreferenceExample>, Intake), PeftError> {
        let mut pairs = Vec::new();
        for row in JsonLines::<_, Preference>::new(&text[..], "data/pairs.jsonl") {
            let row = row?;
            let pair = config.tokenize_preference(&row.row, &PlainText, bytes);
            pairs.extend(intake.take(&row.place, pair)?);
        }
        Ok((pairs, intake))
    };
    let error = read(Intake::new()).unwrap_err();
    assert!(matches!(&error, PeftError::InRow { row: 2, .. }), "{error}");
    assert!(
        error
            .to_string()
            .starts_with("data/pairs.jsonl:2: `rejected` has no text"),
        "{error}"
    );
    let (pairs, intake) = read(Intake::new().with_skip(true)).unwrap();
    assert_eq!((pairs.len(), intake.kept(), intake.skipped()), (1, 1, 4));
    assert_eq!(
        intake.to_string(),
        "5 rows: 1 kept, 4 skipped (1 for answers of the same tokens, first data/pairs.jsonl:3; 2 for empty answer, first \
         data/pairs.jsonl:2; 1 for prompt too long, first data/pairs.jsonl:4)"
    );
    // A tokenizer that fails is no unfit row.
    let failing = |_: &str| Err::<Vec<u32>, _>("no vocabulary");
    let mut intake = Intake::new().with_skip(true);
    let row = JsonLines::<_, Preference>::new(&text[..], "x")
        .next()
        .unwrap()
        .unwrap();
    let made = config.tokenize_preference(&row.row, &PlainText, failing);
    assert!(
        intake
            .take(&row.place, made)
            .unwrap_err()
            .to_string()
            .contains("no vocabulary")
    );
}

#[test]
fn labels_stay_with_their_answers() {
    let row = Feedback::new("p", "a", false);
    let example = config().tokenize_feedback(&row, &PlainText, bytes).unwrap();
    assert_eq!(
        (show(example.answer()).as_str(), example.label()),
        ("^pA$", false)
    );
}

proptest! {
    /// Whatever the limit, both answers follow the same prompt, keep something to learn and the limit, and are not the same.
    #[test]
    fn no_limit_leaves_garbage(
        prompt in "[a-c]{0,6}", chosen in "[a-c]{0,6}", rejected in "[a-c]{0,6}",
        limit in 0usize..14, bos: bool, eos: bool, truncation in 0usize..3,
    ) {
        let mut config = TokenizeConfig::new();
        config.bos = bos.then_some('^'.into());
        config.eos = eos.then_some('$'.into());
        config.max_tokens = Some(limit);
        config.truncation = [Truncation::Refuse, Truncation::KeepStart, Truncation::KeepEnd][truncation];
        let row = Preference::new(prompt.as_str(), chosen.as_str(), rejected.as_str());
        match config.tokenize_preference(&row, &PlainText, bytes) {
            Ok(pair) => {
                prop_assert!(!pair.prompt().is_empty());
                prop_assert_eq!(pair.prompt(), pair.rejected().prompt());
                prop_assert!(pair.chosen().response() != pair.rejected().response());
                for answer in [pair.chosen(), pair.rejected()] {
                    prop_assert!(answer.example().tokens().len() <= limit);
                    prop_assert!(answer.example().supervised_count() >= 1);
                    prop_assert_eq!(answer.example().supervised_count(), answer.response().len());
                }
            }
            Err(error) => prop_assert!(matches!(error, PeftError::UnfitRow { .. }), "{}", error),
        }
    }
}
