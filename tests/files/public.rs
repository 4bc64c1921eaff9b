//! Configurations and expressions of the kinds that people publish (`tests/golden/public/generate.py`).

use std::collections::BTreeMap;
use std::fs;

use burn_peft::format::{AdapterConfig, ReadOptions};
use burn_peft::model::{TargetConfig, TargetModules};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Published {
    kind: String,
    /// Whether it is LoRA as PEFT has it.
    loads: bool,
    config: Value,
}

#[derive(Deserialize)]
struct Expression {
    pattern: String,
    /// What Python's `re.fullmatch` says of each path.
    names: BTreeMap<String, bool>,
}

fn read(name: &str) -> Vec<u8> {
    fs::read(crate::golden("public").join(name)).unwrap()
}

#[test]
fn published_configurations_are_read_or_refused_as_they_mean() {
    let published: Vec<Published> = serde_json::from_slice(&read("configs.json")).unwrap();
    for Published {
        kind,
        loads,
        config,
    } in published
    {
        let text = config.to_string();
        let found = AdapterConfig::from_json(text.as_bytes(), &ReadOptions::default());
        assert_eq!(found.is_ok(), loads, "{kind}: {found:?}");
        let Ok(mut found) = found else { continue };
        // Empty for none.
        found.task_type = found.task_type.filter(|task| !task.is_empty());
        // Written again, it means the same.
        let written = match found.to_json() {
            Ok(written) => written,
            Err(error) => panic!("{kind}: {error}"),
        };
        let again = AdapterConfig::from_json(&written, &ReadOptions::default()).unwrap();
        assert_eq!(
            (again.r, again.lora_alpha),
            (found.r, found.lora_alpha),
            "{kind}"
        );
        assert_eq!(again.targets, found.targets, "{kind}");
        assert_eq!(again.modules_to_save, found.modules_to_save, "{kind}");
    }
}

#[test]
fn published_expressions_match_as_in_python() {
    let expressions: Vec<Expression> = serde_json::from_slice(&read("patterns.json")).unwrap();
    let mut matched = 0;
    for Expression { pattern, names } in &expressions {
        let mut config = TargetConfig::list::<String>([]);
        config.target_modules = TargetModules::Regex(pattern.clone());
        let matcher = config.compile(None);
        let matcher = matcher.unwrap_or_else(|error| panic!("{pattern}: {error}"));
        for (path, &expected) in names {
            assert_eq!(
                matcher.matches(path).unwrap(),
                expected,
                "{pattern}: {path}"
            );
            matched += usize::from(expected);
        }
    }
    assert!(expressions.len() >= 18 && matched >= 60, "{matched}");
}
