//! What a target configuration does to a whole model: which modules it matched, and which of its patterns matched none.

use std::collections::{BTreeSet, HashSet};

use super::config::ALL_LINEAR;
use super::keys::Keys;
use super::layer_filter::LayerFilter;
use super::matcher::{Names, Target, TargetMatcher};
use super::pattern::Pattern;
use super::unmatched::{UnmatchedPattern, Unused};
use crate::{PeftError, Result};

/// The modules of a model that a [`TargetMatcher`] chose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TargetReport {
    /// The modules that get an adapter, in the order of the candidates.
    pub matched: Vec<TargetMatch>,
    /// The candidates that `exclude_modules` took out of the choice, in order.
    pub excluded: Vec<String>,
    /// The candidates that no pattern chose, in order.
    pub unmatched: Vec<String>,
    /// The patterns that matched nothing; always empty unless `allow_unmatched` is set.
    pub unmatched_patterns: Vec<UnmatchedPattern>,
}

/// A module that gets an adapter, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetMatch {
    /// The module's path.
    pub path: String,
    /// What chose it: the longest matching name of a list, the expression, or `all-linear`.
    pub pattern: String,
    /// The `rank_pattern` key that gives its rank, if any.
    pub rank_key: Option<String>,
    /// The `alpha_pattern` key that gives its alpha, if any.
    pub alpha_key: Option<String>,
}

impl TargetMatcher {
    /// Applies the configuration to the modules of a model.
    ///
    /// `candidates` are the paths of all modules that could get an adapter; for `"all-linear"`, of its linear modules.
    ///
    /// # Errors
    ///
    /// Unless `allow_unmatched` is set: [`PeftError::UnmatchedPatterns`] names every list entry, expression, layer
    /// and key that has no effect, with the nearest names, and [`PeftError::NoTargets`] when nothing is left to
    /// adapt. A name counts as matched where exclusion alone keeps it from its modules; a key of `rank_pattern` or
    /// `alpha_pattern` must match a chosen module. In any case [`PeftError::PatternMatch`] when a pattern with
    /// look-around backtracks beyond its limit.
    pub fn resolve(&self, candidates: &[String]) -> Result<TargetReport> {
        let mut report = TargetReport::default();
        let mut used = Used::default();
        for path in candidates {
            let chosen_by = self.choose(path, &mut used)?;
            if self.excludes(path)? {
                used.exclude.extend(match &self.exclude {
                    Some(Names::List(names)) => names.matches(path).collect(),
                    _ => vec![0],
                });
                report.excluded.push(path.clone());
            } else if let Some(pattern) = chosen_by {
                report.matched.push(TargetMatch {
                    path: path.clone(),
                    pattern,
                    rank_key: used.rank.note(&self.rank_pattern, path)?,
                    alpha_key: used.alpha.note(&self.alpha_pattern, path)?,
                });
            } else {
                report.unmatched.push(path.clone());
            }
        }
        report.unmatched_patterns = self.unused(&used, &report, candidates);
        if self.allow_unmatched {
            return Ok(report);
        }
        if !report.unmatched_patterns.is_empty() {
            return Err(PeftError::UnmatchedPatterns {
                patterns: report.unmatched_patterns,
            });
        }
        if report.matched.is_empty() {
            return Err(PeftError::NoTargets {
                candidates: candidates.len(),
                excluded: report.excluded.len(),
            });
        }
        Ok(report)
    }

    /// What of `target_modules` chooses `path`, exclusion aside.
    fn choose(&self, path: &str, used: &mut Used) -> Result<Option<String>> {
        if let Target::List {
            names,
            layers: Some(layers),
        } = &self.target
            && !names.contains(path)
            && names.matches(path).next().is_some()
        {
            used.note_layer(layers, path)?;
        }
        if !self.targets(path)? {
            return Ok(None);
        }
        Ok(Some(match &self.target {
            Target::List { names, .. } => {
                used.target.extend(names.matches(path));
                names
                    .matches(path)
                    .next()
                    .map(|i| names.names[i].clone())
                    .unwrap_or_default()
            }
            Target::Regex(pattern) => {
                used.target.insert(0);
                pattern.text().to_owned()
            }
            Target::AllLinear { .. } => ALL_LINEAR.to_owned(),
        }))
    }

