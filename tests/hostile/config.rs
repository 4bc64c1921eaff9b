//! H10: configurations that are none, say what no adapter has, or are made to be expensive.

use std::fs;

use burn_peft::PeftError;
use burn_peft::format::{CONFIG_FILE, MAX_CONFIG_BYTES};
use serde_json::{Value, json};

use super::Scratch;
use super::victim::Victim;

// H10
#[test]
fn a_configuration_that_is_missing_or_no_file_is_refused() {
    let scratch = Scratch::new();
    fs::remove_file(scratch.file(CONFIG_FILE)).unwrap();
    let error = scratch.refused();
    assert!(
        matches!(&error, PeftError::Io { path, .. } if *path == scratch.file(CONFIG_FILE)),
        "{error}"
    );
    fs::create_dir(scratch.file(CONFIG_FILE)).unwrap();
    assert_eq!(scratch.malformed(CONFIG_FILE), "not a regular file");
}

// H10
#[test]
fn a_configuration_above_its_limit_is_not_read() {
    let scratch = Scratch::new();
    let text = scratch.bytes(CONFIG_FILE);
    let padded = |n: u64| [&text[..], &vec![b' '; n as usize - text.len()]].concat();
    scratch.config(padded(MAX_CONFIG_BYTES));
    assert!(scratch.read().is_ok());
    scratch.config(padded(MAX_CONFIG_BYTES + 1));
    assert_eq!(
        scratch.malformed(CONFIG_FILE),
        "16777217 bytes: at most 16777216 are read"
    );
    // Ten megabytes of an expression are within that limit and above that of an expression.
    let scratch = Scratch::new();
    scratch.set("target_modules", json!("(a|b)*".repeat((10 << 20) / 6)));
    let error = scratch.refused_in(CONFIG_FILE).to_string();
    assert!(
        error.contains("10485756 bytes long, at most 65536 are allowed"),
        "{error}"
    );
}

