//! The configuration of the targets, in PEFT's fields and PEFT's JSON.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::matcher::TargetMatcher;
use super::pattern_map::PatternMap;
use crate::Result;

/// PEFT's word for every linear module but the output head; upper and lower case are the same.
pub(super) const ALL_LINEAR: &str = "all-linear";

/// The modules that get an adapter. In JSON as PEFT writes it: a list of names, or a string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    /// Module names: whole paths or their last segments.
    List(Vec<String>),
    /// A regular expression in Python's syntax that must match the whole path.
    Regex(String),
    /// Every linear module but the output head.
    AllLinear,
}

impl Serialize for TargetModules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::List(names) => names.serialize(serializer),
            Self::Regex(pattern) => pattern.serialize(serializer),
            Self::AllLinear => ALL_LINEAR.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match ModuleNames::deserialize(deserializer)? {
            ModuleNames::List(names) => Self::List(names),
            ModuleNames::Regex(text) if text.to_lowercase() == ALL_LINEAR => Self::AllLinear,
            ModuleNames::Regex(text) => Self::Regex(text),
        })
    }
}

/// Modules named by a list or by a regular expression. In JSON as PEFT writes it: a list of names, or a string.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ModuleNames {
    /// Module names: whole paths or their last segments.
    List(Vec<String>),
    /// A regular expression in Python's syntax that must match the whole path.
    Regex(String),
}

/// Which modules get an adapter; the fields, their JSON and their meaning are those of PEFT's `LoraConfig`.
///
/// ```
/// # fn main() -> burn_peft::Result<()> {
/// use burn_peft::model::TargetConfig;
///
/// let targets = TargetConfig::list(["q_proj", "v_proj"])
///     .with_layers_to_transform([0, 1])
///     .with_rank_pattern("layers.0.self_attn.q_proj", 32);
/// let matcher = targets.compile(None)?;
/// assert!(matcher.matches("model.layers.1.self_attn.v_proj")?);
/// assert!(!matcher.matches("model.layers.2.self_attn.v_proj")?);
/// assert_eq!(matcher.rank_for("model.layers.0.self_attn.q_proj", 8)?, 32);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetConfig {
    /// The modules that get an adapter.
    pub target_modules: TargetModules,
    /// Modules that get none although `target_modules` names them.
    #[serde(default)]
    pub exclude_modules: Option<ModuleNames>,
    /// The layers whose modules get an adapter; `None` or empty: all. Only beside a list of `target_modules`.
    #[serde(default, deserialize_with = "one_or_many")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// What stands before a layer's index, each an expression; `None` or empty: any name. Only beside
    /// `layers_to_transform`.
    #[serde(default, deserialize_with = "one_or_many")]
    pub layers_pattern: Option<Vec<String>>,
    /// Ranks that differ from the default.
    #[serde(default)]
    pub rank_pattern: PatternMap<usize>,
    /// Alphas that differ from the default.
    #[serde(default)]
    pub alpha_pattern: PatternMap<f64>,
    /// Whether a pattern that matches nothing is reported only, and no error. Not part of PEFT's JSON.
    #[serde(skip)]
    pub allow_unmatched: bool,
}

impl TargetConfig {
    /// Targets `target_modules`, all layers, with the default rank and alpha.
    pub fn new(target_modules: TargetModules) -> Self {
        Self {
            target_modules,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: PatternMap::new(),
            alpha_pattern: PatternMap::new(),
            allow_unmatched: false,
        }
    }

