//! `adapter_config.json` of LoRA, as PEFT 0.21 writes it.
//!
//! The file gives the rank `r` and `α` (`lora_alpha`), from which the scale of `ΔW = s·B·A` follows: `s = α/r`, or
//! `s = α/√r` with `use_rslora`; no tensor holds either. All 41 keys are known: some are honoured, some are inert here
//! and kept as they are, and those that change the mathematics in a way this crate does not compute are refused by
//! name.
//!
//! Every string of the file is data: none is opened, fetched, imported or run.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::disguise::not_json;
use super::fields::{self, Rule};
use super::json;
use super::read::{ReadOptions, read_bounded};
use super::version::{self, Version};
use crate::adapter::LoraInit;
use crate::model::{BiasMode, PatternMap, TargetConfig, TargetMatcher, TrainableTokens, is_named};
use crate::{PeftError, Result};

/// Name of the configuration file in an adapter's directory.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The version of PEFT whose format is written, and the `peft_version` of a new configuration.
pub const PEFT_VERSION: &str = "0.21.2";
/// Largest `adapter_config.json` read, in bytes; real ones have about 1 KiB, those with a rank and an alpha for each of 40,000
/// modules some 12 MB.
pub const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Largest rank of a configuration or a pattern.
pub const MAX_RANK: usize = 1 << 16;

/// Most names in `modules_to_save`, `target_parameters` and `trainable_token_indices`: every tensor of a file is compared with
/// each of them.
pub const MAX_NAMES: usize = 1024;

/// The task types PEFT knows; it refuses to load any other.
const TASK_TYPES: [&str; 6] = [
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
];

/// Whether PEFT takes this for a task type.
pub(super) fn is_task_type(text: &str) -> bool {
    TASK_TYPES.contains(&text)
}

/// Whether the module at this path is called as PEFT knows a model's input embedding.
pub(super) fn is_input_embedding(module: &str) -> bool {
    is_named(module, EMBEDDINGS[0])
}

/// Whether the module at this path is called as PEFT knows embeddings and heads.
pub(super) fn is_embedding(module: &str) -> bool {
    EMBEDDINGS.iter().any(|name| is_named(module, name))
}

/// A module's path without the `base_layer`s at its end, and how many there were.
pub(super) fn without_base_layers(path: &str) -> (&str, usize) {
    let (mut path, mut count) = (path, 0);
    while let Some(inner) = path.strip_suffix(".base_layer") {
        (path, count) = (inner, count + 1);
    }
    (path, count)
}

/// How PEFT calls the embeddings and heads whose base weights it saves beside an adapter that targets them.
const EMBEDDINGS: [&str; 2] = ["embed_tokens", "lm_head"];

/// How a trained adapter was initialised. It matters on loading only where it moved the base weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum InitLoraWeights {
    /// `true`: A kaiming-uniform with `a = √5`, B zero. `false`: both random.
    Flag(bool),
    /// A named initialisation, for instance `"gaussian"`.
    Named(String),
}

impl InitLoraWeights {
    /// Whether this initialisation leaves the base weights as they were.
    ///
    /// PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract the fresh adapter from the base; their adapters mean nothing on
    /// the untouched base until PEFT converts them on saving. Names not known here are taken for such.
    fn keeps_base(&self) -> bool {
        match self {
            Self::Flag(_) => true,
            Self::Named(name) => {
                matches!(
                    name.to_lowercase().as_str(),
                    "gaussian" | "eva" | "orthogonal" | "mica"
                )
            }
        }
    }

    /// The initialisation whose product the base of this adapter lacks, where it follows from the base alone; the random
    /// decomposition of `"pissa_niter_N"` does not. PEFT knows OLoRA in any case of letters, PiSSA in this one.
    pub(super) fn part_of_weight(&self) -> Option<LoraInit> {
        match self {
            _ if cfg!(not(feature = "faer")) => None,
            Self::Named(name) if name == "pissa" => Some(LoraInit::Pissa),
            Self::Named(name) if name.eq_ignore_ascii_case("olora") => Some(LoraInit::Olora),
            _ => None,
        }
    }
}

