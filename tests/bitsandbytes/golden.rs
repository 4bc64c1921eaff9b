//! What transformers wrote: read to the bit, computed with, and written again to the byte.

use burn::module::Module;
use burn::tensor::FloatDType;
use burn_peft::format::{BaseOptions, SaveBaseOptions};
use burn_peft::model::{Base, TargetConfig};
use burn_peft::nf4::Nf4Config;

use super::*;

/// Logits reach 18, where one ulp of f32 is 1.9e-6; each is the end of a chain of some ten sums of 64 to 320 terms, whose
/// order differs from PyTorch's.
const LOGITS: f32 = 5e-5;

const MODELS: [&str; 4] = ["nf4", "double", "storage", "fp4"];

fn f32s() -> BaseOptions {
    BaseOptions::new().with_dtype(FloatDType::F32)
}

#[test]
fn every_weight_is_restored_to_the_bit_and_the_model_computes_with_it() {
    for name in MODELS {
        let model = load(name, &f32s());
        let mut found = BTreeMap::new();
        for (index, layer) in model.model.layers.iter().enumerate() {
            let (attention, mlp) = (&layer.self_attn, &layer.mlp);
            for (module, linear) in [
                ("self_attn.q_proj", &attention.q_proj),
                ("self_attn.k_proj", &attention.k_proj),
                ("self_attn.v_proj", &attention.v_proj),
                ("self_attn.o_proj", &attention.o_proj),
                ("mlp.gate_proj", &mlp.gate_proj),
                ("mlp.up_proj", &mlp.up_proj),
                ("mlp.down_proj", &mlp.down_proj),
            ] {
                let key = format!("model.layers.{index}.{module}.weight");
                found.insert(key, digest(linear.weight.val()));
            }
        }
        assert_eq!(found, digests(name), "{name}");

        let model = load(name, &f32s());
        let (tokens, logits) = expected(name);
        let found = model.forward(tokens).into_data();
        let difference = largest_difference(&found, &logits);
        assert!(difference < LOGITS, "{name}: {difference}");
    }
}

#[test]
fn nf4_stays_packed_and_fp4_is_dense_in_the_type_of_its_state_or_the_one_asked_for() {
    for name in MODELS {
        let mut model = empty(name);
        let report = model.load_base(golden(name), &BaseOptions::new()).unwrap();
        assert_eq!(
            report.four_bit,
            digests(name).into_keys().collect::<Vec<_>>()
        );
        let packed = if name == "fp4" {
            0
        } else {
            report.four_bit.len()
        };
        assert_eq!(report.packed, packed);
        let weights = model.report().weights;
        let bases: Vec<Base> = weights.iter().map(|weight| weight.base).collect();
        let is_packed = |base: &&Base| **base == Base::Nf4;
        assert_eq!(bases.iter().filter(is_packed).count(), packed);
    }
    let dtype = |options: &BaseOptions| {
        let model = load("fp4", options);
        model.model.layers[0].mlp.up_proj.weight.val().dtype()
    };
    assert_eq!(dtype(&BaseOptions::new()), burn::tensor::DType::F16);
    assert_eq!(dtype(&f32s()), burn::tensor::DType::F32);
}

#[test]
fn what_is_packed_in_the_file_is_never_packed_again() {
    let double = Nf4Config::new().with_double_quant(true);
    let options = f32s().with_nf4(TargetConfig::all_linear(), double);
    for name in MODELS {
        let model = load(name, &options);
        let digest = digest(model.model.layers[0].mlp.up_proj.weight.val());
        let key = "model.layers.0.mlp.up_proj.weight";
        assert_eq!(digest, digests(name)[key], "{name}");
    }
    // Unless it is asked for.
    let mut model = empty("fp4");
    let report = model.load_base(golden("fp4"), &options.with_requantized_fp4());
    assert_eq!(report.unwrap().packed, 7);
    let mut expected = load("fp4", &f32s());
    expected
        .quantize_nf4(&TargetConfig::all_linear(), &double)
        .unwrap();
    let weight = |model: &PeftModel<LlamaForCausalLm>| {
        let weight = model.model.layers[0].mlp.down_proj.weight.val();
        digest(weight)
    };
    assert_eq!(weight(&model), weight(&expected));
}

#[test]
fn files_of_transformers_are_written_again_to_the_byte() {
    for (name, max_shard_bytes, compute_dtype) in [
        ("nf4", 1 << 30, FloatDType::F32),
        ("double", 11_000, FloatDType::BF16),
    ] {
        let model = load(name, &BaseOptions::new());
        let config = fs::read_to_string(golden(name).join("config.json")).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let options = SaveBaseOptions {
            config: Some(config),
            compute_dtype,
            max_shard_bytes,
            ..SaveBaseOptions::default()
        };
        let report = model.save_base(scratch.path(), &options).unwrap();
        let mut written: Vec<_> = fs::read_dir(scratch.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        written.sort();
        let mut files = report.files.clone();
        files.sort();
        assert_eq!(written, files);
        assert_eq!(files.len(), if name == "nf4" { 2 } else { 18 });
        assert_eq!(report.packed, digests(name).len());
        for file in &files {
            let file_name = file.file_name().unwrap().to_str().unwrap();
            let expected = golden(name).join(file_name);
            assert!(
                fs::read(file).unwrap() == fs::read(expected).unwrap(),
                "{name}/{file_name}"
            );
        }
        let loaded = tensors(scratch.path());
        assert_eq!(loaded.len(), report.tensors);
        let bytes: usize = loaded.values().map(|(.., bytes)| bytes.len()).sum();
        assert_eq!(bytes as u64, report.bytes);
    }
}

#[test]
fn bytes_under_another_type_are_the_same_bytes() {
    let scratch = tempfile::tempdir().unwrap();
    let model = load("storage", &BaseOptions::new());
    model
        .save_base(scratch.path(), &SaveBaseOptions::default())
        .unwrap();
    let (found, expected) = (
        tensors(scratch.path()),
        tensors(&golden("storage").join("model.safetensors")),
    );
    assert!(found.keys().eq(expected.keys()));
    let mut renamed = 0;
    for (name, (dtype, shape, bytes)) in &expected {
        let (found_dtype, found_shape, found_bytes) = &found[name];
        assert_eq!(found_bytes, bytes, "{name}");
        if found_dtype != dtype {
            renamed += 1;
            assert_eq!((found_dtype, dtype), (&Dtype::U8, &Dtype::BF16));
            assert_eq!(found_shape[0], 2 * shape[0]);
        } else {
            assert_eq!(found_shape, shape, "{name}");
        }
    }
    assert_eq!(renamed, 7);
}

#[test]
fn a_packed_base_survives_a_record() {
    let model = load("double", &f32s());
    let record = model.into_record().into_bytes().unwrap();
    let record = burn::store::ModuleRecord::from_bytes(record).unwrap();
    // Packed in the same way, of other values.
    let mut other = empty("double");
    let double = Nf4Config::new().with_double_quant(true);
    other
        .quantize_nf4(&TargetConfig::all_linear(), &double)
        .unwrap();
    let weight = |model: &PeftModel<LlamaForCausalLm>| {
        digest(model.model.layers[1].mlp.gate_proj.weight.val())
    };
    let expected = &digests("double")["model.layers.1.mlp.gate_proj.weight"];
    assert_ne!(weight(&other), *expected);
    let other = other.load_record(record);
    assert_eq!(weight(&other), *expected);
}
