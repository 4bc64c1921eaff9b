//! The shape of a Llama, read from and written to Hugging Face's `config.json`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::{LlamaError, Result};

/// Everything that fixes the shape and the arithmetic of a Llama.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward block.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f64,
    /// The rotary embedding.
    pub rope: RopeConfig,
    /// Whether the head is the transposed embedding, so that the checkpoint has no `lm_head.weight`.
    pub tie_word_embeddings: bool,
    /// Whether the projections q, k, v and o have a bias.
    pub attention_bias: bool,
    /// Whether the projections gate, up and down have a bias.
    pub mlp_bias: bool,
    /// Longest sequence the model was made for. Not enforced: the rotary embedding has no table.
    pub max_position_embeddings: usize,
    /// The token before every text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a generated text.
    pub eos_token_ids: Vec<u32>,
}

/// The rotary embedding's base and how its frequencies were stretched for long texts.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base of the geometric sequence of wavelengths.
    pub theta: f32,
    /// Stretching of the wavelengths, if any.
    pub scaling: Option<Llama3Scaling>,
}

/// The stretching of Llama 3.1: long wavelengths by `factor`, short ones not at all, those between by a ramp.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Llama3Scaling {
    /// How much the long wavelengths are stretched.
    pub factor: f32,
    /// Wavelengths over `original_max_position_embeddings / low_freq_factor` are stretched in full.
    pub low_freq_factor: f32,
    /// Wavelengths under `original_max_position_embeddings / high_freq_factor` are left alone.
    pub high_freq_factor: f32,
    /// The context length before stretching.
    pub original_max_position_embeddings: usize,
}

impl LlamaConfig {
    /// A model of the given size with the usual settings: no biases, tied embeddings, `head_dim = hidden / heads`,
    /// theta 10 000, eps 1e-5, no special tokens. Set the public fields for anything else.
    ///
    /// # Panics
    ///
    /// If `heads` does not divide `hidden`.
    pub fn new(
        vocab: usize,
        hidden: usize,
        intermediate: usize,
        layers: usize,
        heads: usize,
        kv_heads: usize,
    ) -> Self {
        assert_eq!(
            hidden % heads,
            0,
            "{heads} heads do not divide a width of {hidden}"
        );
        Self {
            vocab_size: vocab,
            hidden_size: hidden,
            intermediate_size: intermediate,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: hidden / heads,
            rms_norm_eps: 1e-5,
            rope: RopeConfig {
                theta: 10_000.0,
                scaling: None,
            },
            tie_word_embeddings: true,
            attention_bias: false,
            mlp_bias: false,
            max_position_embeddings: 2048,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }

    /// Reads `dir/config.json`.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, is not JSON, lacks a field, or asks for something other than a Llama with SiLU
    /// and a rotary embedding of type `default` or `llama3`.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(LlamaError::io(&path))?;
        Self::from_json(&text, &path)
    }