/// The configuration of a LoRA adapter in PEFT's fields.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AdapterConfig {
    /// The rank `r` of the factors where `targets.rank_pattern` says nothing else; 1 to [`MAX_RANK`].
    pub r: usize,
    /// `α`, where `targets.alpha_pattern` says nothing else; finite in f32. PEFT takes fractions too.
    pub lora_alpha: f64,
    /// Probability of dropping an element of the adapter's input in training; in `[0, 1)`.
    pub lora_dropout: f64,
    /// Whether the scale is `α/√r` in place of `α/r`.
    pub use_rslora: bool,
    /// Whether the adapter has a magnitude beside its factors: DoRA.
    pub use_dora: bool,
    /// Whether the factors `B` have a bias.
    pub lora_bias: bool,
    /// Which modules have the adapter, and their own ranks and alphas.
    pub targets: TargetConfig,
    /// The tensors of experts that have the adapter: their paths, or the ends of those.
    pub target_parameters: Vec<String>,
    /// The biases of the base of which the adapter has copies.
    pub bias: BiasMode,
    /// The modules of whose parameters the adapter has copies: paths or their last segments.
    pub modules_to_save: Vec<String>,
    /// The tokens of whose embeddings the adapter has rows of its own.
    pub trainable_token_indices: Option<TrainableTokens>,
    /// Whether what changes an embedding changes the head that is tied to it: the file has the head's tensors, too.
    pub ensure_weight_tying: bool,
    /// Whether modules that have the adapter hold their weights as `[d_in, d_out]`, as transformers' `Conv1D` of GPT-2 does. It is about the
    /// base and about copies of such modules; factors have the same layout either way.
    pub fan_in_fan_out: bool,
    /// How the factors were initialised.
    pub init_lora_weights: InitLoraWeights,
    /// What the model is for, one of PEFT's task types such as `"CAUSAL_LM"`.
    pub task_type: Option<String>,
    /// Name or path of the base model. Never opened.
    pub base_model_name_or_path: Option<String>,
    /// Revision of the base model. Never fetched.
    pub revision: Option<String>,
    /// What the file said; PEFT, like this crate, always writes `true`.
    pub inference_mode: bool,
    /// The version of PEFT that wrote the file.
    pub peft_version: Option<String>,
    /// Known keys without meaning for this crate, kept and written as they were read.
    pub(super) inert: BTreeMap<String, Value>,
    /// Keys of the file that this crate does not know and passed over.
    pub(super) ignored: Vec<String>,
    /// Those of them that say something, which are written as they were read.
    pub(super) unknown: BTreeMap<String, Value>,
    /// Whether the file lacks keys that every PEFT since 0.15 writes, and does not say its version.
    pub(super) may_be_old: bool,
    /// Whether it is mlx-lm's, whose embeddings have the keys of linear layers.
    pub(super) of_mlx: bool,
}

impl AdapterConfig {
    /// A plain LoRA of rank `r` and `α = lora_alpha`, everything else by PEFT's defaults.
    pub fn new(r: usize, lora_alpha: f64, targets: TargetConfig) -> Self {
        Self {
            r,
            lora_alpha,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            lora_bias: false,
            targets,
            target_parameters: Vec::new(),
            bias: BiasMode::None,
            modules_to_save: Vec::new(),
            trainable_token_indices: None,
            ensure_weight_tying: false,
            fan_in_fan_out: false,
            init_lora_weights: InitLoraWeights::Flag(true),
            task_type: None,
            base_model_name_or_path: None,
            revision: None,
            inference_mode: false,
            peft_version: Some(PEFT_VERSION.to_owned()),
            inert: BTreeMap::new(),
            ignored: Vec::new(),
            unknown: BTreeMap::new(),
            may_be_old: false,
            of_mlx: false,
        }
    }

    /// Sets the probability of dropping an element of the adapter's input in training.
    pub fn with_lora_dropout(mut self, probability: f64) -> Self {
        self.lora_dropout = probability;
        self
    }

    /// Scales by `α/√r` in place of `α/r`.
    pub fn with_use_rslora(mut self, use_rslora: bool) -> Self {
        self.use_rslora = use_rslora;
        self
    }

    /// Has a magnitude beside the factors: DoRA.
    pub fn with_use_dora(mut self, use_dora: bool) -> Self {
        self.use_dora = use_dora;
        self
    }

    /// Sets what the model is for.
    pub fn with_task_type(mut self, task_type: impl Into<String>) -> Self {
        self.task_type = Some(task_type.into());
        self
    }

    /// Sets the name of the base model, which Python's PEFT uses to find it.
    pub fn with_base_model(mut self, name_or_path: impl Into<String>) -> Self {
        self.base_model_name_or_path = Some(name_or_path.into());
        self
    }

