//! Base values that PEFT stores beside an adapter are frozen here as they are there: a base of the adapter's own, of which nothing trains.

use std::fs;
use std::path::PathBuf;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_peft::format::{
    AdapterFile, BaseValues, LoadOptions, ParameterTensor, ReadOptions, SaveOptions, WEIGHTS_FILE,
};
use burn_peft::model::{ChangeKind, PeftModel, Way};
use llama::model::LlamaForCausalLm;

use super::kinds::{Tensors, check};

fn golden(name: &str) -> PathBuf {
    crate::golden("kinds").join(name)
}

fn llama(device: &Device) -> PeftModel<LlamaForCausalLm> {
    let dir = crate::golden("llama").join("untied");
    LlamaForCausalLm::from_pretrained(dir, device)
        .unwrap()
        .1
        .into_peft()
}

/// The adapter with the base values of embedding and head in its file, which are those of the model, or each doubled.
fn file(doubled: bool) -> AdapterFile {
    let mut file =
        AdapterFile::read(golden("llama-embedding-lora-base"), &ReadOptions::default()).unwrap();
    assert_eq!(file.base_values.len(), 2);
    assert!(file.copies.is_empty());
    for ParameterTensor { data, .. } in file.base_values.iter_mut().filter(|_| doubled) {
        let values: Vec<f32> = data.iter::<f32>().map(|value| 2.0 * value).collect();
        *data = TensorData::new(values, data.shape().clone());
    }
    file
}

fn tokens(device: &Device) -> Tensor<2, Int> {
    Tensor::from_data([[17, 3, 88, 50, 4, 3, 61, 29]], device)
}

/// The paths of all parameters with what requires a gradient among them.
#[derive(Default)]
struct Params(Vec<String>, Vec<(String, bool)>);

impl ModuleVisitor for Params {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.0.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.0.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.1.push((self.0.join("."), param.is_require_grad()));
    }
}

/// Values equal to the model's are not kept a second time, and are written again all the same.
#[test]
fn equal_base_values_leave_nothing_behind_and_are_written_again() {
    let device = Device::flex().autodiff();
    let mut model = llama(&device);
    let case = golden("llama-embedding-lora-base");
    let report = model
        .load_adapter("default", &case, &LoadOptions::new().with_trainable(true))
        .unwrap();
    assert!(report.base_values.is_empty(), "{report}");
    assert!(
        report
            .loaded
            .iter()
            .any(|key| key.ends_with("embed_tokens.base_layer.weight"))
    );
    let kinds = model
        .report()
        .weights
        .into_iter()
        .flat_map(|weight| weight.adapters);
    assert!(
        kinds
            .into_iter()
            .all(|adapter| matches!(adapter.kind, ChangeKind::Lora { .. }))
    );
    let trainable = model.report().trainable_params;
    // The embedding and the head, of 96 tokens and 32 features, both of rank 2.
    assert_eq!(trainable, 2 * (2 * (96 + 32)));
    let scratch = tempfile::tempdir().unwrap();
    let saved = model
        .save_adapter("default", scratch.path(), &SaveOptions::default())
        .unwrap();
    let [written, golden] = [&saved, &case].map(|dir| Tensors::read(&dir.join(WEIGHTS_FILE)).0);
    assert_eq!(written, golden);
    // Or not, if that is asked for.
    let options = SaveOptions::new().with_keep_origin(false);
    let saved = model
        .save_adapter("default", scratch.path(), &options)
        .unwrap();
    let written = Tensors::read(&saved.join(WEIGHTS_FILE)).0;
    assert!(!written.keys().any(|key| key.contains("base_layer")));
}

