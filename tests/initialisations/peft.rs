//! PiSSA and OLoRA as PEFT trains them, not converted (`tests/golden/peft/generate.py`): it has taken `s·A₀·B₀` out of the base.

use std::fs;
use std::path::PathBuf;

use burn::tensor::{DType, Int, TensorData};
use burn_peft::PeftError;
use burn_peft::format::{LoadOptions, SaveOptions};
use burn_peft::model::{PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use safetensors::SafeTensors;

use super::*;
use llama::model::LlamaForCausalLm;

/// The logits' own largest value is what an error is relative to. They are the end of chains of f32 sums in another order
/// than PyTorch's, after a decomposition whose product is stable to rounding over the gap between the singular values
/// kept and left, which in these weights is some percent: 1e-7 times up to a hundred.
const CLOSE: f32 = 2e-5;

fn golden(name: &str) -> PathBuf {
    crate::golden("peft").join(name)
}

fn llama() -> PeftModel<LlamaForCausalLm> {
    let dir = crate::golden("llama/tied");
    PeftModel::new(
        LlamaForCausalLm::from_pretrained(dir, &Device::default())
            .unwrap()
            .1,
    )
}

/// The input, the base's logits and the adapted ones, from Python.
fn logits(name: &str) -> (Tensor<2, Int>, Tensor<3>, Tensor<3>) {
    let bytes = fs::read(golden(name).join("logits.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data = |name: &str, dtype| {
        let view = file.tensor(name).unwrap();
        TensorData::from_bytes_vec(view.data().to_vec(), view.shape().to_vec(), dtype)
    };
    let device = &Device::default();
    let float = |name: &str| Tensor::from_data(data(name, DType::F32), device);
    let tokens = Tensor::from_data(data("input_ids", DType::I64), device);
    (tokens, float("base"), float("adapted"))
}

#[test]
fn unconverted_adapters_of_peft_give_its_logits_and_are_saved_converted() {
    for name in ["pissa", "olora"] {
        let (tokens, base, adapted) = logits(name);
        let mut model = llama();
        let report = model.load_adapter("default", golden(name), &LoadOptions::default());
        assert!(report.unwrap().is_complete());
        let found = error(&model.forward(tokens.clone()), &adapted);
        assert!(found < CLOSE, "{name}: {found}");
        // The base has not moved.
        let found = error(&model.disabled().forward(tokens.clone()), &base);
        assert!(found < CLOSE, "{name}, disabled: {found}");

        let dir = tempfile::tempdir().unwrap();
        model
            .save_adapter("default", dir.path(), &SaveOptions::default())
            .unwrap();
        let text = fs::read_to_string(dir.path().join("adapter_config.json")).unwrap();
        for line in [
            "\"init_lora_weights\": true",
            "\"r\": 6",
            "\"lora_alpha\": 10",
            "\"down_proj\": 4",
        ] {
            assert!(text.contains(line), "{name}: no {line} in {text}");
        }
        let mut converted = llama();
        converted
            .load_adapter("default", dir.path(), &LoadOptions::default())
            .unwrap();
        let found = error(&converted.forward(tokens.clone()), &adapted);
        assert!(found < CLOSE, "{name}, converted: {found}");
        let (merged, _) = model.merge_and_unload().unwrap();
        let found = error(&merged.forward(tokens), &adapted);
        assert!(found < CLOSE, "{name}, merged: {found}");
    }
}

#[test]
fn an_unconverted_adapter_is_refused_on_a_packed_weight() {
    for name in ["pissa", "olora"] {
        let mut model = llama();
        let targets = TargetConfig::list(["v_proj"]);
        model.quantize_nf4(&targets, &Nf4Config::new()).unwrap();
        let error = model.load_adapter("default", golden(name), &LoadOptions::default());
        let error = error.unwrap_err();
        assert!(
            matches!(&error, PeftError::Config { name, .. } if name.contains("v_proj")),
            "{error}"
        );
        assert_eq!(model.adapters().count(), 0);
    }
}