    /// Whether the parameter at this path trains whole: of `modules_to_save`, by PEFT's rule that a name is the end of a path; or what
    /// `bias` means.
    pub(super) fn trains_whole(&self, path: &str) -> bool {
        self.is_saved(path) || self.is_trained_bias(path)
    }

    /// Whether `modules_to_save` means a module around this path.
    fn is_saved(&self, path: &str) -> bool {
        let mut around = path.match_indices('.').map(|(dot, _)| &path[..dot]);
        around.any(|module| {
            let mut names = self.modules_to_save.iter();
            names.any(|name| !name.is_empty() && module.ends_with(name.as_str()))
        })
    }

    /// Whether `bias` means the parameter at this path: of `"all"`, as in PEFT, whatever has `bias` in its name.
    pub(super) fn is_trained_bias(&self, path: &str) -> bool {
        match self.bias {
            BiasMode::None => false,
            BiasMode::All => path.contains("bias"),
            BiasMode::LoraOnly => path.rsplit('.').next() == Some("bias"),
        }
    }

    /// The version of PEFT that wrote the file, if it says so.
    pub(super) fn version(&self) -> Option<Version> {
        self.peft_version.as_deref().and_then(Version::parse)
    }

    /// The paths of the parameters that factors under this module path may be for, where `target_parameters` are named: without
    /// the `base_layer` that PEFT puts in between where a module has more than one.
    pub(super) fn experts_at<'a>(&'a self, path: &'a str) -> impl Iterator<Item = String> + 'a {
        let module = without_base_layers(path).0;
        self.target_parameters.iter().filter_map(move |target| {
            let (of, name) = target.rsplit_once('.').unwrap_or(("", target));
            let fits = of.is_empty() || is_named(module, of);
            fits.then(|| format!("{module}.{name}"))
        })
    }

    /// Names of the embeddings that have rows of their own, where they are named.
    pub(super) fn token_names(&self) -> impl Iterator<Item = &str> {
        let named = match &self.trainable_token_indices {
            Some(TrainableTokens::Named(named)) => Some(named.keys().map(String::as_str)),
            _ => None,
        };
        named.into_iter().flatten()
    }

    /// Keys of the file that were passed over: those that this crate does not know and that are null, false or empty, or that
    /// [`ReadOptions::allow_unknown_keys`] let pass, and those of [`ReadOptions::ignored_keys`].
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// Reads and checks `path`.
    ///
    /// # Errors
    ///
    /// [`PeftError::Io`] or [`PeftError::Malformed`] where there is no regular file of at most [`MAX_CONFIG_BYTES`]
    /// that holds a JSON object; otherwise those of [`from_json`](Self::from_json), in [`PeftError::InFile`].
    pub fn read(path: impl AsRef<Path>, options: &ReadOptions) -> Result<Self> {
        let path = path.as_ref();
        let bytes = read_bounded(path, MAX_CONFIG_BYTES)?;
        Self::from_json(&bytes, options).map_err(|error| not_json(path, &bytes, error))
    }

