//! A compiled target configuration: matched or not, rank and alpha, for one module path.

use super::budget::Budget;
use super::config::{ModuleNames, TargetConfig, TargetModules};
use super::keys::Keys;
use super::layer_filter::{LayerFilter, check_layers};
use super::name_list::NameList;
use super::pattern::Pattern;
use super::pattern_map::PatternMap;
use crate::{PeftError, Result};

/// A compiled [`TargetConfig`], which answers for one module path at a time.
#[derive(Clone, Debug)]
pub struct TargetMatcher {
    pub(super) target: Target,
    pub(super) exclude: Option<Names>,
    pub(super) rank_pattern: Keys<usize>,
    pub(super) alpha_pattern: Keys<f64>,
    pub(super) allow_unmatched: bool,
}

#[derive(Clone, Debug)]
pub(super) enum Target {
    List {
        names: NameList,
        layers: Option<LayerFilter>,
    },
    Regex(Pattern),
    AllLinear {
        head: Option<String>,
    },
}

#[derive(Clone, Debug)]
pub(super) enum Names {
    List(NameList),
    Regex(Pattern),
}

impl TargetMatcher {
    /// See [`TargetConfig::compile`].
    pub(super) fn new(config: &TargetConfig, head: Option<&str>) -> Result<Self> {
        check_layers(config)?;
        let mut budget = Budget::default();
        let target = match &config.target_modules {
            TargetModules::List(names) => Target::List {
                names: NameList::new(names),
                layers: LayerFilter::new(config, &mut budget)?,
            },
            TargetModules::Regex(text) => {
                Target::Regex(Pattern::full_match("target_modules", text)?)
            }
            TargetModules::AllLinear => Target::AllLinear {
                head: head.map(str::to_owned),
            },
        };
        let exclude = match &config.exclude_modules {
            None => None,
            Some(ModuleNames::List(names)) => Some(Names::List(NameList::new(names))),
            // Python's truth: an empty string excludes nothing.
            Some(ModuleNames::Regex(text)) if text.is_empty() => None,
            Some(ModuleNames::Regex(text)) => {
                Some(Names::Regex(Pattern::full_match("exclude_modules", text)?))
            }
        };
        let rank_pattern = compile_keys(
            "rank_pattern",
            &config.rank_pattern,
            &mut budget,
            |key, &rank| check_option(rank > 0, "rank_pattern", key, rank, "a rank of at least 1"),
        )?;
        let alpha_pattern = compile_keys(
            "alpha_pattern",
            &config.alpha_pattern,
            &mut budget,
            |key, &alpha| {
                check_option(
                    alpha.is_finite(),
                    "alpha_pattern",
                    key,
                    alpha,
                    "a finite alpha",
                )
            },
        )?;
        Ok(Self {
            target,
            exclude,
            rank_pattern,
            alpha_pattern,
            allow_unmatched: config.allow_unmatched,
        })
    }

    /// Whether the module at `path` gets an adapter. `"all-linear"` says yes to every path but the head's: ask it
    /// about linear modules only.
    ///
    /// # Errors
    ///
    /// [`PeftError::PatternMatch`] when a pattern with look-around backtracks beyond its limit on this path.
    pub fn matches(&self, path: &str) -> Result<bool> {
        Ok(!self.excludes(path)? && self.targets(path)?)
    }

    /// The rank of the first `rank_pattern` that matches `path`, or `default`. Says nothing of whether `path` is a
    /// target.
    ///
    /// # Errors
    ///
    /// As [`matches`](Self::matches).
    pub fn rank_for(&self, path: &str, default: usize) -> Result<usize> {
        Ok(self.rank_pattern.first(path)?.copied().unwrap_or(default))
    }

    /// The alpha of the first `alpha_pattern` that matches `path`, or `default`. Says nothing of whether `path` is a
    /// target.
    ///
    /// # Errors
    ///
    /// As [`matches`](Self::matches).
    pub fn alpha_for(&self, path: &str, default: f64) -> Result<f64> {
        Ok(self.alpha_pattern.first(path)?.copied().unwrap_or(default))
    }

    /// Whether `exclude_modules` names `path`.
    pub(super) fn excludes(&self, path: &str) -> Result<bool> {
        match &self.exclude {
            None => Ok(false),
            Some(Names::List(names)) => Ok(names.matches(path).next().is_some()),
            Some(Names::Regex(pattern)) => pattern.is_match(path),
        }
    }

