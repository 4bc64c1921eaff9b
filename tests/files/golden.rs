//! Adapters that PEFT wrote (`tests/golden/peft/generate.py`), and that what we write is what PEFT wrote.

use std::collections::BTreeMap;
use std::fs;

use burn::tensor::{DType, TensorData};
use burn_peft::format::{
    AdapterConfig, AdapterFile, CONFIG_FILE, InitLoraWeights, ReadOptions, WEIGHTS_FILE,
    WriteOptions, tensor_key,
};
use burn_peft::model::{TargetConfig, TargetModules};
use safetensors::SafeTensors;

use super::{adapter, golden, read};

const NAMES: [&str; 4] = ["lora", "rslora", "regex", "dora"];

/// Keys and shapes as PEFT 0.21.2 wrote them, literally, so that no mistake can hide in code that both reads and writes.
#[test]
fn keys_and_shapes_of_the_rslora_adapter_are_peft_s() {
    const EXPECTED: [(&str, [usize; 2]); 14] = [
        (
            "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
            [3, 48],
        ),
        (
            "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight",
            [32, 3],
        ),
        (
            "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight",
            [2, 64],
        ),
        (
            "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight",
            [32, 2],
        ),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            [6, 32],
        ),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
            [64, 6],
        ),
        (
            "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight",
            [3, 32],
        ),
        (
            "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight",
            [32, 3],
        ),
        (
            "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight",
            [3, 48],
        ),
        (
            "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight",
            [32, 3],
        ),
        (
            "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight",
            [2, 64],
        ),
        (
            "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight",
            [32, 2],
        ),
        (
            "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
            [2, 32],
        ),
        (
            "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight",
            [64, 2],
        ),
    ];
    let adapter = read(&golden("rslora")).unwrap();
    let read: Vec<_> = adapter
        .tensors
        .iter()
        .flat_map(|module| {
            module
                .iter()
                .map(|(factor, data)| (tensor_key(&module.path, factor), data.shape().to_vec()))
        })
        .collect();
    let expected: Vec<_> = EXPECTED
        .map(|(key, shape)| (key.to_owned(), shape.to_vec()))
        .into();
    assert_eq!(read, expected);
}

#[test]
fn values_are_those_of_the_file() {
    for name in NAMES {
        let adapter = read(&golden(name)).unwrap();
        let bytes = fs::read(golden(name).join(WEIGHTS_FILE)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let factors = if name == "dora" { 3 } else { 2 };
        assert_eq!(file.len(), factors * adapter.tensors.len());
        for module in &adapter.tensors {
            assert_eq!(module.iter().count(), factors);
            for (factor, data) in module.iter() {
                let stored = file.tensor(&tensor_key(&module.path, factor)).unwrap();
                let dtype = if name == "regex" {
                    DType::BF16
                } else {
                    DType::F32
                };
                assert_eq!(data.dtype(), dtype);
                assert_eq!(data.as_bytes(), stored.data());
            }
        }
    }
}

#[test]
fn configurations_are_what_was_asked_of_peft() {
    let options = ReadOptions::default();
    let config =
        |name: &str| AdapterConfig::read(golden(name).join(CONFIG_FILE), &options).unwrap();

    let lora = config("lora");
    assert_eq!(
        (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_rslora),
        (4, 7.0, 0.05, false)
    );
    // What "all-linear" stands for in PEFT: the paths of the linear modules, without the output head.
    let TargetModules::List(mut targets) = lora.targets.target_modules.clone() else {
        panic!()
    };
    targets.sort();
    let modules = [
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    ];
    let expected =
        [0, 1].map(|layer| modules.map(|module| format!("model.layers.{layer}.{module}")));
    assert_eq!(targets, expected.concat());
    assert_eq!(lora.task_type.as_deref(), Some("CAUSAL_LM"));
    assert_eq!(
        lora.base_model_name_or_path.as_deref(),
        Some("../llama/untied")
    );
    assert_eq!(lora.peft_version.as_deref(), Some("0.21.2"));
    assert!(lora.inference_mode);
    assert!(lora.ignored().is_empty());

    let rslora = config("rslora");
    assert_eq!(
        (rslora.r, rslora.lora_alpha, rslora.use_rslora),
        (3, 5.0, true)
    );
    let matcher = rslora.validate().unwrap();
    for (path, targeted, rank, alpha) in [
        ("model.layers.0.self_attn.q_proj", true, 6, 5.0),
        ("model.layers.1.self_attn.q_proj", true, 2, 2.5),
        ("model.layers.1.self_attn.v_proj", false, 3, 2.5),
        ("model.layers.1.mlp.down_proj", true, 3, 11.0),
    ] {
        assert_eq!(matcher.matches(path).unwrap(), targeted, "{path}");
        assert_eq!(matcher.rank_for(path, rslora.r).unwrap(), rank, "{path}");
        assert_eq!(
            matcher.alpha_for(path, rslora.lora_alpha).unwrap(),
            alpha,
            "{path}"
        );
    }

    let regex = config("regex");
    let pattern = r"model\.layers\.\d+\.(?!self_attn\.k).*_proj";
    assert_eq!(regex.targets, TargetConfig::regex(pattern));
    assert_eq!(
        regex.init_lora_weights,
        InitLoraWeights::Named("gaussian".into())
    );
}

/// Reading PEFT's files and writing them gives PEFT's files, byte for byte: keys, order, metadata, padding, numbers.
#[test]
fn what_peft_wrote_is_written_again_byte_for_byte() {
    for name in NAMES {
        let scratch = tempfile::tempdir().unwrap();
        read(&golden(name))
            .unwrap()
            .write(scratch.path(), &WriteOptions::default())
            .unwrap();
        for file in [CONFIG_FILE, WEIGHTS_FILE] {
            let written = fs::read(scratch.path().join(file)).unwrap();
            let by_peft = fs::read(golden(name).join(file)).unwrap();
            if file == CONFIG_FILE {
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                assert_eq!(text(&written), text(&by_peft), "{name}");
            }
            assert!(written == by_peft, "{name}/{file}");
        }
    }
}

/// A new configuration has the keys of PEFT's and PEFT's defaults.
#[test]
fn a_new_configuration_has_peft_s_keys_and_defaults() {
    let by_peft = fs::read(golden("regex").join(CONFIG_FILE)).unwrap();
    let by_peft: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&by_peft).unwrap();
    assert_eq!(by_peft.len(), 41);
    let mut config = AdapterConfig::new(
        2,
        3.0,
        TargetConfig::regex(r"model\.layers\.\d+\.(?!self_attn\.k).*_proj"),
    )
    .with_task_type("CAUSAL_LM")
    .with_base_model("../llama/tied");
    config.init_lora_weights = InitLoraWeights::Named("gaussian".into());
    let ours: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(&config.to_json().unwrap()).unwrap();
    assert_eq!(ours, by_peft);
}

