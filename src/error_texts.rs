//! The text of every error, as a user reads it, held to `tests/snapshots/errors.txt`.
//!
//! A new variant needs a row in [`samples`]: without it this file does not compile. `UPDATE_SNAPSHOTS=1` rewrites the snapshot:
//!
//! ```text
//! UPDATE_SNAPSHOTS=1 cargo test --release -p burn-peft --lib error::texts
//! ```

use std::io::{Error as IoError, ErrorKind};
use std::path::{Path, PathBuf};

use super::*;
use crate::adapter::LoraConfig;
use crate::dataset::RowFault;
use crate::format::Mismatch;

/// Declares the samples by variant, and a match over all variants that compiles only if none is missing.
macro_rules! samples {
    ($($variant:ident: $($sample:expr),+;)+) => {
        fn variant(error: &PeftError) -> &'static str {
            match error {
                $(PeftError::$variant { .. } => stringify!($variant),)+
            }
        }

        fn samples() -> Vec<(&'static str, PeftError)> {
            vec![$($((stringify!($variant), $sample)),+),+]
        }
    };
}

#[cfg(not(feature = "optim"))]
compile_error!("the tests of this crate need the feature `optim`");

fn unfit(fault: RowFault) -> PeftError {
    PeftError::UnfitRow {
        field: "chosen".into(),
        fault,
    }
}

samples! {
    NotFinite: PeftError::NotFinite {
        tensor: "model.layers.0.mlp.up_proj.weight".into(),
        index: 17,
        value: f32::NAN,
    };
    Diverged:
        PeftError::Diverged {
            step: 12,
            what: "the loss".into(),
            value: f32::NAN,
        },
        PeftError::NotFinite {
            tensor: "gradient of layers.0.up.weight.peft.default.a".into(),
            index: 3,
            value: f32::INFINITY,
        }
        .at_step(12);
    Overflow: PeftError::Overflow {
        tensor: "model.layers.0.mlp.up_proj.weight".into(),
        index: 17,
        value: 70000.0,
        dtype: "F16".into(),
        way_out: "load it as BF16 or F32 by `BaseOptions::with_dtype`",
    };
    BlockSize: PeftError::BlockSize { found: 48 };
    Shape: PeftError::Shape {
        tensor: "model.layers.0.mlp.up_proj.weight".into(),
        expected: vec![64, 32],
        found: vec![32, 64],
    };
    DType: PeftError::DType {
        tensor: "model.embed_tokens.weight".into(),
        expected: "F32, BF16 or F16".into(),
        found: "I64".into(),
    };
    Config:
        LoraConfig::new(0).validate().unwrap_err(),
        LoraConfig::new(8).with_alpha(f64::NAN).validate().unwrap_err(),
        LoraConfig::new(8).with_dropout(1.0).validate().unwrap_err(),
        PeftError::config("a\u{1b}[2J", "\n", "no control character of a file reaches a terminal");
    Io: PeftError::io(Path::new("out/adapter"))(IoError::new(
        ErrorKind::PermissionDenied,
        "permission denied",
    ));
    AdapterName: PeftError::AdapterName {
        name: "a/b".into(),
        reason: "it holds '/'; only letters, digits, `_` and `-` are allowed".into(),
    };
    UnknownAdapter:
        PeftError::UnknownAdapter {
            name: "sql".into(),
            adapters: vec!["default".into(), "chat".into()],
        },
        PeftError::UnknownAdapter {
            name: "sql".into(),
            adapters: vec![],
        };
    UnknownModule: PeftError::UnknownModule {
        path: "layers.0.q".into(),
    };
    ForeignReparameterization: PeftError::ForeignReparameterization {
        path: "layers.0.q_proj.weight".into(),
        name: "lora".into(),
    };
    NotTheBase: PeftError::NotTheBase {
        path: "layers.0.q_proj.weight".into(),
        change: 0.25,
    };
    AlreadyQuantized: PeftError::AlreadyQuantized {
        path: "layers.0.q_proj.weight".into(),
    };
    Pattern: PeftError::Pattern {
        option: "target_modules",
        pattern: "(q_proj".into(),
        reason: "unclosed group".into(),
    };
    PatternMatch: PeftError::PatternMatch {
        option: "target_modules",
        pattern: "(a+)+(?!b)".into(),
        path: "layers.0.q_proj".into(),
        reason: "it took more than 1000000 steps".into(),
    };
    UnmatchedPatterns: PeftError::UnmatchedPatterns {
        patterns: vec![
            UnmatchedPattern {
                option: "target_modules",
                pattern: "query".into(),
                nearest: vec!["q_proj".into()],
            },
            UnmatchedPattern {
                option: "exclude_modules",
                pattern: "head".into(),
                nearest: vec![],
            },
        ],
    };
    NoTargets: PeftError::NoTargets {
        candidates: 14,
        excluded: 14,
    };
    JsonLine: PeftError::JsonLine {
        path: PathBuf::from("data/train.jsonl"),
        line: 3,
        reason: "missing field `response` at column 40".into(),
    };
    InRow: PeftError::UnfitRow {
        field: "chosen".into(),
        fault: RowFault::EmptyAnswer,
    }
    .at_row(&crate::dataset::Place {
        path: Path::new("data/pairs.jsonl").into(),
        row: 17,
    });
    UnfitRow: unfit(RowFault::EmptyPrompt), unfit(RowFault::EmptyAnswer), unfit(RowFault::SameAnswers),
        unfit(RowFault::PromptTooLong { tokens: 600, limit: 512 }), unfit(RowFault::TooLong { tokens: 600, limit: 512 }),
        unfit(RowFault::NothingSupervised);
    ChatTemplate: PeftError::ChatTemplate {
        name: "model/chat_template.jinja".into(),
        reason: "line 3: the template refuses the messages: turns must alternate".into(),
    };
    Tokenizer: PeftError::Tokenizer {
        text: "### Instruction:".into(),
        source: "no token for this text".into(),
    };
    TooLong: PeftError::TooLong {
        tokens: 300,
        limit: 256,
    };
    NoSupervisedTokens: PeftError::NoSupervisedTokens { tokens: 24 };
    TokenRange: PeftError::TokenRange {
        token: -100,
        row: 1,
        column: 7,
        vocabulary: 32_000,
    };
    Prompt: PeftError::Prompt {
        index: 3,
        reason: "it has 600 tokens, at most 512 are allowed: raise `Stop::max_prompt_tokens`, or leave it out".into(),
    };
    Logits: PeftError::Logits {
        prompt: 3,
        copy: 1,
        step: 17,
        token: 0,
        value: f32::NAN,
    };
    Reward: PeftError::Reward {
        reward: "exact match".into(),
        row: 5,
        reason: "its score is NaN".into(),
    };
    DeviceRead: PeftError::DeviceRead {
        tensor: "loss".into(),
        reason: "the device is lost".into(),
    };
    InModule: PeftError::InModule {
        path: "layers.0.q_proj".into(),
        source: Box::new(LoraConfig::new(0).validate().unwrap_err()),
    };
    Decomposition: PeftError::Decomposition {
        tensor: "layers.0.q_proj.weight".into(),
        reason: "the singular values do not converge".into(),
    };
    InFile: PeftError::config("r", 0, "1 to 65536").in_file(Path::new("adapter/adapter_config.json"));
    Malformed: PeftError::Malformed {
        path: PathBuf::from("adapter/adapter_model.safetensors"),
        reason: "a header of 2336927755350992246 bytes in a file of 133".into(),
    };
    Json: PeftError::json(serde_json::from_str::<Vec<u8>>("[1, 2").unwrap_err());
    UnsupportedKey: PeftError::UnsupportedKey {
        key: "use_qalora".into(),
        value: "true".into(),
        reason: "it would change the shapes of the factors".into(),
    };
    Incomplete: PeftError::Incomplete {
        report: Box::new(LoadReport {
            loaded: vec!["a".into()],
            missing: vec!["base_model.model.layers.1.q_proj.lora_A.weight".into()],
            unexpected: vec!["base_model.model.layers.9.q_proj.lora_A.weight".into()],
            mismatched: vec![Mismatch {
                tensor: "base_model.model.layers.0.q_proj.lora_B.weight".into(),
                expected: vec![64, 8],
                found: vec![32, 8],
            }],
            left_out: vec!["base_model.model.layers.0.q_proj.lora_A.weight".into()],
            ..LoadReport::default()
        }),
    };
    BaseMismatch: PeftError::BaseMismatch {
        path: PathBuf::from("base/model.safetensors"),
        report: Box::new(base_mismatch()),
    };
    Index: PeftError::Index {
        path: PathBuf::from("base/model.safetensors.index.json"),
        faults: vec![
            IndexFault::MissingShard {
                file: "model-00002-of-00002.safetensors".into(),
            },
            IndexFault::TotalSize {
                stated: "100".into(),
                found: 96,
            },
        ],
    };
    Digest: PeftError::Digest {
        path: PathBuf::from("adapter/adapter_model.safetensors"),
        expected: "the digest 0123".into(),
        found: "4567".into(),
    };
    Stale: PeftError::Stale {
        path: PathBuf::from("data/reference.safetensors"),
        expected: "0123".into(),
        found: "4567".into(),
    };
    Occupied: PeftError::Occupied {
        path: PathBuf::from("adapter/adapter_config.json"),
        reason: "the configuration of another method, \"IA3\"".into(),
    };
    Exists: PeftError::Exists {
        path: PathBuf::from("adapter/adapter_config.json"),
    };
    OtherRun: PeftError::OtherRun {
        differences: vec![crate::resume::Difference {
            what: "adapter `default` of `layers.0.q_proj`".into(),
            checkpoint: Some("rank 8".into()),
            here: Some("rank 16".into()),
        }],
    };
    OptimizerState: PeftError::OptimizerState {
        reason: "`layers.0.norm.gamma` trains and is no adapter's: a checkpoint would not hold it".into(),
    };
}

