//! Adapters of PEFT on a Llama whose head shares the weight of its embedding (`tests/golden/tied/generate.py`): the lookup and the head
//! compute what they compute in PEFT, for every combination that PEFT has; and what is saved, PEFT reads to the same.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::adapter::LoraConfig;
use burn_peft::format::{AdapterFile, LoadOptions, SaveOptions, WEIGHTS_FILE};
use burn_peft::model::{
    HeadLoss, NewRows, PeftConfig, PeftForward, PeftModel, TargetConfig, TiedHead, TiedPart,
    TrainableTokens,
};
use burn_peft::objective::{HeadChunks, sft_head_loss, sft_loss};
use llama::model::LlamaForCausalLm;
use serde_json::Value;

use super::kinds::{Tensors, check};

/// Logits of one block, sums of at most 16 products in another order than torch's.
const BOUND: f32 = 1e-5;

struct Case {
    name: String,
    /// Whether the lookup changes, whether the head does, and whether both change alike.
    lookup: bool,
    head: bool,
    alike: bool,
    keys: Vec<String>,
}

fn cases() -> Vec<Case> {
    let listed = fs::read_to_string(dir("tied.json")).unwrap();
    let listed: Vec<Value> = serde_json::from_str(&listed).unwrap();
    let listed = listed.iter().map(|case| Case {
        name: case["name"].as_str().unwrap().into(),
        lookup: case["lookup"] == true,
        head: case["head"] == true,
        alike: case["alike"] == true,
        keys: serde_json::from_value(case["keys"].clone()).unwrap(),
    });
    let listed: Vec<_> = listed.collect();
    assert!(listed.len() >= 30);
    listed
}

fn dir(name: &str) -> PathBuf {
    crate::golden("tied").join(name)
}

fn llama(device: &Device) -> LlamaForCausalLm {
    LlamaForCausalLm::from_pretrained(dir("base"), device)
        .unwrap()
        .1
}

fn loaded(case: &Case, device: &Device) -> PeftModel<LlamaForCausalLm> {
    let mut model = llama(device).into_peft();
    let report = model.load_adapter(
        "default",
        dir(&case.name),
        &LoadOptions::new().with_trainable(true),
    );
    let report = report.unwrap_or_else(|error| panic!("{}: {error}", case.name));
    let mut loaded = report.loaded.clone();
    loaded.sort();
    assert_eq!(loaded, case.keys, "{}", case.name);
    model
}

/// What the lookup and the head compute with, `[16, 8]` each; the head without its bias.
fn weights(model: &PeftModel<LlamaForCausalLm>, device: &Device) -> [TensorData; 2] {
    let embedding = &model.module().model.embed_tokens;
    let tokens = Tensor::<1, Int>::arange(0..16, device).unsqueeze::<2>();
    let rows = embedding.forward_peft(tokens).squeeze_dim::<2>(0);
    let head = |x: Tensor<3>| embedding.attend_peft(x).squeeze_dim::<2>(0);
    let turned = head(Tensor::<2>::eye(8, device).unsqueeze());
    let turned = turned - head(Tensor::zeros([1, 8, 8], device));
    [rows.into_data(), turned.transpose().into_data()]
}