    /// Parses and checks the text of an `adapter_config.json`. Keys of [`ReadOptions::ignored_keys`] are read as if they were absent.
    ///
    /// # Errors
    ///
    /// [`PeftError::Json`] for what is no JSON object or has a key twice, [`PeftError::UnsupportedKey`] for a key that would change the
    /// mathematics or is unknown, and those of [`validate`](Self::validate).
    pub fn from_json(json: &[u8], options: &ReadOptions) -> Result<Self> {
        let mut object = json::object(json)?;
        let mut ignored = Vec::new();
        for key in &options.ignored_keys {
            if object.shift_remove(key).is_some() {
                ignored.push(key.clone());
            }
        }
        let shortened;
        let json = match ignored.is_empty() {
            true => json,
            false => {
                shortened = serde_json::to_vec(&object).map_err(PeftError::json)?;
                &shortened
            }
        };
        let assumed = options.assumed_peft_version.as_deref();
        if let Some(version) = assumed {
            version::check("assumed_peft_version", version)?;
        }
        let fields = Fields(&object);
        fields.refuse_other_methods()?;
        // A second pass over the text, because a `Value` may lose the order of a pattern's keys, which has meaning.
        let target_parameters: Vec<String> =
            fields.parse("target_parameters", "a list of names", Vec::new())?;
        let none = options
            .ignored_keys
            .iter()
            .any(|key| key == "target_modules");
        let targets = if fields.get("target_modules").is_some() {
            serde_json::from_slice(json).map_err(PeftError::json)?
        } else if !target_parameters.is_empty() || none {
            /// All of [`TargetConfig`] but `target_modules`, of which there are none.
            #[derive(Deserialize)]
            struct Patterns {
                #[serde(default)]
                rank_pattern: PatternMap<usize>,
                #[serde(default)]
                alpha_pattern: PatternMap<f64>,
            }
            let patterns: Patterns = serde_json::from_slice(json).map_err(PeftError::json)?;
            let mut targets = TargetConfig::list::<String>([]);
            targets.rank_pattern = patterns.rank_pattern;
            targets.alpha_pattern = patterns.alpha_pattern;
            targets
        } else {
            return Err(PeftError::config(
                "target_modules",
                "null",
                "a list of names or an expression; with \"target_modules\" among `ReadOptions::ignored_keys` the tensors alone say which modules",
            ));
        };
        let defaults = Self::new(8, 8.0, targets);
        let mut config = Self {
            r: fields.parse("r", "an integer", defaults.r)?,
            lora_alpha: fields.parse("lora_alpha", "a number", defaults.lora_alpha)?,
            lora_dropout: fields.parse("lora_dropout", "a number", defaults.lora_dropout)?,
            use_rslora: fields.parse("use_rslora", "a boolean", false)?,
            use_dora: fields.parse("use_dora", "a boolean", false)?,
            lora_bias: fields.parse("lora_bias", "a boolean", false)?,
            target_parameters,
            bias: fields.parse("bias", "\"none\", \"all\" or \"lora_only\"", BiasMode::None)?,
            modules_to_save: fields.parse("modules_to_save", "a list of names", Vec::new())?,
            trainable_token_indices: fields.parse(
                "trainable_token_indices",
                "a list of tokens, or such a list for each name",
                None,
            )?,
            ensure_weight_tying: fields.parse("ensure_weight_tying", "a boolean", false)?,
            fan_in_fan_out: fields.parse("fan_in_fan_out", "a boolean", false)?,
            init_lora_weights: fields.parse(
                "init_lora_weights",
                "a boolean or a name",
                defaults.init_lora_weights.clone(),
            )?,
            task_type: fields.parse("task_type", "a string or null", None)?,
            base_model_name_or_path: fields.parse(
                "base_model_name_or_path",
                "a string or null",
                None,
            )?,
            revision: fields.parse("revision", "a string or null", None)?,
            inference_mode: fields.parse("inference_mode", "a boolean", false)?,
            peft_version: fields.parse("peft_version", "a string or null", None)?,
            ignored,
            ..defaults
        };
        if config.peft_version.is_none() {
            // PEFT has written the key since 0.15, and its version since 0.18.
            config.may_be_old =
                assumed.is_none() && !object.contains_key("trainable_token_indices");
            config.peft_version = assumed.map(str::to_owned);
        }
        let init = &config.init_lora_weights;
        if !init.keeps_base() && init.part_of_weight().is_none() {
            let value = &object["init_lora_weights"];
            let reason = "it moves the base weights, and how cannot be told from here (of \"pissa\" and \"olora\" it \
                          can with the feature `faer`); PEFT saves it as plain LoRA when it is given \
                          `path_initial_model_for_weight_conversion`; onto a base that was moved already, load it with \
                          \"init_lora_weights\" among `ReadOptions::ignored_keys`";
            return Err(unsupported("init_lora_weights", value, reason));
        }
        for (key, value) in &object {
            match fields::rule(key) {
                Some(Rule::Honoured(..)) => {}
                Some(Rule::Inert(default)) => {
                    if *value != default.value() {
                        config.inert.insert(key.clone(), value.clone());
                    }
                }
                Some(Rule::Refused(default, reason)) => {
                    if !fields::is_empty(value) && *value != default.value() {
                        let reason = format!(
                            "{reason}; with the key among `ReadOptions::ignored_keys` the adapter is computed without it"
                        );
                        return Err(unsupported(key, value, &reason));
                    }
                }
                // PEFT drops this key on saving and ignores it on loading.
                None if key == "runtime_config" => config.ignored.push(key.clone()),
                None if fields::is_empty(value) => config.ignored.push(key.clone()),
                None if options.allow_unknown_keys || !options.strict => {
                    config.ignored.push(key.clone());
                    config.unknown.insert(key.clone(), value.clone());
                }
                None => {
                    let reason = "PEFT 0.21 does not have the key; `ReadOptions::allow_unknown_keys` passes over it, as PEFT does";
                    return Err(unsupported(key, value, reason));
                }
            }
        }
        config.ignored.sort();
        config.validate()?;
        Ok(config)
    }