fn base_mismatch() -> BaseMismatch {
    let mut report = BaseMismatch::default();
    report.fitting = 10;
    report.missing = vec!["model.norm.weight".into()];
    report.unexpected = vec!["model.final_norm.weight".into()];
    report.shapes = vec![Mismatch {
        tensor: "model.embed_tokens.weight".into(),
        expected: vec![1024, 128],
        found: vec![1000, 128],
    }];
    report
}

#[test]
fn every_error_reads_as_in_the_snapshot() {
    let mut text = String::from(
        "The text of every error. Rewritten by `UPDATE_SNAPSHOTS=1 cargo test --release -p burn-peft --lib error::texts`.\n",
    );
    for (name, error) in samples() {
        assert_eq!(variant(&error), name);
        text += &format!("\n{name}\n    {error}\n");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/errors.txt");
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    for (found, expected) in text.lines().zip(expected.lines()) {
        assert_eq!(
            found, expected,
            "if it is better so, set UPDATE_SNAPSHOTS=1"
        );
    }
    assert_eq!(text, expected, "if it is better so, set UPDATE_SNAPSHOTS=1");
}

/// No text of a file may move a terminal's cursor, and every message is one line.
#[test]
fn every_error_is_one_line_without_control_characters() {
    for (name, error) in samples() {
        let text = error.to_string();
        assert!(!text.chars().any(char::is_control), "{name}: {text:?}");
        assert!(!text.ends_with('.') && !text.is_empty(), "{name}: {text}");
    }
}