    /// The patterns without effect, with suggestions.
    fn unused(
        &self,
        used: &Used,
        report: &TargetReport,
        candidates: &[String],
    ) -> Vec<UnmatchedPattern> {
        let mut unused = Unused::default();
        let chosen = || report.matched.iter().map(|m| m.path.as_str());
        let all = || candidates.iter().map(String::as_str);
        match &self.target {
            Target::List { names, layers } => {
                unused.add("target_modules", &names.names, &used.target, all);
                if let Some(layers) = layers {
                    unused.add_layers(&layers.layers, &used.layers);
                    let patterns = layers.own_patterns().map(Pattern::text);
                    let segments = || all().flat_map(|path| path.split('.'));
                    unused.add("layers_pattern", patterns, &used.layer_patterns, segments);
                }
            }
            Target::Regex(pattern) => {
                unused.add("target_modules", [pattern.text()], &used.target, all)
            }
            Target::AllLinear { .. } => {}
        }
        match &self.exclude {
            Some(Names::List(names)) => {
                unused.add("exclude_modules", &names.names, &used.exclude, all)
            }
            Some(Names::Regex(p)) => unused.add("exclude_modules", [p.text()], &used.exclude, all),
            None => {}
        }
        unused.add(
            "rank_pattern",
            self.rank_pattern.texts(),
            &used.rank.0,
            chosen,
        );
        unused.add(
            "alpha_pattern",
            self.alpha_pattern.texts(),
            &used.alpha.0,
            chosen,
        );
        unused.patterns
    }
}

/// Positions of the patterns that matched something, by option.
#[derive(Default)]
struct Used {
    target: HashSet<usize>,
    exclude: HashSet<usize>,
    rank: UsedKeys,
    alpha: UsedKeys,
    layer_patterns: HashSet<usize>,
    /// The layers, not positions, of modules that a name of the list matched.
    layers: BTreeSet<usize>,
}

impl Used {
    fn note_layer(&mut self, layers: &LayerFilter, path: &str) -> Result<()> {
        self.layers.extend(layers.layer_of(path)?);
        for (i, pattern) in layers.own_patterns().enumerate() {
            if !self.layer_patterns.contains(&i) && pattern.index_group(path)?.is_some() {
                self.layer_patterns.insert(i);
            }
        }
        Ok(())
    }
}

/// Places of the keys that matched something.
#[derive(Default)]
struct UsedKeys(HashSet<usize>);

