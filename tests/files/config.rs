//! Configurations that are refused, and by what name.

use burn_peft::PeftError;
use burn_peft::format::{
    AdapterConfig, AdapterFile, CONFIG_FILE, InitLoraWeights, ReadOptions, WriteOptions,
};
use burn_peft::model::TargetConfig;
use serde_json::{Value, json};

use super::{Scratch, adapter, inside, read};

/// A value other than its default for every key, one that is accepted where there is any.
fn samples() -> Vec<(&'static str, Value)> {
    vec![
        ("alora_invocation_tokens", json!([1, 2])),
        ("alpha_pattern", json!({"q": 2.5})),
        ("arrow_config", json!({"top_k": 3})),
        ("auto_mapping", json!({"base_model_class": "Net"})),
        ("base_model_name_or_path", json!("some/where")),
        ("bias", json!("all")),
        ("corda_config", json!({"corda_method": "ipm"})),
        ("ensure_weight_tying", json!(true)),
        ("eva_config", json!({"rho": 2.0})),
        ("exclude_modules", json!(["head"])),
        ("fan_in_fan_out", json!(true)),
        ("inference_mode", json!(true)),
        ("init_lora_weights", json!("gaussian")),
        ("kasa_config", json!({"beta": 1e-4})),
        ("layer_replication", json!([[0, 2], [1, 3]])),
        ("layers_pattern", json!(["layers"])),
        ("layers_to_transform", json!([0])),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("lora_alpha", json!(7.25)),
        ("lora_bias", json!(true)),
        ("lora_dropout", json!(0.25)),
        ("lora_ga_config", json!({"direction": "ArB2r"})),
        ("megatron_config", json!({"x": 1})),
        ("megatron_core", json!("other.core")),
        ("modules_to_save", json!(["lm_head"])),
        ("monteclora_config", json!({"num_samples": 4})),
        ("peft_type", json!("LORA")),
        ("peft_version", json!("0.20.0")),
        ("qalora_group_size", json!(32)),
        ("r", json!(3)),
        ("rank_pattern", json!({"q": 5})),
        ("revision", json!("main")),
        ("target_modules", json!("layers.*")),
        ("target_parameters", json!(["experts.down_proj"])),
        ("task_type", json!("SEQ_CLS")),
        ("trainable_token_indices", json!([5])),
        ("use_bdlora", json!({"nblocks": 2})),
        ("use_dora", json!(true)),
        ("use_qalora", json!(true)),
        ("use_rslora", json!(true)),
        ("velora_config", json!({"scale": 1.0})),
    ]
}

/// Every row of the published table: what is honoured or inert comes back as it was, what is refused is by its name.
#[test]
fn every_key_is_treated_as_the_table_says() {
    let table = std::fs::read_to_string(crate::repository().join("docs/peft-config.md")).unwrap();
    let rows: Vec<(&str, &str)> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | "))
        .map(|(key, rest)| (key, rest.split(' ').next().unwrap()))
        .collect();
    let keys: Vec<_> = rows.iter().map(|(key, _)| *key).collect();
    let samples = samples();
    assert_eq!(
        keys,
        samples.iter().map(|(key, _)| *key).collect::<Vec<_>>()
    );
    assert_eq!(keys.len(), 41);
    let options = ReadOptions::default();
    for ((key, verdict), (_, value)) in rows.into_iter().zip(samples) {
        let mut object: Value =
            serde_json::from_slice(&adapter().config.to_json().unwrap()).unwrap();
        if key == "layers_pattern" {
            object["layers_to_transform"] = json!([0]);
        }
        object[key] = value;
        let read = AdapterConfig::from_json(object.to_string().as_bytes(), &options);
        match (verdict, read) {
            ("honoured" | "inert", Ok(config)) => {
                let written: Value = serde_json::from_slice(&config.to_json().unwrap()).unwrap();
                assert_eq!(written, object, "{key}");
            }
            ("refused", Err(PeftError::UnsupportedKey { key: named, .. })) => {
                assert_eq!(named, key);
            }
            (verdict, read) => panic!("{key} is {verdict}: {read:?}"),
        }
    }
}

#[test]
fn keys_that_change_the_mathematics_are_refused_by_name() {
    for (key, value) in [
        ("peft_type", json!("IA3")),
        ("peft_type", json!("lora")),
        ("alora_invocation_tokens", json!([1, 2])),
        ("arrow_config", json!({"top_k": 3})),
        ("kasa_config", json!({"beta": 1e-4})),
        ("layer_replication", json!([[0, 2], [1, 3]])),
        ("monteclora_config", json!({"num_samples": 4})),
        ("use_bdlora", json!({"nblocks": 2})),
        ("use_qalora", json!(true)),
        ("velora_config", json!({"scale": 1.0})),
        // Another case of letters than the one PEFT reads.
        ("init_lora_weights", json!("PiSSA")),
        ("init_lora_weights", json!("pissa_niter_16")),
        ("init_lora_weights", json!("corda")),
        ("init_lora_weights", json!("loftq")),
        ("init_lora_weights", json!("lora_ga")),
        ("init_lora_weights", json!("invented_later")),
        // Not a key of PEFT 0.21, but one that says something.
        ("invented_later", json!(true)),
        ("enable_lora", json!([true, false, true])),
    ] {
        let scratch = Scratch::new();
        let error = scratch.set(key, value.clone()).error();
        match inside(&error, CONFIG_FILE) {
            PeftError::UnsupportedKey {
                key: found,
                value: shown,
                ..
            } => {
                assert_eq!(found, key);
                assert_eq!(*shown, value.to_string());
            }
            other => panic!("{key} = {value}: {other}"),
        }
    }
}

