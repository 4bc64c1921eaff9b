//! How a base is written: what is refused, what is left out, what stands in the configuration.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::FloatDType;
use burn_peft::PeftError;
use burn_peft::adapter::LoraConfig;
use burn_peft::format::{NameMap, SaveBaseOptions};
use burn_peft::model::{PeftConfig, TargetConfig};
use burn_peft::nf4::Nf4Config;
use serde_json::Value;

use super::*;

#[derive(Module, Debug)]
pub struct Small {
    embed: Embedding,
    norm: LayerNorm,
    up: Linear,
    down: Linear,
    lm_head: Linear,
}

fn small() -> PeftModel<Small> {
    let device = Device::default();
    let linear = |d_in, d_out| LinearConfig::new(d_in, d_out).init(&device);
    PeftModel::new(Small {
        embed: EmbeddingConfig::new(11, 6).init(&device),
        norm: LayerNormConfig::new(6).init(&device),
        up: linear(6, 70),
        down: linear(70, 6),
        lm_head: linear(6, 11),
    })
}

fn packed(targets: TargetConfig) -> PeftModel<Small> {
    let mut model = small();
    model.quantize_nf4(&targets, &Nf4Config::new()).unwrap();
    model
}

fn with_config(config: &str) -> SaveBaseOptions {
    SaveBaseOptions {
        config: Some(config.to_owned()),
        ..SaveBaseOptions::default()
    }
}

/// The names and contents of all files in a directory.
fn content(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, fs::read(path).unwrap())
    });
    entries.collect()
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}

#[test]
fn any_base_is_read_again_as_it_was() {
    for model in [small(), packed(TargetConfig::all_linear())] {
        let scratch = tempfile::tempdir().unwrap();
        let names = NameMap::new().with_prefix("model", "");
        for max_shard_bytes in [1, 700, 1 << 40] {
            let dir = scratch.path().join(max_shard_bytes.to_string());
            let options = SaveBaseOptions {
                names: names.clone(),
                max_shard_bytes,
                ..SaveBaseOptions::default()
            };
            let report = model.save_base(&dir, &options).unwrap();
            assert_eq!(report.files.len() == 1, max_shard_bytes == 1 << 40);
            let mut read = small();
            let loading = BaseOptions::new().with_names(names.clone());
            let loaded = read.load_base(&dir, &loading).unwrap();
            assert_eq!(loaded.packed, report.packed);
            assert!(loaded.read_bytes <= report.bytes);
            let again = scratch.path().join(format!("{max_shard_bytes} again"));
            read.save_base(&again, &options).unwrap();
            assert_eq!(content(&dir), content(&again));
            for (found, expected) in [
                (read.up.weight.val(), model.up.weight.val()),
                (read.lm_head.weight.val(), model.lm_head.weight.val()),
                (read.embed.weight.val(), model.embed.weight.val()),
            ] {
                assert_eq!(found.into_data(), expected.into_data());
            }
        }
    }
}

#[test]
fn nothing_is_overwritten_unasked_and_no_file_of_another_model_is_left() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let sharded = SaveBaseOptions {
        max_shard_bytes: 700,
        ..with_config("{}")
    };
    small().save_base(dir, &sharded).unwrap();
    fs::write(dir.join("tokenizer.json"), "mine").unwrap();
    let before = content(dir);
    // Other names of files, so that it is not about equal ones.
    let whole = SaveBaseOptions::default();
    for options in [&sharded, &whole] {
        let error = small().save_base(dir, options).unwrap_err();
        assert!(matches!(error, PeftError::Exists { .. }), "{error}");
        assert_eq!(content(dir), before);
    }
    let overwriting = SaveBaseOptions {
        overwrite: true,
        ..whole
    };
    small().save_base(dir, &overwriting).unwrap();
    let files: Vec<_> = content(dir).into_keys().collect();
    assert_eq!(
        files,
        ["config.json", "model.safetensors", "tokenizer.json"]
    );
    // It is of the new model.
    assert_eq!(config(dir)["dtype"], "float32");
    // And back, where the single file would hide the index.
    let overwriting = SaveBaseOptions {
        overwrite: true,
        ..sharded
    };
    let report = small().save_base(dir, &overwriting).unwrap();
    let mut files: Vec<_> = report.files;
    files.push(dir.join("tokenizer.json"));
    files.sort();
    let found: Vec<_> = content(dir)
        .into_keys()
        .map(|name| dir.join(name))
        .collect();
    assert_eq!(found, files);
}

