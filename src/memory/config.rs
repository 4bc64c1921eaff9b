//! A model's shape from Hugging Face's `config.json`.
//!
//! The file is data from anywhere: its size and the number of its values are bounded, a key that stands twice is refused,
//! numbers must be whole and within [`MAX_DIMENSION`](super::MAX_DIMENSION), and a type of model whose layers are not
//! those of [`ModelShape`] is refused by name rather than counted wrongly.

use std::path::Path;

use serde_json::{Map, Value};

use super::shape::ModelShape;
use crate::format::{json_object, not_json, read_bounded};
use crate::{PeftError, Result};

/// Largest `config.json` that is read; those of published models have a few kilobytes.
pub const MAX_MODEL_CONFIG_BYTES: u64 = 1 << 20;

/// Longest value of a file that an error repeats.
const SHOWN: usize = 40;

impl ModelShape {
    /// Reads a Hugging Face `config.json`, given by its own path or that of its directory.
    ///
    /// Types of models: `llama`, `mistral` and `qwen2`.
    ///
    /// # Errors
    ///
    /// [`PeftError::Io`] and [`PeftError::Malformed`] when the file cannot be read or is larger than
    /// [`MAX_MODEL_CONFIG_BYTES`]; otherwise as [`from_json`](Self::from_json), with the path.
    pub fn from_config(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = match path.is_dir() {
            true => path.join("config.json"),
            false => path.to_owned(),
        };
        let json = read_bounded(&file, MAX_MODEL_CONFIG_BYTES)?;
        Self::from_json(&json).map_err(|error| not_json(&file, &json, error))
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    ///
    /// [`PeftError::Json`] for what is no JSON object; [`PeftError::Config`] for a field that is missing, no whole number or
    /// out of its range; [`PeftError::UnsupportedKey`] for another type of model.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let fields = Fields(json_object(json)?);
        let kind = fields.0.get("model_type").and_then(Value::as_str);
        // Qwen2's code has the biases of q, k and v; the others ask the file.
        let qwen = match kind {
            Some("llama" | "mistral") => false,
            Some("qwen2") => true,
            _ => {
                return Err(PeftError::UnsupportedKey {
                    key: "model_type".to_owned(),
                    value: shown(fields.0.get("model_type")),
                    reason: "shapes are known of llama, mistral and qwen2".to_owned(),
                });
            }
        };
        let (hidden, heads) = (
            fields.number("hidden_size")?,
            fields.number("num_attention_heads")?,
        );
        let head_dim = match fields.optional_number("head_dim")? {
            Some(head_dim) => head_dim,
            None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(PeftError::config(
                    "hidden_size",
                    hidden,
                    format!("a multiple of num_attention_heads = {heads}, or a head_dim"),
                ));
            }
        };
        let attention_bias = fields.flag("attention_bias")?;
        let shape = Self {
            vocab: fields.number("vocab_size")?,
            hidden,
            intermediate: fields.number("intermediate_size")?,
            layers: fields.number("num_hidden_layers")?,
            heads,
            kv_heads: fields
                .optional_number("num_key_value_heads")?
                .unwrap_or(heads),
            head_dim,
            tied: fields.flag("tie_word_embeddings")?,
            qkv_bias: qwen || attention_bias,
            output_bias: !qwen && attention_bias,
            mlp_bias: fields.flag("mlp_bias")?,
        };
        shape.check()?;
        Ok(shape)
    }
}

struct Fields(Map<String, Value>);

impl Fields {
    /// A field that is there and not null.
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn wrong(&self, name: &str, expected: &str) -> PeftError {
        PeftError::config(name, shown(self.0.get(name)), expected)
    }

    fn optional_number(&self, name: &str) -> Result<Option<u64>> {
        let number = self.get(name).map(|value| {
            let number = value.as_u64();
            number.ok_or_else(|| self.wrong(name, "a whole number"))
        });
        number.transpose()
    }

    fn number(&self, name: &str) -> Result<u64> {
        self.optional_number(name)?
            .ok_or_else(|| self.wrong(name, "a whole number"))
    }

    fn flag(&self, name: &str) -> Result<bool> {
        match self.get(name) {
            None => Ok(false),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.wrong(name, "true or false")),
        }
    }
}

