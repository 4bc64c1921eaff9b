//! Adapters that Apple's mlx-lm wrote: another configuration, and factors in Burn's layout.
//!
//! ```text
//! adapter_config.json    {"fine_tune_type": "lora" | "dora", "lora_parameters": {"rank", "scale", "dropout", ..}, ..}
//! adapters.safetensors   PATH.lora_a [d_in, r], PATH.lora_b [r, d_out], and DoRA's PATH.m [d_out]
//!                        PATH.lora_a [E, r, d_in] (at first [E·r, d_in]), PATH.lora_b [E, d_out, r] of a SwitchLinear of E experts
//! ```
//!
//! A `SwitchLinear` has the weights of experts in one tensor, `PATH.weight`. An embedding has the keys of a linear layer, and a head that
//! shares its weight has its change too.
//!
//! The scale `s` of `ΔW = s·A·B` is given as it is, so `α = s·r` here. Which modules have factors is for the tensors to say.
//! Dropout, `p` in both, is the only other number that is kept.
//!
//! Source: `tuner/utils.py` and `tuner/dora.py` of [mlx-lm](https://github.com/ml-explore/mlx-lm).

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::Value;

use super::config::AdapterConfig;
use super::fields;
use super::json;
use super::keys::{Factor, Role, read_key};
use super::read::ReadOptions;
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

/// The configuration in the text of the file, for the modules that the tensors of these names and shapes are of.
///
/// # Errors
///
/// As [`AdapterConfig::from_json`]; [`PeftError::UnsupportedKey`] for a fine-tune that is neither LoRA nor DoRA, and for an `alpha`
/// that changes the scale in some versions of mlx-lm.
pub(super) fn parse<'a>(
    bytes: &[u8],
    tensors: impl Iterator<Item = (&'a str, &'a [usize])>,
    options: &ReadOptions,
) -> Result<AdapterConfig> {
    let (mut linear, mut experts) = (BTreeSet::new(), BTreeSet::new());
    for (key, shape) in tensors {
        let Some(key) = read_key(key).filter(|key| matches!(key.role, Role::Factor(_))) else {
            continue;
        };
        match (key.role, shape.len()) {
            (Role::Factor(Factor::B), 3) => experts.insert(key.path),
            _ => linear.insert(key.path),
        };
    }
    let is_linear = |path: &String| !experts.contains(path);
    let targets = TargetConfig::list(linear.into_iter().filter(is_linear));
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
    let is_read = !options
        .ignored_keys
        .iter()
        .any(|key| key == "lora_parameters.alpha");
    if let Some(alpha) = alpha.filter(|&alpha| alpha != rank as f64 && is_read) {
        let reason = "the first versions of mlx-lm multiply the scale by alpha/rank, later ones do not; \
                      with \"lora_parameters.alpha\" among `ReadOptions::ignored_keys` the scale is taken as it is";
        return Err(unsupported("lora_parameters.alpha", &alpha.into(), reason));
    }
    let mut config = AdapterConfig::new(rank, scale * rank as f64, targets)
        .with_lora_dropout(dropout)
        .with_use_dora(fine_tune_type == "dora");
    config.target_parameters = experts
        .iter()
        .map(|path| format!("{path}.weight"))
        .collect();
    config.of_mlx = true;
    config.validate()?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> Result<AdapterConfig> {
        let tensors = [("a.q.lora_a", &[4, 8][..]), ("a.q.lora_b", &[8, 4])];
        parse(
            json.as_bytes(),
            tensors.into_iter(),
            &ReadOptions::default(),
        )
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
