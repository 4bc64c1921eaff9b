//! Adapters that Apple's mlx-lm wrote: another configuration, and factors in Burn's layout.
//!
//! ```text
//! adapter_config.json    {"fine_tune_type": "lora" | "dora", "lora_parameters": {"rank", "scale", "dropout", ..}, ..}
//! adapters.safetensors   PATH.lora_a [d_in, r], PATH.lora_b [r, d_out], and DoRA's PATH.m [d_out]
//! ```
//!
//! The scale `s` of `ΔW = s·A·B` is given as it is, so `α = s·r` here. Which modules have factors is for the tensors to say.
//! Dropout, `p` in both, is the only other number that is kept.
//!
//! Source: `tuner/utils.py` and `tuner/dora.py` of [mlx-lm](https://github.com/ml-explore/mlx-lm).

use serde::Deserialize;
use serde_json::Value;

use super::config::AdapterConfig;
use super::fields;
use super::json;
use crate::model::TargetConfig;
use crate::{PeftError, Result};

/// Name of the file of tensors in a directory of mlx-lm.
pub const MLX_WEIGHTS_FILE: &str = "adapters.safetensors";

#[derive(Deserialize)]
struct MlxConfig {
    #[serde(default = "lora")]
    fine_tune_type: String,
    lora_parameters: Parameters,
}

#[derive(Deserialize)]
struct Parameters {
    rank: usize,
    scale: f64,
    #[serde(default)]
    dropout: f64,
    alpha: Option<f64>,
}

fn lora() -> String {
    "lora".into()
}

/// The configuration in the text of the file, for the modules at `paths`.
///
/// # Errors
///
/// As [`AdapterConfig::from_json`]; [`PeftError::UnsupportedKey`] for a fine-tune that is neither LoRA nor DoRA, and for an `alpha`
/// that changes the scale in some versions of mlx-lm.
pub(super) fn parse(bytes: &[u8], paths: Vec<String>) -> Result<AdapterConfig> {
    let object = json::object(bytes)?;
    if object
        .get("peft_type")
        .is_some_and(|method| !method.is_null())
    {
        return Err(PeftError::config(
            "peft_type",
            fields::shorten(&object["peft_type"]),
            format!("none beside {MLX_WEIGHTS_FILE}, which is mlx-lm's"),
        ));
    }
    let MlxConfig {
        fine_tune_type,
        lora_parameters,
    } = serde_json::from_slice(bytes).map_err(PeftError::json)?;
    let unsupported = |key: &str, value: &Value, reason: &str| PeftError::UnsupportedKey {
        key: key.into(),
        value: fields::shorten(value),
        reason: reason.into(),
    };
    if !matches!(fine_tune_type.as_str(), "lora" | "dora") {
        let reason = "only \"lora\" and \"dora\" are low-rank changes";
        return Err(unsupported(
            "fine_tune_type",
            &object["fine_tune_type"],
            reason,
        ));
    }
    let Parameters {
        rank,
        scale,
        dropout,
        alpha,
    } = lora_parameters;
    if let Some(alpha) = alpha.filter(|&alpha| alpha != rank as f64) {
        let reason = "the first versions of mlx-lm multiply the scale by alpha/rank, later ones do not; \
                      remove it, or set it to the rank, once the scale is what was trained with";
        return Err(unsupported("lora_parameters.alpha", &alpha.into(), reason));
    }
    let config = AdapterConfig::new(rank, scale * rank as f64, TargetConfig::list(paths))
        .with_lora_dropout(dropout)
        .with_use_dora(fine_tune_type == "dora");
    config.validate()?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> Result<AdapterConfig> {
        parse(json.as_bytes(), vec!["a.q".into()])
    }

    #[test]
    fn the_scale_is_direct() {
        let json = r#"{"lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.1, "keys": ["q"]}, "num_layers": 4}"#;
        let found = config(json).unwrap();
        assert_eq!(
            (found.r, found.lora_alpha, found.lora_dropout),
            (8, 160.0, 0.1)
        );
        assert_eq!(found.targets, TargetConfig::list(["a.q"]));
        assert!(!found.use_dora);
        let json = r#"{"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 0.5, "alpha": 2}}"#;
        assert!(config(json).unwrap().use_dora);
    }

    #[test]
    fn what_it_cannot_mean_is_an_error_that_names_it() {
        for (json, name) in [
            ("{}", "lora_parameters"),
            ("[]", "JSON"),
            (r#"{"lora_parameters": {"rank": 8}}"#, "scale"),
            (r#"{"lora_parameters": {"rank": 0, "scale": 1}}"#, "r = 0"),
            (r#"{"lora_parameters": {"rank": -1, "scale": 1}}"#, "-1"),
            (
                r#"{"lora_parameters": {"rank": 8, "scale": 1e300}}"#,
                "lora_alpha",
            ),
            (
                r#"{"lora_parameters": {"rank": 8, "scale": 1, "dropout": 1}}"#,
                "lora_dropout",
            ),
            (
                r#"{"lora_parameters": {"rank": 8, "scale": 1, "alpha": 16}}"#,
                "lora_parameters.alpha",
            ),
            (
                r#"{"fine_tune_type": "full", "lora_parameters": {"rank": 8, "scale": 1}}"#,
                "fine_tune_type",
            ),
            (
                r#"{"peft_type": "LORA", "lora_parameters": {"rank": 8, "scale": 1}}"#,
                "peft_type",
            ),
        ] {
            let error = config(json).unwrap_err().to_string();
            assert!(error.contains(name), "{json}: {error}");
        }
    }
}
