//! A model's `config.json`, and its `quantization_config`, as transformers 5.24 writes them for bitsandbytes.

use std::path::Path;

use burn::tensor::FloatDType;
use serde_json::{Value, json};

use super::checkpoint::BaseCheckpoint;
use super::options::BaseOptions;
use super::python_json;
use super::quant_state::{QuantState, torch_name};
use super::save::MODEL_CONFIG_FILE;
use crate::format::disguise::not_json;
use crate::format::read::read_bounded;
use crate::format::{MAX_CONFIG_BYTES, json};
use crate::{PeftError, Result};

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
/// [`PeftError::Json`] for what is no object, or has a key twice.
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

/// The text of the `config.json` in `dir`, if there is one.
///
/// # Errors
///
/// Those of reading; [`PeftError::Json`] in [`PeftError::InFile`] for what is no object in UTF-8, or has a key twice.
pub(super) fn old_config(dir: &Path) -> Result<Option<String>> {
    let path = dir.join(MODEL_CONFIG_FILE);
    // A link that leads nowhere is an error of the file it stands for.
    if path.symlink_metadata().is_err() {
        return Ok(None);
    }
    let text = read_bounded(&path, MAX_CONFIG_BYTES)?;
    json::object(&text).map_err(|error| not_json(&path, &text, error))?;
    // What is JSON is UTF-8.
    Ok(Some(String::from_utf8_lossy(&text).into_owned()))
}

/// Whether the `config.json` beside a checkpoint says that the output head is the embedding; `default` where it says nothing.
/// Without a `config.json` it is.
///
/// # Errors
///
/// [`PeftError::Json`] for what is no object; [`PeftError::Config`] for what is no boolean; those of reading.
pub(super) fn tied(
    checkpoint: &BaseCheckpoint,
    default: bool,
    options: &BaseOptions,
) -> Result<bool> {
    const KEY: &str = "tie_word_embeddings";
    let path = checkpoint.path().with_file_name(MODEL_CONFIG_FILE);
    if path.symlink_metadata().is_err() {
        return Ok(true);
    }
    let text = read_bounded(&path, MAX_CONFIG_BYTES)?;
    let config = json::object_with(&text, options.limits.repeated_names)
        .map_err(|error| not_json(&path, &text, error))?;
    let of_text = config.get("text_config").and_then(|text| text.get(KEY));
    match config.get(KEY).or(of_text) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(tied)) => Ok(*tied),
        Some(other) => {
            let other: String = other.to_string().chars().take(80).collect();
            Err(PeftError::config(KEY, other, "true or false").in_file(&path))
        }
    }
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

/// Checks that the `quantization_config` of the `config.json` beside a checkpoint, where there is one, speaks of weights in
/// four bits of these types.
///
/// # Errors
///
/// [`PeftError::Config`] in [`PeftError::InFile`] where it does not; [`PeftError::Json`] and those of reading.
pub(super) fn check<'a>(
    checkpoint: &BaseCheckpoint,
    states: impl Iterator<Item = &'a QuantState>,
    options: &BaseOptions,
) -> Result<()> {
    if options.ignore_quantization_config {
        return Ok(());
    }
    let states: Vec<_> = states.collect();
    let path = checkpoint.path().with_file_name(MODEL_CONFIG_FILE);
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    let config = read_bounded(&path, MAX_CONFIG_BYTES).and_then(|config| {
        json::object_with(&config, options.limits.repeated_names)
            .map_err(|error| not_json(&path, &config, error))
    });
    let Some(first) = states.first() else {
        // What the configuration of a dense model says, broken or not, is not for this crate but for that one word.
        let stated = config.as_ref().ok().and_then(|config| {
            let quantization = config.get("quantization_config")?;
            let is_bitsandbytes = quantization.get("quant_method")? == "bitsandbytes";
            (is_bitsandbytes && quantization.get("load_in_4bit")? == true).then_some(())
        });
        return match stated {
            None => Ok(()),
            Some(()) => {
                let error = PeftError::config(
                    "quantization_config.load_in_4bit",
                    "true",
                    "none, as no tensor is packed, or `with_ignore_quantization_config`",
                );
                Err(error.in_file(&path))
            }
        };
    };
    let config = config?;
    let Some(quantization) = config.get("quantization_config").filter(|q| !q.is_null()) else {
        return Ok(());
    };
    let mixed = states
        .iter()
        .any(|other| other.quant_type != first.quant_type);
    // What transformers takes where the key is not there.
    let stated = quantization.get("bnb_4bit_quant_type").cloned();
    let stated = stated.unwrap_or_else(|| "fp4".into());
    for (key, value, expected) in [
        (
            "quant_method",
            quantization.get("quant_method"),
            json!("bitsandbytes"),
        ),
        (
            "load_in_4bit",
            quantization.get("load_in_4bit"),
            json!(true),
        ),
        (
            "bnb_4bit_quant_type",
            Some(&stated),
            json!(first.quant_type.name()),
        ),
    ] {
        let is_type = key == "bnb_4bit_quant_type";
        if value != Some(&expected) && !(is_type && mixed) {
            let value = value.map_or("nothing".to_owned(), Value::to_string);
            let error = PeftError::config(
                format!("quantization_config.{key}"),
                value.chars().take(80).collect::<String>(),
                format!("{expected}, as the tensors are, or `with_ignore_quantization_config`"),
            );
            return Err(error.in_file(&path));
        }
    }
    Ok(())
}