    /// Parses the text of a `config.json`; `path` only names it in errors. Errors as [`from_dir`](Self::from_dir).
    pub fn from_json(text: &str, path: &Path) -> Result<Self> {
        let json: Json = serde_json::from_str(text).map_err(LlamaError::file(path))?;
        let unsupported = |field, value: String, expected: &str| LlamaError::Config {
            path: path.to_owned(),
            field,
            value,
            expected: expected.to_owned(),
        };
        if json.model_type != "llama" {
            return Err(unsupported("model_type", json.model_type, "\"llama\""));
        }
        if json.hidden_act != "silu" {
            return Err(unsupported("hidden_act", json.hidden_act, "\"silu\""));
        }
        let heads = json.num_attention_heads;
        let kv_heads = json.num_key_value_heads.unwrap_or(heads);
        for (field, value) in [
            ("vocab_size", json.vocab_size),
            ("hidden_size", json.hidden_size),
            ("intermediate_size", json.intermediate_size),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
        ] {
            if value == 0 {
                return Err(unsupported(field, "0".into(), "a positive number"));
            }
        }
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_attention_heads = {heads}");
            return Err(unsupported(
                "num_key_value_heads",
                kv_heads.to_string(),
                &expected,
            ));
        }
        let head_dim = match json.head_dim {
            Some(head_dim) => head_dim,
            None if json.hidden_size.is_multiple_of(heads) => json.hidden_size / heads,
            None => {
                let expected =
                    format!("a multiple of num_attention_heads = {heads}, or a head_dim");
                return Err(unsupported(
                    "hidden_size",
                    json.hidden_size.to_string(),
                    &expected,
                ));
            }
        };
        if head_dim == 0 || head_dim % 2 == 1 {
            return Err(unsupported(
                "head_dim",
                head_dim.to_string(),
                "a positive even number",
            ));
        }
        // transformers 5 writes `rope_parameters`; version 4 wrote `rope_theta` and `rope_scaling`, and earlier ones
        // called the type `type`.
        let rope = json
            .rope_parameters
            .or(json.rope_scaling)
            .unwrap_or_default();
        let scaling = match rope.rope_type.as_deref().unwrap_or("default") {
            "default" => None,
            "llama3" => Some(Llama3Scaling {
                factor: rope.factor.ok_or_else(|| missing(path, "factor"))?,
                low_freq_factor: rope
                    .low_freq_factor
                    .ok_or_else(|| missing(path, "low_freq_factor"))?,
                high_freq_factor: rope
                    .high_freq_factor
                    .ok_or_else(|| missing(path, "high_freq_factor"))?,
                original_max_position_embeddings: rope
                    .original_max_position_embeddings
                    .ok_or_else(|| missing(path, "original_max_position_embeddings"))?,
            }),
            other => {
                return Err(unsupported(
                    "rope_type",
                    other.into(),
                    "\"default\" or \"llama3\"",
                ));
            }
        };
        Ok(Self {
            vocab_size: json.vocab_size,
            hidden_size: json.hidden_size,
            intermediate_size: json.intermediate_size,
            num_hidden_layers: json.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rms_norm_eps: json.rms_norm_eps,
            rope: RopeConfig {
                theta: rope.rope_theta.or(json.rope_theta).unwrap_or(10_000.0),
                scaling,
            },
            tie_word_embeddings: json.tie_word_embeddings,
            attention_bias: json.attention_bias,
            mlp_bias: json.mlp_bias,
            max_position_embeddings: json.max_position_embeddings,
            bos_token_id: json.bos_token_id,
            eos_token_ids: match json.eos_token_id {
                None => Vec::new(),
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
            },
        })
    }

    /// The text of a `config.json` that [`from_json`](Self::from_json) and every version of transformers read.
    pub fn to_json(&self) -> String {
        let json = Json {
            architectures: vec!["LlamaForCausalLM".into()],
            model_type: "llama".into(),
            hidden_act: "silu".into(),
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: Some(self.num_key_value_heads),
            head_dim: Some(self.head_dim),
            rms_norm_eps: self.rms_norm_eps,
            rope_theta: Some(self.rope.theta),
            rope_scaling: self.rope.scaling.as_ref().map(|scaling| Rope {
                rope_type: Some("llama3".into()),
                rope_theta: None,
                factor: Some(scaling.factor),
                low_freq_factor: Some(scaling.low_freq_factor),
                high_freq_factor: Some(scaling.high_freq_factor),
                original_max_position_embeddings: Some(scaling.original_max_position_embeddings),
            }),
            rope_parameters: None,
            tie_word_embeddings: self.tie_word_embeddings,
            attention_bias: self.attention_bias,
            mlp_bias: self.mlp_bias,
            max_position_embeddings: self.max_position_embeddings,
            bos_token_id: self.bos_token_id,
            eos_token_id: match self.eos_token_ids.as_slice() {
                [] => None,
                [id] => Some(OneOrMany::One(*id)),
                ids => Some(OneOrMany::Many(ids.to_vec())),
            },
        };
        serde_json::to_string_pretty(&json).expect("plain numbers and strings are JSON")
    }
}

fn missing(path: &Path, field: &'static str) -> LlamaError {
    LlamaError::Config {
        path: path.to_owned(),
        field,
        value: "nothing".into(),
        expected: "a number, as rope_type is \"llama3\"".into(),
    }
}

/// The fields of `config.json` that matter here, with Hugging Face's names and defaults.
#[derive(Serialize, Deserialize)]
struct Json {
    #[serde(default)]
    architectures: Vec<String>,
    model_type: String,
    #[serde(default = "silu")]
    hidden_act: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rope_scaling: Option<Rope>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rope_parameters: Option<Rope>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Default, Serialize, Deserialize)]
struct Rope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rope_theta: Option<f32>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<usize>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

fn silu() -> String {
    "silu".into()
}

fn default_eps() -> f64 {
    1e-6
}

fn default_positions() -> usize {
    2048
}