    /// Checks every value against its range and returns the compiled targets.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] that names the value out of range, and those of [`TargetConfig::compile`].
    pub fn validate(&self) -> Result<TargetMatcher> {
        let ranks = &format!("an integer from 1 to {MAX_RANK}");
        let alphas = "a number that is finite in f32";
        let rank_is_valid = |r: usize| (1..=MAX_RANK).contains(&r);
        let alpha_is_valid = |alpha: f64| (alpha as f32).is_finite();
        if !rank_is_valid(self.r) {
            return Err(PeftError::config("r", self.r, ranks));
        }
        if !alpha_is_valid(self.lora_alpha) {
            return Err(PeftError::config("lora_alpha", self.lora_alpha, alphas));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(PeftError::config(
                "lora_dropout",
                self.lora_dropout,
                "a number in [0, 1)",
            ));
        }
        for (key, &r) in self.targets.rank_pattern.iter() {
            if !rank_is_valid(r) {
                return Err(PeftError::config(
                    "rank_pattern",
                    format!("{key:?}: {r}"),
                    ranks,
                ));
            }
        }
        for (key, &alpha) in self.targets.alpha_pattern.iter() {
            if !alpha_is_valid(alpha) {
                return Err(PeftError::config(
                    "alpha_pattern",
                    format!("{key:?}: {alpha}"),
                    alphas,
                ));
            }
        }
        let names = self.modules_to_save.len();
        let tokens = self.token_names().count();
        for (key, count) in [
            ("modules_to_save", names),
            ("trainable_token_indices", tokens),
            ("target_parameters", self.target_parameters.len()),
        ] {
            if count > MAX_NAMES {
                let value = format!("{count} names");
                return Err(PeftError::config(
                    key,
                    value,
                    format!("at most {MAX_NAMES}"),
                ));
            }
        }
        self.targets.compile(None)
    }

    /// The text of the file: all 41 keys in order, indented by 2, `inference_mode` true. The same configuration always
    /// gives the same bytes. Keys of the patterns keep their order, which has meaning.
    ///
    /// # Errors
    ///
    /// Those of [`validate`](Self::validate), and [`PeftError::Config`] for a `task_type` that PEFT would not load.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        self.validate()?;
        if let Some(task) = &self.task_type
            && !TASK_TYPES.contains(&task.as_str())
        {
            return Err(PeftError::config(
                "task_type",
                task,
                "one of PEFT's task types",
            ));
        }
        fields::to_json(self)
    }
}

/// The object of the file, read by key.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    /// The value of `key`, unless it is absent or null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn parse<T: for<'de> Deserialize<'de>>(
        &self,
        key: &str,
        expected: &str,
        default: T,
    ) -> Result<T> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => T::deserialize(value)
                .map_err(|_| PeftError::config(key, fields::shorten(value), expected)),
        }
    }

    fn refuse_other_methods(&self) -> Result<()> {
        match self.get("peft_type") {
            Some(Value::String(method)) if method == "LORA" => Ok(()),
            Some(other) => Err(unsupported("peft_type", other, "only \"LORA\" is read")),
            None => Err(PeftError::config("peft_type", "null", "\"LORA\"")),
        }
    }
}

fn unsupported(key: &str, value: &Value, reason: &str) -> PeftError {
    PeftError::UnsupportedKey {
        key: key.escape_debug().to_string(),
        value: fields::shorten(value),
        reason: reason.to_owned(),
    }
}

#[cfg(all(test, not(feature = "faer")))]
mod tests {
    use super::*;

    #[test]
    fn parts_of_the_weight_are_refused_by_name_without_faer() {
        for name in ["pissa", "olora", "OLoRA"] {
            let text = format!(
                r#"{{"peft_type": "LORA", "r": 2, "target_modules": ["q"], "init_lora_weights": "{name}"}}"#
            );
            let error = AdapterConfig::from_json(text.as_bytes(), &ReadOptions::default());
            assert!(
                matches!(&error, Err(PeftError::UnsupportedKey { key, .. }) if key == "init_lora_weights"),
                "{error:?}"
            );
        }
    }
}