// H10
#[test]
fn texts_that_are_no_configuration_are_refused() {
    let nested = format!(
        r#"{{"peft_type": "LORA", "auto_mapping": {}{}}}"#,
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    for text in [
        "",
        "{",
        "[]",
        "3",
        "null",
        "not JSON",
        "{} {}",
        "{'r': 8}",
        r#"{"peft_type": "LORA", "target_modules": ["q"]} x"#,
        r#"{"peft_type": "LORA", "target_modules": ["q"],}"#,
        &nested,
    ] {
        let scratch = Scratch::new();
        scratch.config(text);
        let error = scratch.refused_in(CONFIG_FILE);
        assert!(matches!(error, PeftError::Json { .. }), "{text:?}: {error}");
    }
    let scratch = Scratch::new();
    scratch.config("\u{feff}{}");
    let reason = scratch.malformed(CONFIG_FILE);
    assert!(reason.contains("byte-order mark"), "{reason}");
    let scratch = Scratch::new();
    scratch.config(b"{\"peft_type\": \"\xff\"}");
    assert!(matches!(
        scratch.refused_in(CONFIG_FILE),
        PeftError::Json { .. }
    ));
}

// H10
#[test]
fn a_key_that_stands_twice_is_refused_and_named() {
    for (more, named) in [
        (r#""r": 2"#, "r"),
        (r#""r": 4"#, "r"),
        (r#""\u0072": 4"#, "r"),
        (r#""target_modules": ["value"]"#, "target_modules"),
        (r#""new": {"x": 1, "x": 1}"#, "x"),
        (r#""rank_pattern": {"a": 1, "b": 2, "a": 3}"#, "a"),
    ] {
        let scratch = Scratch::new();
        let text = String::from_utf8(scratch.bytes(CONFIG_FILE)).unwrap();
        let text = if named == "a" {
            let empty = r#""rank_pattern": {}"#;
            assert!(text.contains(empty));
            text.replace(empty, more)
        } else {
            text.replacen('{', &format!("{{{more},"), 1)
        };
        scratch.config(&text);
        // Others read it: the last of the two wins.
        assert!(serde_json::from_str::<Value>(&text).is_ok());
        let error = scratch.refused_in(CONFIG_FILE).to_string();
        assert!(
            error.contains(&format!("the key `{named}` stands twice")),
            "{error}"
        );
    }
}

// H10
#[test]
fn values_out_of_range_are_refused_and_named() {
    for (key, value) in [
        ("peft_type", Value::Null),
        ("r", json!(0)),
        ("r", json!(-1)),
        ("r", json!(1e18)),
        ("r", json!(1_000_000_000_000_000_000_u64)),
        ("r", json!(u64::MAX)),
        ("r", json!(65537)),
        ("r", json!(2.0)),
        ("r", json!(8.5)),
        ("r", json!(true)),
        ("r", json!("2")),
        ("r", json!([2])),
        ("lora_alpha", json!("NaN")),
        ("lora_alpha", json!("Infinity")),
        ("lora_alpha", json!(true)),
        ("lora_alpha", json!("16")),
        // Finite in f64 and not in f32, in which the scale is applied.
        ("lora_alpha", json!(1e39)),
        ("lora_alpha", json!(-1e300)),
        ("lora_dropout", json!(1.0)),
        ("lora_dropout", json!(1e300)),
        ("lora_dropout", json!(-0.1)),
        ("lora_dropout", json!("0.1")),
        ("use_rslora", json!("yes")),
        ("use_rslora", json!(1)),
        ("use_dora", json!(0)),
        ("init_lora_weights", json!(3)),
        ("task_type", json!(3)),
        ("target_modules", Value::Null),
        ("rank_pattern", json!({"q": 0})),
        ("rank_pattern", json!({"q": 65537})),
        ("alpha_pattern", json!({"q": 1e300})),
        ("layers_pattern", json!("layers")),
        ("bias", json!("some")),
        ("lora_bias", json!("yes")),
        ("modules_to_save", json!("norm")),
        ("modules_to_save", json!(vec!["norm"; 1025])),
        ("target_parameters", json!(vec!["experts.up"; 1025])),
        ("target_parameters", json!({"experts": 1})),
        ("trainable_token_indices", json!([-1])),
        ("trainable_token_indices", json!("5")),
        ("trainable_token_indices", json!({"embed": 5})),
        ("ensure_weight_tying", json!(1)),
    ] {
        let scratch = Scratch::new();
        scratch.set(key, value.clone());
        match scratch.refused_in(CONFIG_FILE) {
            PeftError::Config { name, .. } => assert_eq!(name, key, "{value}"),
            other => panic!("{key} = {value}: {other}"),
        }
    }
}

// H10
#[test]
fn numbers_that_json_has_not_are_refused_with_their_place() {
    let scratch = Scratch::new();
    let text = String::from_utf8(scratch.bytes(CONFIG_FILE)).unwrap();
    for number in [
        "1e400", "-1e400", "NaN", "Infinity", "0x10", "01", "1.", "+1", "1e", "--1",
    ] {
        let with = text.replace(
            r#""lora_alpha": 0.5"#,
            &format!(r#""lora_alpha": {number}"#),
        );
        assert_ne!(with, text);
        let error = scratch.config(&with).refused_in(CONFIG_FILE).to_string();
        // The line of the key, of the 41 that are sorted.
        let line = with
            .lines()
            .position(|line| line.contains("lora_alpha"))
            .unwrap()
            + 1;
        assert!(
            error.contains(&format!("line {line} ")),
            "{number}: {error}"
        );
    }
}

// H10
#[test]
fn targets_of_other_kinds_are_refused() {
    for value in [
        json!(3),
        json!(["query", 3]),
        json!({"query": 1}),
        json!(true),
    ] {
        let scratch = Scratch::new();
        scratch.set("target_modules", value);
        assert!(matches!(
            scratch.refused_in(CONFIG_FILE),
            PeftError::Json { .. }
        ));
    }
    let scratch = Scratch::new();
    scratch.set("rank_pattern", json!({"query": -1}));
    assert!(matches!(
        scratch.refused_in(CONFIG_FILE),
        PeftError::Json { .. }
    ));
}

// H10
#[test]
fn other_methods_and_what_changes_the_mathematics_are_refused_and_named() {
    for (key, value) in [
        ("peft_type", json!("IA3")),
        ("peft_type", json!("lora")),
        ("peft_type", json!("LoRA")),
        ("peft_type", json!(["LORA"])),
        ("peft_type", json!("LORA\u{0}")),
        ("init_lora_weights", json!("invented_later")),
        ("layer_replication", json!([[0, 2], [1, 3]])),
        ("use_qalora", json!(true)),
        ("invented_later", json!(true)),
        ("invented\u{1b}[31m", json!("\u{1b}")),
    ] {
        let scratch = Scratch::new();
        scratch.set(key, value.clone());
        match scratch.refused_in(CONFIG_FILE) {
            PeftError::UnsupportedKey { key: named, .. } => {
                assert_eq!(named, key.escape_debug().to_string(), "{value}");
            }
            other => panic!("{key} = {value}: {other}"),
        }
    }
}

// H10
#[test]
fn expressions_that_are_none_or_too_large_are_refused() {
    let classes = r"(\w{1,100}){1,100}";
    for (option, pattern) in [
        ("target_modules", "(".to_owned()),
        ("target_modules", "a{1000}{1000}{1000}".to_owned()),
        ("target_modules", classes.to_owned()),
        ("target_modules", "(a|b)*".repeat(20_000)),
        ("target_modules", format!("(?=a){}", "(a|b)*".repeat(1000))),
        ("target_modules", "(".repeat(5_000) + &")".repeat(5_000)),
        ("target_modules", format!("(?={classes}).*")),
        ("exclude_modules", r"\p{L}{1,1000}".repeat(50)),
    ] {
        let scratch = Scratch::new();
        scratch.set(option, json!(pattern));
        match scratch.refused_compiling() {
            PeftError::Pattern { option: named, .. } => assert_eq!(named, option),
            other => panic!("{option} = {:.40}: {other}", pattern),
        }
    }
    // Many of them, each within its bounds.
    let scratch = Scratch::new();
    let many: Value = (0..10_000)
        .map(|i| (format!("a.*{i}"), json!(1)))
        .collect::<serde_json::Map<_, _>>()
        .into();
    scratch.set("rank_pattern", many);
    match scratch.refused_compiling() {
        PeftError::Config { name, .. } => assert_eq!(name, "expressions in patterns"),
        other => panic!("{other}"),
    }
}

// H10
#[test]
fn an_expression_that_explodes_is_stopped_and_named() {
    // Exponential where an engine backtracks: every `a` may belong to either star.
    let exploding = r"(?=b)|(blocks|(\w|\.)*)*(?!y)z";
    let scratch = Scratch::new();
    scratch.set("target_modules", json!(exploding));
    // Found out on the model's own paths, so that no file is named.
    let error = Victim::new().fails(64 << 20, |model| {
        model.load_adapter("other", scratch.path(), &Default::default())
    });
    match error {
        PeftError::PatternMatch { pattern, path, .. } => {
            assert_eq!(pattern, exploding);
            assert!(path.contains("blocks"), "{path}");
        }
        other => panic!("{other}"),
    }
    // The same without look-around runs in linear time, and matches nothing: then the tensors have no place.
    let scratch = Scratch::new();
    scratch.set("target_modules", json!(r"(blocks|(\w|\.)*)*z"));
    let error = Victim::new().fails(1 << 20, |model| {
        model.load_adapter("other", scratch.path(), &Default::default())
    });
    assert!(error.to_string().contains("4 unexpected"), "{error}");
}

// H10
#[test]
fn a_configuration_of_very_many_values_takes_no_more_than_its_size_a_few_times() {
    let zeros = |n: usize| vec!["0"; n].join(",");
    let scratch = Scratch::new();
    scratch.config(format!(
        r#"{{"peft_type": "LORA", "auto_mapping": [{}]}}"#,
        zeros(500_000)
    ));
    let error = scratch.refused_compiling().to_string();
    assert!(error.contains("more than 65536 values"), "{error}");
    let entries: Vec<_> = (0..100_000).map(|i| format!(r#""{i}":0"#)).collect();
    scratch.config(format!(
        r#"{{"peft_type": "LORA", "auto_mapping": {{{}}}}}"#,
        entries.join(",")
    ));
    let error = scratch.refused_compiling().to_string();
    assert!(error.contains("more than 65536 values"), "{error}");
}

/// Whatever a string of the file names, nothing looks there: to open a pipe would wait for a writer that never comes.
// H12
#[cfg(unix)]
#[test]
fn strings_of_a_configuration_are_never_opened() {
    let scratch = Scratch::new();
    let pipe = scratch.file("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    let pipe = pipe.to_str().unwrap();
    for key in [
        "base_model_name_or_path",
        "revision",
        "megatron_core",
        "peft_version",
    ] {
        scratch.set(key, json!(pipe));
    }
    scratch
        .set(
            "auto_mapping",
            json!({"base_model_class": pipe, "parent_library": pipe}),
        )
        .set("megatron_config", json!({"path": pipe}));
    let dir = scratch.path().to_owned();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        sender.send(Victim::new().load(&dir).map(|report| report.loaded.len()))
    });
    let loaded = receiver.recv_timeout(std::time::Duration::from_secs(60));
    assert_eq!(loaded.expect("it waits for a pipe").unwrap(), 4);
}

impl Scratch {
    /// The error inside one that names the configuration, of a file whose expressions are compiled first: that takes up to
    /// 64 MiB, whatever the file's size.
    fn refused_compiling(&self) -> PeftError {
        const COMPILED: usize = 64 << 20;
        let bytes = self.bytes(CONFIG_FILE).len();
        let error = Victim::new().fails(bytes + COMPILED, |model| {
            model.load_adapter("other", self.path(), &Default::default())
        });
        match error {
            PeftError::InFile { path, source } if path == self.file(CONFIG_FILE) => *source,
            other => panic!("{other}"),
        }
    }
}