#[test]
fn what_we_write_we_read_and_the_same_adapter_gives_the_same_bytes() {
    let mut adapter = adapter();
    adapter.config = adapter.config.with_lora_dropout(0.1).with_use_rslora(true);
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for dir in &dirs {
        adapter.write(dir.path(), &WriteOptions::default()).unwrap();
        // The order in which modules are given is not kept: keys are sorted.
        adapter.tensors.reverse();
    }
    for file in [CONFIG_FILE, WEIGHTS_FILE] {
        assert_eq!(
            fs::read(dirs[0].path().join(file)).unwrap(),
            fs::read(dirs[1].path().join(file)).unwrap()
        );
    }
    let found = read(dirs[0].path()).unwrap();
    adapter.config.inference_mode = true;
    assert_eq!(found, adapter);
}

/// The file as the `safetensors` crate reads it: metadata, sorted keys, little-endian values.
#[test]
fn tensors_are_as_the_reference_reader_expects() {
    let scratch = super::Scratch::new();
    let bytes = fs::read(scratch.file(WEIGHTS_FILE)).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    assert_eq!((metadata.len(), metadata["format"].as_str()), (1, "pt"));
    assert_eq!(
        header.offset_keys(),
        [
            "base_model.model.layers.0.q.lora_A.weight",
            "base_model.model.layers.0.q.lora_B.weight",
            "base_model.model.layers.0.v.lora_A.weight",
            "base_model.model.layers.0.v.lora_B.weight",
        ]
    );
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let b = file
        .tensor("base_model.model.layers.0.q.lora_B.weight")
        .unwrap();
    assert_eq!(
        (b.dtype(), b.shape()),
        (safetensors::Dtype::F32, [4, 2].as_slice())
    );
    let values: Vec<u8> = (0..8)
        .flat_map(|i| (0.5 + i as f32).to_le_bytes())
        .collect();
    assert_eq!(b.data(), values);
}

/// The order of a pattern's keys has meaning, also where it is not the alphabet's.
#[test]
fn patterns_keep_their_order() {
    let scratch = tempfile::tempdir().unwrap();
    let targets = TargetConfig::list(["q"])
        .with_rank_pattern("z.q", 2)
        .with_rank_pattern("q", 5);
    let adapter = AdapterFile::new(
        AdapterConfig::new(1, 1.0, targets.clone()),
        vec![super::module("z.q", 2, 3, 3), super::module("a.q", 5, 3, 3)],
    );
    adapter
        .write(scratch.path(), &WriteOptions::default())
        .unwrap();
    let text = fs::read_to_string(scratch.path().join(CONFIG_FILE)).unwrap();
    assert!(text.find(r#""z.q": 2"#).unwrap() < text.find(r#""q": 5"#).unwrap());
    assert_eq!(read(scratch.path()).unwrap().config.targets, targets);
}

#[test]
fn half_precision_factors_are_read_as_they_were_written() {
    for dtype in [DType::F16, DType::BF16] {
        let scratch = tempfile::tempdir().unwrap();
        let mut adapter = adapter();
        for module in &mut adapter.tensors {
            let half = |data: &TensorData| data.clone().convert_dtype(dtype);
            (module.a, module.b) = (half(&module.a), half(&module.b));
        }
        adapter
            .write(scratch.path(), &WriteOptions::default())
            .unwrap();
        assert_eq!(read(scratch.path()).unwrap().tensors, adapter.tensors);
    }
}