    /// Targets the modules of these names: whole paths or their last segments.
    pub fn list<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self::new(TargetModules::List(strings(names)))
    }

    /// Targets the modules whose whole path `pattern` matches.
    pub fn regex(pattern: impl Into<String>) -> Self {
        Self::new(TargetModules::Regex(pattern.into()))
    }

    /// Targets every linear module but the output head.
    pub fn all_linear() -> Self {
        Self::new(TargetModules::AllLinear)
    }

    /// Excludes the modules of these names: whole paths or their last segments.
    pub fn with_exclude_modules<S: Into<String>>(
        mut self,
        names: impl IntoIterator<Item = S>,
    ) -> Self {
        self.exclude_modules = Some(ModuleNames::List(strings(names)));
        self
    }

    /// Excludes the modules whose whole path `pattern` matches.
    pub fn with_exclude_regex(mut self, pattern: impl Into<String>) -> Self {
        self.exclude_modules = Some(ModuleNames::Regex(pattern.into()));
        self
    }

    /// Restricts a list of targets to these layers.
    pub fn with_layers_to_transform(mut self, layers: impl IntoIterator<Item = usize>) -> Self {
        self.layers_to_transform = Some(layers.into_iter().collect());
        self
    }

    /// Says what stands before a layer's index in a path.
    pub fn with_layers_pattern<S: Into<String>>(
        mut self,
        patterns: impl IntoIterator<Item = S>,
    ) -> Self {
        self.layers_pattern = Some(strings(patterns));
        self
    }

    /// Gives the modules that `key` matches another rank; earlier keys win.
    pub fn with_rank_pattern(mut self, key: impl Into<String>, rank: usize) -> Self {
        self.rank_pattern.insert(key, rank);
        self
    }

    /// Gives the modules that `key` matches another alpha; earlier keys win.
    pub fn with_alpha_pattern(mut self, key: impl Into<String>, alpha: f64) -> Self {
        self.alpha_pattern.insert(key, alpha);
        self
    }

    /// Lets [`TargetMatcher::resolve`] report patterns that match nothing instead of failing.
    pub fn with_allow_unmatched(mut self, allow: bool) -> Self {
        self.allow_unmatched = allow;
        self
    }

    /// Compiles the patterns. `head` is the path of the model's output head, which `"all-linear"` leaves out; a list
    /// or an expression may name it.
    ///
    /// # Errors
    ///
    /// [`PeftError::Pattern`](crate::PeftError::Pattern) for an expression that does not compile or takes too much
    /// memory; [`PeftError::Config`](crate::PeftError::Config) for layers beside an expression, a `layers_pattern`
    /// without layers, a rank of zero, an alpha that is not finite, or more than 256 expressions (one with look-around
    /// counts as 16, a plain name as none).
    pub fn compile(&self, head: Option<&str>) -> Result<TargetMatcher> {
        TargetMatcher::new(self, head)
    }
}

fn strings<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Vec<String> {
    names.into_iter().map(Into::into).collect()
}

/// PEFT writes a single layer or pattern also without the list around it.
fn one_or_many<'de, D, T>(deserializer: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany<T> {
        Many(Vec<T>),
        One(T),
    }
    Ok(
        Option::<OneOrMany<T>>::deserialize(deserializer)?.map(|value| match value {
            OneOrMany::Many(values) => values,
            OneOrMany::One(value) => vec![value],
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> TargetConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn json_is_as_peft_writes_it() {
        let config = parse(
            r#"{"target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*head", "layers_to_transform": 3,
                "layers_pattern": "layers", "rank_pattern": {"b": 1, "a": 2}, "alpha_pattern": {}, "r": 8}"#,
        );
        let expected = TargetConfig::list(["q_proj", "v_proj"])
            .with_exclude_regex(".*head")
            .with_layers_to_transform([3])
            .with_layers_pattern(["layers"])
            .with_rank_pattern("b", 1)
            .with_rank_pattern("a", 2);
        assert_eq!(config, expected);
        assert_eq!(parse(&serde_json::to_string(&config).unwrap()), config);

        let config = parse(
            r#"{"target_modules": "ALL-linear", "exclude_modules": ["lm_head"],
            "layers_to_transform": null, "rank_pattern": null}"#,
        );
        assert_eq!(
            config,
            TargetConfig::all_linear().with_exclude_modules(["lm_head"])
        );
        assert!(
            serde_json::to_string(&config)
                .unwrap()
                .contains(r#""target_modules":"all-linear""#)
        );

        assert_eq!(
            parse(r#"{"target_modules": ".*q"}"#),
            TargetConfig::regex(".*q")
        );
    }

    #[test]
    fn json_of_another_kind_is_an_error() {
        for json in [
            r#"{}"#,
            r#"{"target_modules": 3}"#,
            r#"{"target_modules": [3]}"#,
            r#"{"target_modules": "q", "layers_to_transform": [-1]}"#,
            r#"{"target_modules": "q", "rank_pattern": {"q": 1.5}}"#,
            r#"{"target_modules": "q", "rank_pattern": ["q"]}"#,
        ] {
            assert!(
                serde_json::from_str::<TargetConfig>(json).is_err(),
                "{json}"
            );
        }
    }
}