/// A value of a file as JSON, shortened.
fn shown(value: Option<&Value>) -> String {
    let Some(value) = value else {
        return "nothing".to_owned();
    };
    let json = value.to_string();
    match json.char_indices().nth(SHOWN) {
        None => json,
        Some((end, _)) => format!("{}...", &json[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
        "torch_dtype": "bfloat16", "rope_scaling": null, "eos_token_id": [128001, 128009]}"#;

    fn parse(json: &str) -> Result<ModelShape> {
        ModelShape::from_json(json.as_bytes())
    }

    #[test]
    fn a_published_config_gives_its_shape() {
        assert_eq!(parse(LLAMA).unwrap(), ModelShape::llama3_8b());
        let smol = r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": true}"#;
        assert_eq!(parse(smol).unwrap(), ModelShape::smollm2_135m());
    }

    #[test]
    fn qwen2_has_biases_and_a_file_may_name_the_head_width() {
        let qwen = LLAMA.replace("\"llama\"", "\"qwen2\"");
        let shape = parse(&qwen).unwrap();
        assert!(shape.qkv_bias && !shape.output_bias && !shape.mlp_bias);
        let wide = LLAMA.replace(
            "\"rope_scaling\": null",
            "\"head_dim\": 256, \"attention_bias\": true",
        );
        let shape = parse(&wide).unwrap();
        assert_eq!(shape.head_dim, 256);
        assert!(shape.qkv_bias && shape.output_bias);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, names) in [
            ("\"llama\"", "\"gpt2\"", "`model_type` = \"gpt2\""),
            (
                "4096",
                "-4096",
                "hidden_size = -4096: expected a whole number",
            ),
            ("4096", "4096.5", "hidden_size = 4096.5"),
            ("4096", "1e30", "hidden_size = 1e"),
            ("4096", "\"4096\"", "hidden_size = \"4096\""),
            (
                "4096",
                "18446744073709551615",
                "hidden_size = 18446744073709551615",
            ),
            ("\"hidden_size\": 4096,", "", "hidden_size = nothing"),
            (
                "\"num_attention_heads\": 32",
                "\"num_attention_heads\": 0",
                "num_attention_heads = 0",
            ),
            (
                "\"num_attention_heads\": 32",
                "\"num_attention_heads\": 33",
                "hidden_size = 4096",
            ),
            (
                "\"num_key_value_heads\": 8",
                "\"num_key_value_heads\": 7",
                "num_key_value_heads = 7",
            ),
            (
                "\"vocab_size\": 128256",
                "\"vocab_size\": 16777217",
                "vocab_size = 16777217: expected 1 to 16777216",
            ),
            (
                "\"vocab_size\": 128256",
                "\"vocab_size\": 1, \"vocab_size\": 2",
                "`vocab_size` stands twice",
            ),
            (
                "\"rope_scaling\": null",
                "\"tie_word_embeddings\": 1",
                "tie_word_embeddings = 1",
            ),
        ] {
            let json = LLAMA.replacen(from, to, 1);
            assert_ne!(json, LLAMA, "{from}");
            let error = match parse(&json) {
                Err(error) => error.to_string(),
                Ok(shape) => panic!("{to}: {shape:?}"),
            };
            assert!(error.contains(names), "{error}");
        }
    }

    #[test]
    fn a_file_is_bounded_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, LLAMA).unwrap();
        for given in [dir.path(), &path] {
            assert_eq!(
                ModelShape::from_config(given).unwrap(),
                ModelShape::llama3_8b()
            );
        }
        std::fs::write(&path, "[]").unwrap();
        let error = ModelShape::from_config(&path).unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
        std::fs::write(&path, vec![b' '; MAX_MODEL_CONFIG_BYTES as usize + 1]).unwrap();
        let error = ModelShape::from_config(&path).unwrap_err();
        assert!(matches!(error, PeftError::Malformed { .. }), "{error}");
        assert!(ModelShape::from_config(dir.path().join("none")).is_err());
    }

    #[test]
    fn control_characters_of_a_file_do_not_reach_a_terminal() {
        let json = LLAMA.replace("\"llama\"", "\"\\u001b[2J\"");
        let error = parse(&json).unwrap_err().to_string();
        assert!(!error.contains('\u{1b}'), "{error:?}");
    }
}
