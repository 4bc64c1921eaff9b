//! `adapter_config.json` from any bytes.

use burn_peft::PeftError;
use burn_peft::format::{AdapterConfig, ReadOptions};
use burn_peft::model::{TargetConfig, TargetModules};
use serde_json::{Value, json};

/// Configurations that PEFT wrote, and one that says everything.
pub fn seeds() -> Vec<Vec<u8>> {
    let peft = ["lora", "rslora", "regex", "dora"].map(|name| format!("peft/{name}"));
    let kinds = [
        "everything",
        "everything-bias",
        "experts-two",
        "tokens-dict",
        "llama-tied-lora",
    ];
    let kinds = kinds.map(|name| format!("kinds/{name}"));
    let names = peft.into_iter().chain(kinds);
    let mut seeds: Vec<_> = names
        .map(|name| std::fs::read(crate::golden(&name).join("adapter_config.json")).unwrap())
        .collect();
    let targets = TargetConfig::list(["q", "v"])
        .with_rank_pattern("q", 2)
        .with_alpha_pattern(r".*\.v", 0.5)
        .with_exclude_modules(["head"]);
    let config = AdapterConfig::new(4, 8.0, targets).with_lora_dropout(0.1);
    seeds.push(config.to_json().unwrap());
    seeds.push(json!({"peft_type": "LORA", "target_modules": "all-linear", "layers_to_transform": [0, 1], "layers_pattern": ["layers"]}).to_string().into());
    seeds
}

/// What was read is what another parser reads, and is read again from what is written of it.
pub fn check(input: &[u8]) -> String {
    let options = ReadOptions::default();
    let config = match AdapterConfig::from_json(input, &options) {
        Ok(config) => config,
        Err(error) => {
            let text = error.to_string();
            assert!(!text.contains(char::is_control), "{text:?}");
            return text;
        }
    };
    let value: Value = serde_json::from_slice(input).expect("what is read is JSON");
    let number = |key: &str, default: f64| match &value[key] {
        Value::Null => default,
        number => number.as_f64().expect("a number"),
    };
    assert_eq!(config.r as f64, number("r", 8.0));
    assert_eq!(config.lora_alpha, number("lora_alpha", 8.0));
    assert_eq!(config.lora_dropout, number("lora_dropout", 0.0));
    assert_eq!(config.use_rslora, value["use_rslora"] == json!(true));
    assert_eq!(config.use_dora, value["use_dora"] == json!(true));
    assert_eq!(config.lora_bias, value["lora_bias"] == json!(true));
    assert_eq!(
        config.ensure_weight_tying,
        value["ensure_weight_tying"] == json!(true)
    );
    let list = |key: &str| value[key].as_array().map_or(0, Vec::len);
    assert_eq!(config.modules_to_save.len(), list("modules_to_save"));
    assert_eq!(config.target_parameters.len(), list("target_parameters"));
    assert_eq!(value["peft_type"], json!("LORA"));
    match &config.targets.target_modules {
        // Beside tensors of experts there need not be any.
        TargetModules::List(names) if value["target_modules"].is_null() => {
            assert!(names.is_empty() && !config.target_parameters.is_empty());
        }
        TargetModules::List(names) => assert_eq!(json!(names), value["target_modules"]),
        TargetModules::AllLinear => {
            let written = value["target_modules"].as_str().unwrap();
            assert!(written.eq_ignore_ascii_case("all-linear"), "{written}");
        }
        TargetModules::Regex(expression) => assert_eq!(json!(expression), value["target_modules"]),
    }
    let ranks: Vec<_> = config.targets.rank_pattern.iter().collect();
    let written = value["rank_pattern"].as_object().into_iter().flatten();
    assert_eq!(ranks.len(), written.count());
    match config.to_json() {
        Ok(json) => {
            let again = AdapterConfig::from_json(&json, &options).expect("what is written is read");
            assert_eq!(again.to_json().unwrap(), json);
            assert_eq!(again.targets, config.targets);
            "read".to_owned()
        }
        // Read, since it changes nothing here, and not written, since PEFT would not read it.
        Err(PeftError::Config { name, .. }) if name == "task_type" => {
            "a task of nobody's".to_owned()
        }
        Err(other) => panic!("read and not written: {other}"),
    }
}