#[test]
fn lookup_and_head_are_those_of_peft_for_every_combination() {
    let device = Device::flex();
    for case in cases() {
        let golden = Tensors::read(&dir(&case.name).join("outputs.safetensors"));
        let tokens = Tensor::<2, Int>::from_data(golden.get("tokens").clone(), &device);
        let model = loaded(&case, &device);
        let [embedding, head] = weights(&model, &device);
        let name = &case.name;
        check(
            &format!("{name}: lookup"),
            &embedding,
            golden.get("embedding"),
            BOUND,
        );
        check(&format!("{name}: head"), &head, golden.get("head"), BOUND);
        let plain = weights(&llama(&device).into_peft(), &device);
        let is_changed = |found: &TensorData, plain: &TensorData| {
            let mut pairs = found.iter::<f32>().zip(plain.iter::<f32>());
            pairs.any(|(found, plain)| (found - plain).abs() > 1e-3)
        };
        let changed = [
            is_changed(&embedding, &plain[0]),
            is_changed(&head, &plain[1]),
        ];
        assert_eq!(changed, [case.lookup, case.head], "{name}");
        let logits = model.forward(tokens.clone());
        check(
            &format!("{name}: logits"),
            &logits.clone().into_data(),
            golden.get("logits"),
            BOUND,
        );

        // The loss of the head alone is that of its logits.
        let (targets, mask) = (
            tokens.clone(),
            Tensor::<2, Bool>::full([1, 4], true, &device),
        );
        let whole = sft_loss(logits, targets.clone(), mask.clone()).unwrap();
        let chunked = model
            .loss(tokens.clone(), targets, mask, &HeadChunks::default())
            .unwrap();
        let sums = [whole.sum, chunked.sum].map(|sum| sum.into_scalar::<f32>());
        assert!(
            (sums[0] - sums[1]).abs() <= 1e-4 * sums[0].abs(),
            "{name}: {sums:?}"
        );

        let base = llama(&device).forward(tokens.clone()).into_data();
        let disabled = model.disabled().forward(tokens).into_data();
        assert_eq!(disabled, base, "{name}");
    }
}

#[test]
fn gradients_are_those_of_peft() {
    let device = Device::flex().autodiff();
    let mut compared = BTreeSet::new();
    for case in cases() {
        let golden = Tensors::read(&dir(&case.name).join("outputs.safetensors"));
        let tokens = Tensor::<2, Int>::from_data(golden.get("tokens").clone(), &device);
        let weights = Tensor::<3>::from_data(golden.get("weights").clone(), &device);
        let model = loaded(&case, &device);
        let gradients = (model.forward(tokens) * weights).sum().backward();
        // DoRA's and other pairs that PEFT ties train apart here.
        if case.name.ends_with("-tied") && case.name.starts_with("dora") {
            continue;
        }
        let found = super::kinds::saved_gradients(model, &gradients);
        for (key, expected) in &golden.0 {
            let Some(key) = key.strip_prefix("gradient.") else {
                continue;
            };
            let found = found
                .0
                .get(key)
                .unwrap_or_else(|| panic!("{}: no {key}", case.name));
            check(
                &format!("{}: {key}", case.name),
                found,
                expected,
                4.0 * BOUND,
            );
            compared.insert(key.to_owned());
        }
    }
    // Of the embedding, the head and the layers.
    assert!(compared.len() >= 12, "{compared:?}");
}

#[test]
fn what_is_saved_has_peft_s_tensors_and_loads_to_the_same() {
    let device = Device::flex();
    for case in cases() {
        let name = &case.name;
        let model = loaded(&case, &device);
        let scratch = tempfile::tempdir().unwrap();
        let saved = model.save_adapter("default", scratch.path(), &SaveOptions::default());
        let saved = saved.unwrap_or_else(|error| panic!("{name}: {error}"));
        let [written, golden] =
            [&saved, &dir(name)].map(|dir| Tensors::read(&dir.join(WEIGHTS_FILE)).0);
        // Of a head that is the embedding PEFT stores the base once more.
        let own = |key: &&String| !key.ends_with("lm_head.base_layer.weight");
        assert_eq!(
            written.keys().filter(own).collect::<Vec<_>>(),
            golden.keys().filter(own).collect::<Vec<_>>(),
            "{name}"
        );
        for (key, data) in &written {
            assert_eq!(Some(data), golden.get(key), "{name}: {key}");
        }
        let mut again = llama(&device).into_peft();
        let options = LoadOptions::default();
        again.load_adapter("default", &saved, &options).unwrap();
        assert_eq!(weights(&again, &device), weights(&model, &device), "{name}");
    }
}

