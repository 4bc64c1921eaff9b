//! The 41 keys of PEFT 0.21's `LoraConfig`: what each means to this crate, and how they are written.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Number, Value};

use super::config::AdapterConfig;
use crate::model::PatternMap;
use crate::{PeftError, Result};

/// The value that PEFT gives a key when nothing is said.
#[derive(Clone, Copy, Debug)]
pub(super) enum DefaultValue {
    Null,
    False,
    Integer(u64),
    Text(&'static str),
    Object,
}

impl DefaultValue {
    pub(super) fn value(self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::False => Value::Bool(false),
            Self::Integer(value) => value.into(),
            Self::Text(value) => value.into(),
            Self::Object => Value::Object(Map::new()),
        }
    }
}

/// A value to be written. The patterns are apart because a `Value` may sort its keys.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Field<'a> {
    Json(Value),
    Ranks(&'a PatternMap<usize>),
    Alphas(PatternMap<Number>),
}

/// What a key means to this crate.
#[derive(Clone, Copy)]
pub(super) enum Rule {
    /// A field of [`AdapterConfig`]: what it says, and how it is written.
    Honoured(
        // For the published table, which a test writes.
        #[allow(dead_code)] &'static str,
        for<'a> fn(&'a AdapterConfig) -> Result<Field<'a>>,
    ),
    /// Without meaning here: kept and written as it was read.
    Inert(DefaultValue),
    /// Changes the mathematics, or the set of tensors, in a way that is not supported; only its default is read.
    Refused(DefaultValue, &'static str),
}

use DefaultValue::{False, Integer, Null, Object, Text};
use Rule::{Honoured, Inert, Refused};