#[test]
fn the_same_base_gives_the_same_bytes() {
    let model = packed(TargetConfig::all_linear());
    let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
    for dir in &dirs {
        model.save_base(dir.path(), &with_config("{}")).unwrap();
    }
    assert_eq!(content(dirs[0].path()), content(dirs[1].path()));
}

#[test]
fn adapters_are_an_error_or_left_out_when_asked() {
    let base = packed(TargetConfig::all_linear());
    let mut adapted = base.clone();
    let lora = LoraConfig::new(2);
    let adapter = PeftConfig::new(lora, TargetConfig::list(["up"]));
    adapted.add_adapter("mine", &adapter).unwrap();
    let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let error = adapted
        .save_base(dirs[0].path(), &SaveBaseOptions::default())
        .unwrap_err();
    assert!(error.to_string().contains("[\"mine\"]"), "{error}");
    assert!(content(dirs[0].path()).is_empty());
    let ignoring = SaveBaseOptions {
        ignore_adapters: true,
        ..SaveBaseOptions::default()
    };
    adapted.save_base(dirs[0].path(), &ignoring).unwrap();
    base.save_base(dirs[1].path(), &SaveBaseOptions::default())
        .unwrap();
    assert_eq!(content(dirs[0].path()), content(dirs[1].path()));
}

#[test]
fn the_configuration_says_what_is_packed() {
    let base = r#"{"model_type": "x", "torch_dtype": "bfloat16", "eps": 1e-06, "quantization_config": {"quant_method": "gptq"}, "a": "é"}"#;
    let quantization = |model: &PeftModel<Small>| {
        let scratch = tempfile::tempdir().unwrap();
        model.save_base(scratch.path(), &with_config(base)).unwrap();
        let mut config = config(scratch.path());
        assert_eq!(config["dtype"], "float32");
        assert_eq!(config["eps"], 1e-6);
        let text = fs::read_to_string(scratch.path().join("config.json")).unwrap();
        assert!(text.starts_with("{\n  \"a\": \"\\u00e9\",\n"), "{text}");
        assert!(text.contains("\"eps\": 1e-06,"), "{text}");
        assert!(config.get("torch_dtype").is_none());
        config["quantization_config"].take()
    };
    assert_eq!(quantization(&small()), Value::Null);
    let skipped = |targets: TargetConfig| {
        let mut quantization = quantization(&packed(targets));
        assert_eq!(quantization["load_in_4bit"], true);
        assert_eq!(quantization["bnb_4bit_compute_dtype"], "float32");
        quantization["llm_int8_skip_modules"].take()
    };
    // As transformers does by itself.
    assert_eq!(skipped(TargetConfig::all_linear()), Value::Null);
    assert_eq!(
        skipped(TargetConfig::list(["up"])),
        serde_json::json!(["down", "lm_head"])
    );
    assert_eq!(
        skipped(TargetConfig::list(["up", "down", "lm_head"])),
        serde_json::json!([])
    );
}

#[test]
fn what_cannot_be_written_is_an_error_and_leaves_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("a/b");
    let model = small();
    for (options, expected) in [
        (with_config("[]"), "not the JSON"),
        (with_config("{\"a\": 1, \"a\": 2}"), "twice"),
        (
            SaveBaseOptions {
                compute_dtype: FloatDType::F64,
                ..SaveBaseOptions::default()
            },
            "compute_dtype",
        ),
        (
            SaveBaseOptions {
                // Empty names.
                names: NameMap::new().with_segments("", "up"),
                ..SaveBaseOptions::default()
            },
            "name map",
        ),
    ] {
        let error = model.save_base(&dir, &options).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(content(scratch.path()).is_empty());
    }
}

#[derive(Module, Debug)]
struct Layers {
    layers: Vec<Linear>,
}