#[test]
fn only_changes_of_both_alike_are_merged_and_others_are_refused_with_the_way_out() {
    let device = Device::flex();
    for case in cases() {
        let name = &case.name;
        let golden = Tensors::read(&dir(name).join("outputs.safetensors"));
        let tokens = Tensor::<2, Int>::from_data(golden.get("tokens").clone(), &device);
        let model = loaded(&case, &device);
        match model.merged() {
            Ok((merged, _)) => {
                assert!(case.alike, "{name}");
                let logits = merged.forward(tokens).into_data();
                check(name, &logits, golden.get("logits"), BOUND);
            }
            Err(error) => {
                assert!(!case.alike, "{name}: {error}");
                let text = error.to_string();
                assert!(text.contains("merge of `model.embed_tokens`"), "{text}");
                assert!(text.contains("`ensure_weight_tying`"), "{text}");
            }
        }
        // A reference that is the base is none for an adapter that changes the head alone.
        assert!(
            matches!(model.base_reference(), Err(PeftError::NotTheBase { .. })),
            "{name}"
        );
        let reference = model
            .reference()
            .forward(Tensor::from_data([[1, 5, 2, 9]], &device));
        check(name, &reference.into_data(), golden.get("logits"), BOUND);
    }
}

/// A model that reads head and lookup from one value cannot compute what changes one of them.
#[test]
fn where_the_head_is_composed_what_changes_one_of_the_two_is_refused() {
    let device = Device::flex();
    for case in cases() {
        let mut model =
            PeftModel::new(llama(&device)).with_composed_tied_head("model.embed_tokens");
        let report = model.load_adapter("default", dir(&case.name), &LoadOptions::default());
        match report {
            Ok(_) => {
                assert!(case.alike, "{}", case.name);
                // As the model would read it.
                let both = model.module().model.embed_tokens.weight.val();
                let golden = Tensors::read(&dir(&case.name).join("outputs.safetensors"));
                check(&case.name, &both.into_data(), golden.get("head"), BOUND);
            }
            Err(error) => {
                assert!(!case.alike, "{}: {error}", case.name);
                let text = error.to_string();
                assert!(text.contains("PeftModel::with_tied_head"), "{text}");
                assert_eq!(model.adapters().count(), 0);
            }
        }
    }
}

/// Nothing tells a model without a head of its own from one whose head is its embedding: the report says what follows.
#[test]
fn where_nothing_is_known_of_the_head_the_report_says_so() {
    let device = Device::flex();
    for case in cases() {
        let mut model = PeftModel::new(llama(&device));
        let name = &case.name;
        match model.load_adapter("default", dir(name), &LoadOptions::default()) {
            Ok(report) => {
                let noted = report.notes.iter().any(|note| note.contains("lookup"));
                assert_eq!(noted, !case.alike, "{name}: {report}");
                // It calls `attend_peft`, so the head is right all the same.
                let golden = Tensors::read(&dir(name).join("outputs.safetensors"));
                let tokens = Tensor::<2, Int>::from_data(golden.get("tokens").clone(), &device);
                let logits = model.forward(tokens).into_data();
                check(name, &logits, golden.get("logits"), BOUND);
                // Now it is known that the head reads the embedding.
                assert_eq!(model.merged().is_ok(), case.alike, "{name}");
            }
            Err(error) => {
                // What changes the head has no place.
                assert!(case.head && !case.alike, "{name}: {error}");
                let text = error.to_string();
                assert!(
                    text.contains("`PeftModel::with_tied_head` says so"),
                    "{name}: {text}"
                );
            }
        }
    }
}

#[test]
fn a_declaration_that_cannot_be_true_is_an_error_that_names_it() {
    let device = Device::flex();
    let config = PeftConfig::new(LoraConfig::new(2), TargetConfig::list(["q_proj"]));
    let mut model = PeftModel::new(llama(&device)).with_tied_head("wte");
    let error = model.add_adapter("x", &config).unwrap_err().to_string();
    assert!(
        error.contains("the embedding `wte`") && error.contains("embed_tokens"),
        "{error}"
    );
    let untied = crate::golden("llama/untied");
    let (_, untied) = LlamaForCausalLm::from_pretrained(untied, &device).unwrap();
    let mut model = PeftModel::new(untied).with_tied_head("embed_tokens");
    let error = model.add_adapter("x", &config).unwrap_err().to_string();
    assert!(error.contains("own head `lm_head`"), "{error}");
}