#[test]
fn other_base_values_are_a_frozen_base_of_the_adapter_s_own() {
    let device = Device::flex().autodiff();
    let mut model = llama(&device);
    let file = file(true);
    let report = file
        .attach(
            &mut model,
            "default",
            &LoadOptions::new().with_trainable(true),
        )
        .unwrap();
    assert_eq!(report.base_values.len(), 2, "{report}");
    assert!(
        report
            .to_string()
            .contains("base values that the adapter keeps for itself")
    );

    // The same as a base of doubled values under the plain factors.
    let mut expected = llama(&device);
    let mut doubled = expected.clone().into_module();
    let double = |param: Param<Tensor<2>>| Param::from_tensor(param.val().detach().mul_scalar(2.0));
    doubled.model.embed_tokens.weight = double(doubled.model.embed_tokens.weight);
    let head = doubled.lm_head.as_mut().unwrap();
    head.weight = double(head.weight.clone());
    expected = doubled.into_peft();
    let mut plain = file.clone();
    plain.base_values.clear();
    plain
        .attach(
            &mut expected,
            "default",
            &LoadOptions::new().with_trainable(true),
        )
        .unwrap();
    let logits = model.forward(tokens(&device));
    let of_expected = expected.forward(tokens(&device));
    check(
        "logits",
        &logits.clone().into_data(),
        &of_expected.clone().into_data(),
        1e-6,
    );

    // Nothing of it trains, requires a gradient, or is a parameter of the adapter; the factors are and do.
    let factors = plain
        .tensors
        .iter()
        .flat_map(|module| module.iter())
        .count();
    let report = model.report();
    assert_eq!(report.trainable_params, expected.report().trainable_params);
    let mut params = Params::default();
    model.visit(&mut params);
    let based: Vec<_> = params
        .1
        .iter()
        .filter(|(path, _)| path.contains(".peft.default.base."))
        .collect();
    assert_eq!(based.len(), 2);
    assert!(based.iter().all(|(_, trains)| !trains));
    assert_eq!(
        params.1.iter().filter(|(_, trains)| *trains).count(),
        factors
    );
    let mut params = Params::default();
    model.clone().adapters_only().visit(&mut params);
    assert_eq!(params.1.len(), factors);

    // Gradients of the factors are those on the doubled base.
    let [found, expected] = [(&model, logits), (&expected, of_expected)].map(|(model, logits)| {
        let gradients = logits.square().sum().backward();
        let factors = model.factors("default").unwrap();
        let gradients = factors
            .into_iter()
            .flat_map(|(_, lora)| [lora.a.val().grad(&gradients), lora.b.val().grad(&gradients)]);
        gradients
            .map(|gradient| gradient.unwrap().into_data())
            .collect::<Vec<_>>()
    });
    for (found, expected) in found.iter().zip(&expected) {
        check("gradient", found, expected, 1e-5);
    }
    // And no dense weight of the vocabulary was composed on the way.
    for weight in model.report().weights {
        assert_eq!(weight.way, Way::Factored, "{}", weight.path);
    }

    // Without the adapter the model has its own base; written, the file has the adapter's.
    let base = llama(&device).forward(tokens(&device)).into_data();
    assert_eq!(model.disabled().forward(tokens(&device)).into_data(), base);
    let scratch = tempfile::tempdir().unwrap();
    let saved = model
        .save_adapter("default", scratch.path(), &SaveOptions::default())
        .unwrap();
    let written = AdapterFile::read(&saved, &ReadOptions::default()).unwrap();
    let sorted = |file: &AdapterFile| {
        let mut values = file.base_values.clone();
        values.sort_by(|a, b| a.path.cmp(&b.path));
        values
    };
    assert_eq!(sorted(&written), sorted(&file));
    assert!(fs::metadata(saved.join(WEIGHTS_FILE)).is_ok());

    // Merged, the weights are the adapter's base with its changes.
    let (merged, _) = model.merged().unwrap();
    let found = merged.forward(tokens(&device)).into_data();
    check(
        "merged",
        &found,
        &model.valid().forward(tokens(&device)).into_data(),
        1e-5,
    );
}

/// A base of bf16 is kept as bf16, as PEFT copies values into the parameters that are there.
#[test]
fn base_values_have_the_type_of_the_base() {
    let device = Device::flex();
    let mut model = llama(&device).into_module();
    let weight = model.model.embed_tokens.weight.val();
    let weight: Tensor<2> = weight.cast(burn::tensor::FloatDType::BF16);
    model.model.embed_tokens.weight = Param::from_tensor(weight);
    let mut model = model.into_peft();
    file(true)
        .attach(&mut model, "default", &LoadOptions::default())
        .unwrap();
    let changes = model.changes("default").unwrap();
    let frozen = changes.iter().find_map(|(path, change)| match change {
        burn_peft::adapter::Change::Copy(copy) if path.contains("embed_tokens") => Some(copy),
        _ => None,
    });
    let frozen = frozen.unwrap();
    assert!(frozen.is_frozen());
    assert_eq!(frozen.values.val().dtype(), DType::BF16);
}

/// Which base values count is the caller's to say.
#[test]
fn base_values_are_ignored_or_all_taken_if_asked() {
    let device = Device::flex();
    let base = llama(&device).forward(tokens(&device)).into_data();
    let mut plain = file(true);
    plain.base_values.clear();
    let mut expected = llama(&device);
    plain
        .attach(&mut expected, "default", &LoadOptions::default())
        .unwrap();
    let mut model = llama(&device);
    let options = LoadOptions::new().with_base_values(BaseValues::Ignored);
    let report = file(true).attach(&mut model, "default", &options).unwrap();
    assert_eq!(report.notes.len(), 2, "{report}");
    let [found, expected] =
        [&model, &expected].map(|model| model.forward(tokens(&device)).into_data());
    assert_eq!(found, expected);
    assert_ne!(found, base);

    // Of another layer than an embedding or a head: PEFT would load it too.
    let mut file = plain;
    let path = "model.layers.0.mlp.up_proj.weight".to_owned();
    let data = TensorData::zeros::<f32, _>([48, 32]);
    file.base_values.push(ParameterTensor { path, data });
    let error = file.attach(&mut llama(&device), "default", &LoadOptions::default());
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("1 unexpected: `base_model.model.model.layers.0.mlp.up_proj.weight`"),
        "{error}"
    );
    let mut model = llama(&device);
    let options = LoadOptions::new().with_base_values(BaseValues::All);
    let report = file.attach(&mut model, "default", &options).unwrap();
    assert_eq!(report.base_values.len(), 1);
    assert_ne!(model.forward(tokens(&device)).into_data(), expected);
}