/// Clones of one layer, whose parameters have the ids of the first.
fn clones(count: usize) -> PeftModel<Layers> {
    let layer = LinearConfig::new(64, 8).init(&Device::default());
    PeftModel::new(Layers {
        layers: vec![layer; count],
    })
}

#[test]
fn parameters_that_share_an_id_are_each_written() {
    let scratch = tempfile::tempdir().unwrap();
    let values: Vec<_> = (0..2)
        .map(|_| {
            LinearConfig::new(64, 8)
                .init(&Device::default())
                .weight
                .val()
        })
        .collect();
    let layer = LinearConfig::new(64, 8).init(&Device::default());
    let mut layers = vec![layer; 2];
    for (layer, value) in layers.iter_mut().zip(&values) {
        layer.weight = layer.weight.clone().map(|_| value.clone());
    }
    assert_eq!(layers[0].weight.id, layers[1].weight.id);
    let mut model = PeftModel::new(Layers { layers });
    let dense = scratch.path().join("dense");
    model
        .save_base(&dense, &SaveBaseOptions::default())
        .unwrap();
    // One of the two packed, so that they differ in kind as well.
    let targets = TargetConfig::list(["layers.1"]);
    model.quantize_nf4(&targets, &Nf4Config::new()).unwrap();
    let packed = scratch.path().join("packed");
    let report = model.save_base(&packed, &SaveBaseOptions::default());
    assert_eq!(report.unwrap().packed, 1);
    let mut read = clones(2);
    read.load_base(&packed, &BaseOptions::new()).unwrap();
    for (found, expected) in read.module().layers.iter().zip(&model.module().layers) {
        let expected = expected.weight.val().into_data();
        assert_eq!(found.weight.val().into_data(), expected);
    }
    let mut read = clones(2);
    read.load_base(&dense, &BaseOptions::new()).unwrap();
    for (found, expected) in read.module().layers.iter().zip(values) {
        assert_eq!(found.weight.val().into_data(), expected.into_data());
    }
}

#[test]
fn an_older_configuration_says_what_the_new_weights_are() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let old = r#"{"model_type": "x", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "fp4"}}"#;
    fs::write(dir.join("config.json"), old).unwrap();
    let overwriting = SaveBaseOptions {
        overwrite: true,
        ..SaveBaseOptions::default()
    };
    let all = packed(TargetConfig::all_linear());
    all.save_base(dir, &overwriting).unwrap();
    let found = config(dir);
    assert_eq!(found["model_type"], "x");
    assert_eq!(found["quantization_config"]["bnb_4bit_quant_type"], "nf4");
    let report = small().load_base(dir, &BaseOptions::new()).unwrap();
    assert_eq!(report.packed, 2);
    let report = small().save_base(dir, &overwriting).unwrap();
    assert!(report.files.contains(&dir.join("config.json")));
    let found = config(dir);
    assert_eq!(found["model_type"], "x");
    assert!(found.get("quantization_config").is_none());
    assert_eq!(found["dtype"], "float32");
    small().load_base(dir, &BaseOptions::new()).unwrap();
    // One that is no configuration is refused, and nothing has changed.
    for bad in [&b"[]"[..], b"{\"a\": \"\xff\"}"] {
        fs::write(dir.join("config.json"), bad).unwrap();
        let before = content(dir);
        let error = all.save_base(dir, &overwriting).unwrap_err();
        assert!(error.to_string().contains("config.json"), "{error}");
        assert_eq!(content(dir), before);
    }
}

#[test]
fn what_would_not_be_read_again_is_not_written() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("a");
    // A weight and a bias each.
    let one_each = SaveBaseOptions {
        max_shard_bytes: 1,
        ..SaveBaseOptions::default()
    };
    for (count, expected) in [(0, "without parameters"), (257, "514 files")] {
        let error = clones(count).save_base(&dir, &one_each).unwrap_err();
        assert!(matches!(error, PeftError::Malformed { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert!(content(scratch.path()).is_empty());
    }
    clones(256).save_base(&dir, &one_each).unwrap();
    let mut read = clones(256);
    read.load_base(&dir, &BaseOptions::new()).unwrap();
}