/// All keys that PEFT 0.21 writes for LoRA, in the order of the file.
pub(super) const KEYS: [(&str, Rule); 41] = [
    (
        "alora_invocation_tokens",
        Refused(Null, "aLoRA acts on some tokens only"),
    ),
    (
        "alpha_pattern",
        Honoured(
            "`α` of the modules that a pattern matches; the first match in the file's order wins",
            |c| {
                let alphas = c.targets.alpha_pattern.iter();
                let alphas = alphas.map(|(key, &alpha)| Ok((key, number("alpha_pattern", alpha)?)));
                Ok(Field::Alphas(alphas.collect::<Result<_>>()?))
            },
        ),
    ),
    (
        "arrow_config",
        Refused(Null, "Arrow routes between adapters"),
    ),
    ("auto_mapping", Inert(Null)),
    (
        "base_model_name_or_path",
        Honoured("kept as text, never opened or fetched", |c| {
            json(&c.base_model_name_or_path)
        }),
    ),
    (
        "bias",
        Honoured(
            "`\"all\"` or `\"lora_only\"`: the adapter has copies of the base's biases, and the base keeps its own",
            |c| json(c.bias),
        ),
    ),
    ("corda_config", Inert(Null)),
    (
        "ensure_weight_tying",
        Honoured(
            "what changes an embedding changes the head tied to it; the head's tensors must be the embedding's",
            |c| json(c.ensure_weight_tying),
        ),
    ),
    ("eva_config", Inert(Null)),
    (
        "exclude_modules",
        Honoured("modules left out, names or an expression", |c| {
            json(&c.targets.exclude_modules)
        }),
    ),
    (
        "fan_in_fan_out",
        Honoured(
            "copies and base values of `Conv1D` modules are `[d_in, d_out]` in the file; factors are the same either way",
            |c| json(c.fan_in_fan_out),
        ),
    ),
    (
        "inference_mode",
        Honoured("read; always written as `true`, as PEFT does", |_| {
            json(true)
        }),
    ),
    (
        "init_lora_weights",
        Honoured(
            "`true`, `false`, `\"gaussian\"`, and `\"orthogonal\"`, `\"eva\"`, `\"mica\"`, which matter before training only; with the feature `faer` also `\"pissa\"` and `\"olora\"`, on dense weights, whose part of the weight is found again; other names that move the base weights (`\"pissa_niter_16\"`, `\"loftq\"`, `\"corda\"`, `\"lora_ga\"`, ...) and unknown ones are refused",
            |c| json(&c.init_lora_weights),
        ),
    ),
    (
        "kasa_config",
        Refused(Null, "KaSA adds a diagonal between the factors"),
    ),
    (
        "layer_replication",
        Refused(Null, "it repeats layers of the base model"),
    ),
    (
        "layers_pattern",
        Honoured(
            "name of the list of layers that `layers_to_transform` counts in",
            |c| json(&c.targets.layers_pattern),
        ),
    ),
    (
        "layers_to_transform",
        Honoured("indices of the layers that are adapted", |c| {
            json(&c.targets.layers_to_transform)
        }),
    ),
    ("loftq_config", Inert(Object)),
    (
        "lora_alpha",
        Honoured("`α`; fractions too", |c| {
            json(number("lora_alpha", c.lora_alpha)?)
        }),
    ),
    (
        "lora_bias",
        Honoured("the factors B have a bias", |c| json(c.lora_bias)),
    ),
    (
        "lora_dropout",
        Honoured("probability of dropout on the adapter's input", |c| {
            json(c.lora_dropout)
        }),
    ),
    ("lora_ga_config", Inert(Null)),
    ("megatron_config", Inert(Null)),
    ("megatron_core", Inert(Text("megatron.core"))),
    (
        "modules_to_save",
        Honoured(
            "the adapter has copies of these modules' parameters, and the base keeps its own",
            |c| json(Some(&c.modules_to_save).filter(|names| !names.is_empty())),
        ),
    ),
    (
        "monteclora_config",
        Refused(Null, "MonteCLoRA samples the factors"),
    ),
    (
        "peft_type",
        Honoured("`\"LORA\"`; every other method is refused", |_| {
            json("LORA")
        }),
    ),
    (
        "peft_version",
        Honoured("kept as text", |c| json(&c.peft_version)),
    ),
    ("qalora_group_size", Inert(Integer(16))),
    ("r", Honoured("rank, 1 to 65536", |c| json(c.r))),
    (
        "rank_pattern",
        Honoured(
            "rank of the modules that a pattern matches; the first match in the file's order wins",
            |c| Ok(Field::Ranks(&c.targets.rank_pattern)),
        ),
    ),
    (
        "revision",
        Honoured("kept as text, never fetched", |c| json(&c.revision)),
    ),
    (
        "target_modules",
        Honoured(
            "modules to adapt: names by suffix, an expression over whole paths, or `\"all-linear\"`",
            |c| json(&c.targets.target_modules),
        ),
    ),
    (
        "target_parameters",
        Honoured(
            "tensors of experts that get factors for each, named by their paths or the ends of those",
            |c| json(Some(&c.target_parameters).filter(|names| !names.is_empty())),
        ),
    ),
    (
        "task_type",
        Honoured("one of PEFT's task types", |c| json(&c.task_type)),
    ),
    (
        "trainable_token_indices",
        Honoured(
            "the adapter has rows of its own for these tokens, in this order",
            |c| json(&c.trainable_token_indices),
        ),
    ),
    (
        "use_bdlora",
        Refused(Null, "BD-LoRA makes a factor block-diagonal"),
    ),
    (
        "use_dora",
        Honoured("a magnitude for every module", |c| json(c.use_dora)),
    ),
    (
        "use_qalora",
        Refused(False, "QALoRA pools the adapter's input"),
    ),
    (
        "use_rslora",
        Honoured("scale by `α/√r`", |c| json(c.use_rslora)),
    ),
    (
        "velora_config",
        Refused(Null, "VeLoRA changes the backward pass"),
    ),
];

