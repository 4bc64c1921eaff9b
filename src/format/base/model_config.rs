//! A model's `config.json`, and its `quantization_config`, as transformers 5.24 writes them for bitsandbytes.

use burn::tensor::FloatDType;
use serde_json::{Value, json};

use super::python_json;
use super::quant_state::torch_name;
use crate::Result;
use crate::format::json;

/// How a model is quantised, as far as its configuration tells.
pub(super) struct Quantization {
    /// In what bitsandbytes is to compute.
    pub compute_dtype: FloatDType,
    /// Whether the scales are quantised themselves.
    pub double_quant: bool,
    /// Modules that stay dense; none for those that transformers leaves dense by itself.
    pub skip_modules: Option<Vec<String>>,
}

/// The `config.json` of a base as it is with this quantisation, or with none, and with dense parameters of type `dtype`,
/// if they have one.
///
/// # Errors
///
/// [`PeftError::Json`](crate::PeftError::Json) for what is no object, or has a key twice.
pub(super) fn rewrite(
    config: &str,
    quantization: Option<&Quantization>,
    dtype: Option<FloatDType>,
) -> Result<String> {
    let mut config = json::object(config.as_bytes())?;
    config.shift_remove("quantization_config");
    if let Some(quantization) = quantization {
        config.insert("quantization_config".into(), quantization.to_json());
    }
    if let Some(dtype) = dtype {
        // transformers 4 wrote `torch_dtype`, and 5 still reads it.
        config.shift_remove("torch_dtype");
        config.insert("dtype".into(), torch_name(dtype).into());
    }
    Ok(python_json::indented(&Value::Object(config)))
}

impl Quantization {
    fn to_json(&self) -> Value {
        json!({
            "_load_in_4bit": true,
            "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": torch_name(self.compute_dtype),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": self.skip_modules,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        })
    }
}
