//! Where adapters are saved, what a second save replaces, and what a file says beside its tensors.

use std::fs;
use std::path::Path;

use burn::nn::LinearConfig;
use burn::tensor::{Device, Tensor};
use burn_peft::PeftError;
use burn_peft::adapter::LoraConfig;
use burn_peft::format::{
    AdapterFile, CONFIG_FILE, LoadOptions, ReadOptions, SaveOptions, WEIGHTS_FILE,
};
use burn_peft::model::{PeftConfig, PeftModel, TargetConfig};
use serde_json::{Value, json};

use super::model::{Net, net};

fn config(rank: usize) -> PeftConfig {
    PeftConfig::new(LoraConfig::new(rank), TargetConfig::list(["query"]))
}

fn with_adapter(name: &str, rank: usize) -> PeftModel<Net> {
    let mut model = net();
    model.add_adapter(name, &config(rank)).unwrap();
    model
}

fn rank_in(dir: &Path) -> usize {
    let file = AdapterFile::read(dir, &ReadOptions::default()).unwrap();
    file.config.r
}

fn json_of(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join(CONFIG_FILE)).unwrap()).unwrap()
}

#[test]
fn the_next_epoch_replaces_the_last_one() {
    let scratch = tempfile::tempdir().unwrap();
    let options = SaveOptions::default();
    for rank in [2, 3, 2] {
        let model = with_adapter("default", rank);
        model
            .save_adapter("default", scratch.path(), &options)
            .unwrap();
        assert_eq!(rank_in(scratch.path()), rank);
    }
    // Unless it is to be kept.
    let keep = SaveOptions::new().with_keep_existing(true);
    let error = with_adapter("default", 4).save_adapter("default", scratch.path(), &keep);
    assert!(matches!(error, Err(PeftError::Exists { .. })), "{error:?}");
    assert_eq!(rank_in(scratch.path()), 2);
}

#[test]
fn an_adapter_of_another_method_or_writer_is_not_replaced_unless_asked() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join(CONFIG_FILE);
    let model = with_adapter("default", 2);
    for (text, part) in [
        (r#"{"peft_type": "IA3"}"#, "another method, \"IA3\""),
        (r#"{"lora_parameters": {}}"#, "no configuration of PEFT"),
        ("notes", "no configuration of PEFT"),
    ] {
        fs::write(&path, text).unwrap();
        let options = SaveOptions::default();
        let error = model
            .save_adapter("default", scratch.path(), &options)
            .unwrap_err();
        assert!(matches!(&error, PeftError::Occupied { path: found, .. } if *found == path));
        let text = error.to_string();
        assert!(
            text.contains(part) && text.contains("`overwrite`"),
            "{text}"
        );
        assert!(!scratch.path().join(WEIGHTS_FILE).exists());
    }
    let options = SaveOptions::new().with_overwrite(true);
    model
        .save_adapter("default", scratch.path(), &options)
        .unwrap();
    assert_eq!(rank_in(scratch.path()), 2);
}

#[test]
fn what_is_saved_under_a_name_is_loaded_from_the_same_directory_or_the_returned_one() {
    let out = tempfile::tempdir().unwrap();
    for (name, rank) in [("default", 2), ("lora_sql", 3), ("数据 (2)", 4)] {
        let model = with_adapter(name, rank);
        let returned = model
            .save_adapter(name, out.path(), &SaveOptions::default())
            .unwrap();
        for dir in [out.path(), returned.as_path()] {
            let mut model = net();
            model
                .load_adapter(name, dir, &LoadOptions::default())
                .unwrap();
            assert_eq!(model.config(name).unwrap().lora.rank, rank, "{name}");
        }
    }
    // A name that has no folder is one for the adapter in the directory itself.
    let mut model = net();
    model
        .load_adapter("other", out.path(), &LoadOptions::default())
        .unwrap();
    assert_eq!(model.config("other").unwrap().lora.rank, 2);
}

#[test]
fn names_are_checked_where_they_are_given() {
    let long = "x".repeat(256);
    for name in [
        "",
        "a/b",
        "a\\b",
        "v1.0",
        "c:x",
        "a\nb",
        "nf4",
        long.as_str(),
    ] {
        let error = net().add_adapter(name, &config(2)).unwrap_err();
        assert!(
            matches!(error, PeftError::AdapterName { .. }),
            "{name:?}: {error}"
        );
    }
}

#[test]
fn a_directory_of_checkpoints_is_explained() {
    let out = tempfile::tempdir().unwrap();
    for step in [100, 20] {
        let model = with_adapter("default", 2);
        let dir = out.path().join(format!("checkpoint-{step}"));
        model
            .save_adapter("default", dir, &SaveOptions::default())
            .unwrap();
    }
    let error = net().load_adapter("default", out.path(), &LoadOptions::default());
    let text = error.unwrap_err().to_string();
    assert!(text.contains("`checkpoint-20`, `checkpoint-100`"), "{text}");
    fs::write(
        out.path().join(CONFIG_FILE),
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n",
    )
    .unwrap();
    let error = net().load_adapter("default", out.path(), &LoadOptions::default());
    let text = error.unwrap_err().to_string();
    assert!(text.contains("git lfs pull"), "{text}");
}

/// A text that load then save would lose is lost for every tool that reads it afterwards.
#[test]
fn what_a_file_says_beside_its_tensors_is_written_again() {
    let said = [
        ("task_type", json!("SEQ_CLS")),
        ("base_model_name_or_path", json!("somebody/some-model")),
        ("revision", json!("v2")),
        (
            "auto_mapping",
            json!({"base_model_class": "Net", "parent_library": "nets"}),
        ),
        ("megatron_core", json!("other.core")),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("qalora_group_size", json!(32)),
        ("of_a_later_peft", json!({"b": 1, "a": [2]})),
    ];
    let scratch = tempfile::tempdir().unwrap();
    let dir = with_adapter("default", 2)
        .save_adapter(
            "default",
            scratch.path().join("in"),
            &SaveOptions::default(),
        )
        .unwrap();
    let mut config = json_of(&dir);
    for (key, value) in &said {
        config[*key] = value.clone();
    }
    fs::write(dir.join(CONFIG_FILE), config.to_string()).unwrap();
    let read = ReadOptions::new().with_allow_unknown_keys(true);
    let mut model = net();
    let options = LoadOptions::new().with_read(read);
    model.load_adapter("default", &dir, &options).unwrap();
    let out = scratch.path().join("out");
    model
        .save_adapter("default", &out, &SaveOptions::default())
        .unwrap();
    assert_eq!(json_of(&out), config);

    // What the options say comes first, and they can drop the rest.
    let options = SaveOptions::new()
        .with_keep_origin(false)
        .with_task_type("CAUSAL_LM");
    model.save_adapter("default", &out, &options).unwrap();
    let written = json_of(&out);
    assert_eq!(written["task_type"], "CAUSAL_LM");
    for (key, value) in &said {
        assert_ne!(written.get(*key), Some(value), "{key}");
    }
}

#[test]
fn a_model_that_is_one_layer_is_refused_when_the_adapter_is_added() {
    let linear = LinearConfig::new(4, 4).init(&Device::default());
    let mut model = PeftModel::new(linear);
    let config = PeftConfig::new(LoraConfig::new(2), TargetConfig::regex(".*"));
    let error = model
        .add_adapter("default", &config)
        .unwrap_err()
        .to_string();
    assert!(error.contains("in a field"), "{error}");
    assert_eq!(model.adapters().count(), 0);
    let x = Tensor::<2>::ones([1, 4], &Device::default());
    assert_eq!(model.module().forward(x).dims(), [1, 4]);
}