/// What `key` means, or `None` for a key PEFT 0.21 does not have.
pub(super) fn rule(key: &str) -> Option<Rule> {
    let place = KEYS.binary_search_by_key(&key, |(known, _)| known).ok()?;
    Some(KEYS[place].1)
}

/// Whether a value says nothing: null, false, or an empty string, list or object.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        _ => false,
    }
}

/// The value as JSON, cut to a length fit for an error message.
pub(super) fn shorten(value: &Value) -> String {
    const MOST: usize = 120;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        None => text,
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

/// All keys with their values, as Python's `json.dumps(.., indent=2, sort_keys=True)` lays them out.
pub(super) fn to_json(config: &AdapterConfig) -> Result<Vec<u8>> {
    let mut fields: BTreeMap<&str, Field> = BTreeMap::new();
    for (key, value) in &config.unknown {
        let mut value = value.clone();
        value.sort_all_objects();
        fields.insert(key, Field::Json(value));
    }
    for (key, rule) in KEYS {
        let value = match rule {
            Honoured(_, write) => write(config)?,
            Refused(default, _) => Field::Json(default.value()),
            Inert(default) => {
                let mut value = config
                    .inert
                    .get(key)
                    .cloned()
                    .unwrap_or_else(|| default.value());
                value.sort_all_objects();
                Field::Json(value)
            }
        };
        fields.insert(key, value);
    }
    serde_json::to_vec_pretty(&fields).map_err(PeftError::json)
}

fn json(value: impl Serialize) -> Result<Field<'static>> {
    serde_json::to_value(value)
        .map(Field::Json)
        .map_err(PeftError::json)
}

/// An alpha as PEFT writes it: an integer where it is one.
fn number(name: &str, alpha: f64) -> Result<Number> {
    // Up to 2^53 every integer is exact in f64, so the cast is too.
    if alpha.fract() == 0.0 && alpha.abs() <= 9_007_199_254_740_992.0 {
        return Ok((alpha as i64).into());
    }
    Number::from_f64(alpha).ok_or_else(|| PeftError::config(name, alpha, "a finite number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_are_sorted_as_the_search_demands() {
        assert!(KEYS.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(KEYS.iter().all(|(key, _)| rule(key).is_some()));
        assert!(rule("enable_lora").is_none());
    }

    /// What the published table says, a row a key.
    fn table() -> String {
        let rows = KEYS.map(|(key, rule)| match rule {
            Honoured(what, _) => format!("| `{key}` | honoured | {what} |\n"),
            Inert(_) => format!("| `{key}` | inert | kept and written as it was read |\n"),
            Refused(default, reason) => {
                let default = default.value();
                format!("| `{key}` | refused | unless empty or `{default}`: {reason} |\n")
            }
        });
        format!("| Key | | |\n|---|---|---|\n{}", rows.concat())
    }

    #[test]
    fn the_published_table_is_this_one() {
        const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/peft-config.md");
        let text = std::fs::read_to_string(FILE).unwrap();
        let (before, rest) = text.split_once("<!-- keys -->\n").unwrap();
        let (_, after) = rest.split_once("<!-- end of keys -->").unwrap();
        let current = format!(
            "{before}<!-- keys -->\n{}<!-- end of keys -->{after}",
            table()
        );
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(FILE, current).unwrap();
        } else {
            assert_eq!(text, current, "UPDATE_DOCS=1 writes it anew");
        }
    }

    #[test]
    fn alphas_are_written_as_integers_where_they_are() {
        for (alpha, text) in [(16.0, "16"), (0.5, "0.5"), (-3.0, "-3"), (0.05, "0.05")] {
            assert_eq!(number("a", alpha).unwrap().to_string(), text);
        }
        assert!(number("a", f64::NAN).is_err());
    }

    #[test]
    fn a_long_value_is_cut_between_characters() {
        let text = shorten(&Value::String("é".repeat(1000)));
        assert_eq!(text.chars().count(), 121);
    }
}