    /// Whether `target_modules` and the layers choose `path`, exclusion aside.
    pub(super) fn targets(&self, path: &str) -> Result<bool> {
        match &self.target {
            Target::List { names, layers } => {
                if names.contains(path) {
                    return Ok(true);
                }
                if names.matches(path).next().is_none() {
                    return Ok(false);
                }
                layers
                    .as_ref()
                    .map_or(Ok(true), |layers| layers.keeps(path))
            }
            Target::Regex(pattern) => pattern.is_match(path),
            Target::AllLinear { head } => Ok(head.as_deref() != Some(path)),
        }
    }
}

fn check_option(
    holds: bool,
    option: &str,
    key: &str,
    value: impl std::fmt::Display,
    expected: &str,
) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(PeftError::config(
        format!("{option}[`{key}`]"),
        value,
        expected,
    ))
}

fn compile_keys<V: Clone>(
    option: &'static str,
    map: &PatternMap<V>,
    budget: &mut Budget,
    check: impl Fn(&str, &V) -> Result<()>,
) -> Result<Keys<V>> {
    let mut compiled = Vec::with_capacity(map.len());
    for (key, value) in map.iter() {
        check(key, value)?;
        let pattern = budget.spend(Pattern::suffix_key(option, key)?)?;
        compiled.push((pattern, value.clone()));
    }
    Ok(Keys::new(compiled))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(config: TargetConfig) -> String {
        config.compile(None).unwrap_err().to_string()
    }

    #[test]
    fn all_linear_leaves_out_the_head_and_what_is_excluded() {
        let matcher = TargetConfig::all_linear()
            .with_exclude_modules(["gate"])
            .compile(Some("lm_head"))
            .unwrap();
        assert!(matcher.matches("layers.0.q_proj").unwrap());
        assert!(matcher.matches("decoder.lm_head").unwrap());
        assert!(!matcher.matches("lm_head").unwrap());
        assert!(!matcher.matches("layers.0.gate").unwrap());
        // A list may name the head.
        let matcher = TargetConfig::list(["lm_head"])
            .compile(Some("lm_head"))
            .unwrap();
        assert!(matcher.matches("lm_head").unwrap());
    }

    #[test]
    fn what_peft_forbids_or_would_ignore_is_a_typed_error() {
        let layers = TargetConfig::regex(".*q").with_layers_to_transform([0]);
        assert!(error(layers).starts_with("layers_to_transform = [0]"));
        let pattern = TargetConfig::all_linear().with_layers_pattern(["h"]);
        assert!(error(pattern).starts_with("layers_pattern = [\"h\"]"));
        let pattern = TargetConfig::list(["q"]).with_layers_pattern(["h"]);
        assert!(error(pattern).starts_with("layers_pattern = [\"h\"]"));
        let rank = TargetConfig::list(["q"]).with_rank_pattern("q", 0);
        assert!(error(rank).starts_with("rank_pattern[`q`] = 0"));
        let alpha = TargetConfig::list(["q"]).with_alpha_pattern("q", f64::NAN);
        assert!(error(alpha).starts_with("alpha_pattern[`q`] = NaN"));
        assert!(error(TargetConfig::regex("(")).contains("target_modules"));
    }

    #[test]
    fn many_plain_keys_are_fine_and_many_expressions_are_refused() {
        let keys = |key: fn(usize) -> String, n| {
            let mut config = TargetConfig::list(["q"]);
            config.rank_pattern = (0..n).map(|i| (key(i), 4)).collect();
            config
        };
        let plain = keys(|i| format!("^layers.{i}.q"), 20_000)
            .compile(None)
            .unwrap();
        assert_eq!(plain.rank_for("layers.19999.q", 8).unwrap(), 4);
        assert_eq!(plain.rank_for("x.layers.1.q", 8).unwrap(), 8);
        let refused = keys(|i| format!("layers.{i}.(q|k)"), 257);
        assert!(error(refused).contains("at most 256"));
        // With look-around, sixteen of them are as many.
        let look_around = |n| keys(|i| format!("layers.{i}.(?!k)."), n);
        assert!(look_around(16).compile(None).is_ok());
        assert!(error(look_around(17)).contains("at most 256"));
    }
}