/// Adapters of different flags, active at once: each changes what it changes alone.
#[test]
fn several_adapters_of_different_flags_change_each_what_it_says() {
    let device = Device::flex();
    let names = [
        "lora-embedding",
        "lora-embedding-tied",
        "lora-head",
        "copy-head",
        "tokens",
    ];
    let of_alone = |name: &str| {
        let mut model = llama(&device).into_peft();
        let options = LoadOptions::default();
        model.load_adapter(name, dir(name), &options).unwrap();
        weights(&model, &device).map(|data| Tensor::<2>::from_data(data, &device))
    };
    let base = llama(&device).model.embed_tokens.weight.val();
    let mut model = llama(&device).into_peft();
    for name in names {
        model
            .load_adapter(name, dir(name), &LoadOptions::default())
            .unwrap();
    }
    let factors = [1.0, 0.5, -2.0, 1.0, 0.25];
    let active: Vec<_> = names.into_iter().zip(factors).collect();
    model.set_adapters(&active).unwrap();
    let expected = active
        .iter()
        .fold([base.clone(), base.clone()], |sum, (name, factor)| {
            let [lookup, head] = of_alone(name);
            let [of_lookup, of_head] = sum;
            [
                of_lookup + (lookup - base.clone()).mul_scalar(*factor),
                of_head + (head - base.clone()).mul_scalar(*factor),
            ]
        });
    let found = weights(&model, &device);
    for (found, expected) in found.iter().zip(expected) {
        check("sum", found, &expected.into_data(), BOUND);
    }
    // The chunked loss has the same head.
    let hidden = Tensor::<3>::random([1, 4, 8], burn::tensor::Distribution::Default, &device);
    let targets = Tensor::<2, Int>::from_data([[1, 5, 2, 9]], &device);
    let mask = Tensor::<2, Bool>::full([1, 4], true, &device);
    let head = &model.module().model.embed_tokens;
    assert_eq!(head.head_dims(), [8, 16]);
    let logits = head.attend_peft(hidden.clone());
    let whole = sft_loss(logits, targets.clone(), mask.clone()).unwrap();
    let chunked = sft_head_loss(hidden, head, targets, mask, &HeadChunks::default()).unwrap();
    let sums = [whole.sum, chunked.sum].map(|sum| sum.into_scalar::<f32>());
    assert!(
        (sums[0] - sums[1]).abs() <= 1e-4 * sums[0].abs(),
        "{sums:?}"
    );
    // One adapter cannot do what two of different flags do.
    let combined = model.add_weighted_adapter(
        "sum",
        &[("lora-embedding", 1.0), ("lora-embedding-tied", 1.0)],
        burn_peft::adapter::Combination::Cat,
    );
    let error = combined.unwrap_err().to_string();
    assert!(error.contains("ensure_weight_tying"), "{error}");
}