/// PiSSA and OLoRA can be found again, as this build has the feature `faer`; a unit test has the refusal without it.
#[test]
fn exact_parts_of_the_weight_are_read() {
    for name in ["pissa", "olora", "OLoRA"] {
        let scratch = Scratch::new();
        scratch.set("init_lora_weights", json!(name));
        let config = read(scratch.path()).unwrap().config;
        assert_eq!(
            config.init_lora_weights,
            InitLoraWeights::Named(name.into())
        );
    }
}

#[test]
fn values_without_effect_are_read() {
    for (key, value) in [
        ("bias", json!("none")),
        ("bias", Value::Null),
        ("modules_to_save", json!([])),
        ("kasa_config", json!({})),
        ("init_lora_weights", json!(false)),
        ("init_lora_weights", json!("gaussian")),
        ("init_lora_weights", json!("eva")),
        ("init_lora_weights", json!("orthogonal")),
        ("eva_config", json!({"rho": 2.0})),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("qalora_group_size", json!(32)),
        ("megatron_config", json!({"x": 1})),
        ("megatron_core", json!("os.system")),
        ("lora_alpha", json!(7.25)),
        ("task_type", Value::Null),
        ("task_type", json!("INVENTED_LATER")),
        ("rank_pattern", Value::Null),
        ("peft_version", Value::Null),
        ("base_model_name_or_path", json!("/etc/passwd")),
        ("layers_to_transform", json!(0)),
    ] {
        let scratch = Scratch::new();
        scratch.set(key, value.clone());
        let read = read(scratch.path()).unwrap_or_else(|error| panic!("{key} = {value}: {error}"));
        assert!(read.config.ignored().is_empty());
    }
}

#[test]
fn inert_keys_are_written_as_they_were_read() {
    let scratch = Scratch::new();
    let mapping = json!({"base_model_class": "Net", "parent_library": "os"});
    scratch
        .set("auto_mapping", mapping.clone())
        .set("eva_config", json!({"rho": 2.0, "tau": 0.99}));
    let config = read(scratch.path()).unwrap().config;
    let written: Value = serde_json::from_slice(&config.to_json().unwrap()).unwrap();
    assert_eq!(written["auto_mapping"], mapping);
    assert_eq!(written["eva_config"], json!({"rho": 2.0, "tau": 0.99}));
    assert_eq!(written["inference_mode"], json!(true));
}

#[test]
fn unknown_keys_that_say_nothing_are_passed_over_and_reported() {
    let scratch = Scratch::new();
    scratch
        .set("z_later", Value::Null)
        .set("a_later", json!({}))
        .set("merge_weights", json!(false));
    scratch.set("runtime_config", json!({"ephemeral_gpu_offload": false}));
    let config = read(scratch.path()).unwrap().config;
    assert_eq!(
        config.ignored(),
        ["a_later", "merge_weights", "runtime_config", "z_later"]
    );
}

#[test]
fn unknown_keys_are_read_over_when_asked_but_known_ones_are_refused_all_the_same() {
    let options = ReadOptions {
        allow_unknown_keys: true,
        ..Default::default()
    };
    let scratch = Scratch::new();
    scratch.set("invented_later", json!(3));
    let read = AdapterFile::read(scratch.path(), &options).unwrap();
    assert_eq!(read.config.ignored(), ["invented_later"]);
    scratch.set("lora_bias", json!(true));
    assert!(AdapterFile::read(scratch.path(), &options).is_err());
}

#[test]
fn what_peft_would_not_load_is_not_written() {
    let write = |adapter: &AdapterFile| {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("out");
        let error = adapter.write(&dir, &WriteOptions::default()).unwrap_err();
        assert!(!dir.exists(), "{error}");
        error.to_string()
    };
    let config = |change: fn(&mut AdapterConfig)| {
        let mut adapter = adapter();
        change(&mut adapter.config);
        write(&adapter)
    };
    assert!(config(|config| config.r = 0).contains("r = 0"));
    assert!(config(|config| config.lora_alpha = f64::NAN).contains("lora_alpha = NaN"));
    assert!(config(|config| config.lora_dropout = 1.0).contains("lora_dropout = 1"));
    assert!(config(|config| config.task_type = Some("CHAT".into())).contains("task_type = CHAT"));
    // Not the rank of the tensors; and a module that the targets leave out.
    assert!(config(|config| config.r = 3).contains("expected shape [3, 3], found [2, 3]"));
    assert!(config(|config| config.targets = TargetConfig::list(["q"])).contains("layers.0.v"));
}