impl UsedKeys {
    /// The first key that matches `path`. Notes every key that does, also behind the first.
    fn note<V>(&mut self, keys: &Keys<V>, path: &str) -> Result<Option<String>> {
        let matching = keys.matches(path)?;
        self.0.extend(&matching);
        let first = matching.first();
        Ok(first.map(|&place| keys.text(place).to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::TargetConfig;

    fn candidates() -> Vec<String> {
        let mut paths = Vec::new();
        for layer in 0..3 {
            for name in ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"] {
                paths.push(format!("model.layers.{layer}.{name}"));
            }
        }
        paths.push("lm_head".into());
        paths
    }

    fn resolve(config: TargetConfig) -> Result<TargetReport> {
        config.compile(Some("lm_head"))?.resolve(&candidates())
    }

    /// Option, pattern and nearest name of everything that matched nothing.
    fn unmatched(config: TargetConfig) -> Vec<(&'static str, String, Option<String>)> {
        let lenient = resolve(config.clone().with_allow_unmatched(true)).unwrap();
        match resolve(config).unwrap_err() {
            PeftError::UnmatchedPatterns { patterns } => {
                assert_eq!(lenient.unmatched_patterns, patterns);
                let triple =
                    |p: UnmatchedPattern| (p.option, p.pattern, p.nearest.first().cloned());
                patterns.into_iter().map(triple).collect()
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn the_report_says_what_matched_and_why() {
        let report = resolve(
            TargetConfig::list(["q_proj", "self_attn.q_proj", "up_proj", "lm_head"])
                .with_exclude_modules(["model.layers.2.mlp.up_proj", "lm_head"])
                .with_rank_pattern("layers.1.self_attn.q_proj", 4)
                .with_rank_pattern("q_proj", 16)
                .with_alpha_pattern("up_proj", 2.0),
        )
        .unwrap();
        let row = |m: &TargetMatch| {
            let key = |key: &Option<String>| key.clone().unwrap_or_default();
            format!(
                "{} {} {}|{}",
                m.path,
                m.pattern,
                key(&m.rank_key),
                key(&m.alpha_key)
            )
        };
        assert_eq!(
            report.matched.iter().map(row).collect::<Vec<_>>(),
            [
                "model.layers.0.self_attn.q_proj self_attn.q_proj q_proj|",
                "model.layers.0.mlp.up_proj up_proj |up_proj",
                "model.layers.1.self_attn.q_proj self_attn.q_proj layers.1.self_attn.q_proj|",
                "model.layers.1.mlp.up_proj up_proj |up_proj",
                "model.layers.2.self_attn.q_proj self_attn.q_proj q_proj|",
            ]
        );
        assert_eq!(report.excluded, ["model.layers.2.mlp.up_proj", "lm_head"]);
        assert_eq!(report.unmatched.len(), 3);
        assert!(report.unmatched.iter().all(|path| path.ends_with("v_proj")));
        assert_eq!(report.unmatched_patterns, []);
    }

    #[test]
    fn every_pattern_without_effect_is_named_with_the_nearest_names() {
        let config = TargetConfig::list(["q_prj", "v_proj"])
            .with_exclude_modules(["lm_heat"])
            .with_layers_to_transform([1, 7])
            .with_layers_pattern(["layers", "layer"])
            .with_rank_pattern("vproj", 4)
            .with_alpha_pattern("layers.0.self_attn.v_proj", 4.0);
        let some = |name: &str| Some(name.to_owned());
        assert_eq!(
            unmatched(config),
            [
                ("target_modules", "q_prj".into(), some("q_proj")),
                ("layers_to_transform", "7".into(), some("2")),
                ("layers_pattern", "layer".into(), some("layers")),
                ("exclude_modules", "lm_heat".into(), some("lm_head")),
                ("rank_pattern", "vproj".into(), some("v_proj")),
                // The module exists, but layer 0 is not chosen.
                (
                    "alpha_pattern",
                    "layers.0.self_attn.v_proj".into(),
                    some("layers.1.self_attn.v_proj")
                ),
            ]
        );
        assert_eq!(
            unmatched(TargetConfig::regex(r".*\.self_atn\.q_proj").with_exclude_regex("nowhere")),
            [
                (
                    "target_modules",
                    r".*\.self_atn\.q_proj".into(),
                    some("self_attn")
                ),
                ("exclude_modules", "nowhere".into(), some("lm_head")),
            ]
        );
    }

    #[test]
    fn the_error_reads_as_a_sentence() {
        let error = resolve(TargetConfig::list(["q_prj"])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "target_modules `q_prj` matches nothing (nearest: `q_proj`, `v_proj`, `up_proj`)"
        );
    }

    #[test]
    fn a_repeated_or_shadowed_pattern_is_not_unmatched() {
        let config = TargetConfig::list(["q_proj", "q_proj"])
            .with_rank_pattern("q_proj", 4)
            .with_rank_pattern("self_attn.q_proj", 8);
        let report = resolve(config).unwrap();
        assert_eq!(report.matched[0].rank_key.as_deref(), Some("q_proj"));
    }

    #[test]
    fn nothing_left_to_adapt_is_an_error() {
        let all_excluded = TargetConfig::list(["lm_head"]).with_exclude_modules(["lm_head"]);
        for config in [TargetConfig::list::<String>([]), all_excluded] {
            let error = resolve(config.clone()).unwrap_err();
            assert!(
                matches!(error, PeftError::NoTargets { candidates: 10, .. }),
                "{error}"
            );
            assert_eq!(
                resolve(config.with_allow_unmatched(true)).unwrap().matched,
                []
            );
        }
    }
}