/// Fresh adapters change what they would change in PEFT, and those that are saved are read there: the keys are PEFT's.
#[test]
fn fresh_adapters_of_the_head_and_of_the_lookup_are_saved_as_peft_has_them() {
    let device = Device::flex();
    let lora = || LoraConfig::new(2);
    let on = |names: &[&str]| PeftConfig::new(lora(), TargetConfig::list(names.iter().copied()));
    let rows = |names: &[(&str, &[usize])]| {
        let named = names
            .iter()
            .map(|(name, rows)| ((*name).to_owned(), rows.to_vec()));
        TrainableTokens::Named(named.collect())
    };
    let embed = "model.embed_tokens";
    for (config, parts, keys) in [
        (
            on(&["q_proj", "embed_tokens"]),
            &[TiedPart::Lookup][..],
            &["model.embed_tokens.lora_embedding_A"][..],
        ),
        (
            on(&["q_proj", "embed_tokens"]).with_ensure_weight_tying(true),
            &[TiedPart::Both],
            &[
                "model.embed_tokens.lora_embedding_A",
                "lm_head.lora_B.weight",
            ],
        ),
        (
            on(&["q_proj", "lm_head"]),
            &[TiedPart::Head],
            &["lm_head.lora_A.weight"],
        ),
        (
            PeftConfig::new(lora().with_dora(true), TargetConfig::list(["lm_head"])),
            &[TiedPart::Head],
            &["lm_head.lora_magnitude_vector"],
        ),
        (
            on(&["q_proj"]).with_modules_to_save(["lm_head"]),
            &[TiedPart::Head],
            &["lm_head.weight"],
        ),
        (
            on(&["q_proj"]).with_modules_to_save(["embed_tokens", "lm_head"]),
            &[TiedPart::Lookup, TiedPart::Head],
            &["lm_head.weight", "model.embed_tokens.weight"],
        ),
        (
            on(&["q_proj"]).with_trainable_tokens(rows(&[("lm_head", &[3])])),
            &[TiedPart::Head],
            &["lm_head.token_adapter.trainable_tokens_delta"],
        ),
        (
            on(&["q_proj"])
                .with_trainable_tokens(rows(&[("embed_tokens", &[1]), ("lm_head", &[3])])),
            &[TiedPart::Lookup, TiedPart::Head],
            &[
                "lm_head.token_adapter.trainable_tokens_delta",
                "model.embed_tokens.token_adapter.trainable_tokens_delta",
            ],
        ),
    ] {
        let mut model = llama(&device).into_peft();
        let report = model.add_adapter("default", &config).unwrap();
        let weights_before = weights(&model, &device);
        let base = llama(&device).model.embed_tokens.weight.val().into_data();
        for found in &weights_before {
            check("fresh", found, &base, 1e-6);
        }
        let weight = report
            .model
            .weights
            .iter()
            .find(|weight| weight.path == embed)
            .unwrap();
        let found: Vec<_> = weight.adapters.iter().map(|adapter| adapter.part).collect();
        assert_eq!(found, parts, "{config:?}");
        let file = AdapterFile::from_model(&model, "default", &SaveOptions::default()).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        file.write(scratch.path(), &Default::default()).unwrap();
        let written = Tensors::read(&scratch.path().join(WEIGHTS_FILE));
        for key in keys {
            assert!(
                written.0.contains_key(&format!("base_model.model.{key}")),
                "{key}"
            );
        }
    }
}

/// Of the tokens that were there, nothing changes; the new ones have no change of an adapter's.
#[test]
fn a_resized_vocabulary_keeps_what_adapters_change_of_each_part() {
    let device = Device::flex();
    for case in cases() {
        let name = &case.name;
        let mut model = loaded(&case, &device);
        let before = weights(&model, &device);
        // A row of zeros has no direction for DoRA.
        let new_rows = match name.starts_with("dora") {
            true => NewRows::Mean { seed: 1 },
            false => NewRows::Zeros,
        };
        let resized = model.resize_vocabulary(18, &new_rows);
        if name.starts_with("dora-embedding") || name == "dora-head-tied" {
            // Magnitudes of the lookup are norms over all tokens.
            let error = resized.unwrap_err().to_string();
            assert!(error.contains("DoRA on an embedding"), "{name}: {error}");
            continue;
        }
        resized.unwrap_or_else(|error| panic!("{name}: {error}"));
        let [lookup, head] = weights(&model, &device);
        assert_eq!(lookup, before[0], "{name}");
        let head = Tensor::<2>::from_data(head, &device);
        assert_eq!(head.dims(), [18, 8], "{name}");
        let old = head.clone().narrow(0, 0, 16).into_data();
        check(&format!("{name}: head"), &old, &before[1], BOUND);
        let new = head.narrow(0, 16, 2).abs().max().into_scalar::<f32>();
        assert_eq!(new == 0.0, !name.starts_with("dora"), "{name}: {new}");
    }
}
