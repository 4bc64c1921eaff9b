//! Ranks and alphas as PEFT before 0.15 took them from `rank_pattern` and `alpha_pattern`.
//!
//! It went through the keys of `rank_pattern` and then those of `alpha_pattern`, and the first one for which `re.match(r".*\.KEY$", path)`
//! matched was looked up in both, or the path itself where none matched: a module whose first key stands in `rank_pattern` alone had the default alpha, whatever
//! `alpha_pattern` said of it. A key matched behind a dot only, and `|` in a key split the whole expression.

use super::budget::Budget;
use super::config::TargetConfig;
use super::pattern::Pattern;
use crate::Result;

/// The patterns of a configuration by that rule.
#[derive(Clone, Debug)]
pub(crate) struct OldPatterns {
    keys: Vec<Key>,
}

#[derive(Clone, Debug)]
struct Key {
    pattern: Pattern,
    rank: Option<usize>,
    alpha: Option<f64>,
}

impl OldPatterns {
    /// # Errors
    ///
    /// Those of [`TargetConfig::compile`] for the patterns.
    pub fn new(config: &TargetConfig) -> Result<Self> {
        let mut budget = Budget::default();
        let mut keys = Vec::new();
        let ranks = config
            .rank_pattern
            .iter()
            .map(|(key, _)| ("rank_pattern", key));
        let alphas = config
            .alpha_pattern
            .iter()
            .map(|(key, _)| ("alpha_pattern", key));
        for (option, key) in ranks.chain(alphas) {
            let rank = config.rank_pattern.iter().find(|(known, _)| *known == key);
            let alpha = config.alpha_pattern.iter().find(|(known, _)| *known == key);
            keys.push(Key {
                pattern: budget.spend(Pattern::old_key(option, key)?)?,
                rank: rank.map(|(_, &rank)| rank),
                alpha: alpha.map(|(_, &alpha)| alpha),
            });
        }
        Ok(Self { keys })
    }

    /// The rank and the alpha of the module at `path`.
    ///
    /// # Errors
    ///
    /// [`PeftError::PatternMatch`](crate::PeftError::PatternMatch) as for any pattern.
    pub fn rank_and_alpha(&self, path: &str, rank: usize, alpha: f64) -> Result<(usize, f64)> {
        let mut found = None;
        for key in &self.keys {
            if key.pattern.is_match(path)? {
                found = Some(key);
                break;
            }
        }
        // Where none matched, the path itself was looked up.
        let found = found.or_else(|| self.keys.iter().find(|key| key.pattern.text() == path));
        let (of_rank, of_alpha) = found.map_or((None, None), |key| (key.rank, key.alpha));
        Ok((of_rank.unwrap_or(rank), of_alpha.unwrap_or(alpha)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The answers are those of PEFT 0.14.0, run.
    #[test]
    fn the_first_key_gives_both_rank_and_alpha() {
        let config = TargetConfig::list(["q", "v"])
            .with_rank_pattern("q", 4)
            .with_alpha_pattern("layers.0.q", 3.0)
            .with_alpha_pattern("v", 5.0)
            .with_alpha_pattern("a|v", 7.0);
        let old = OldPatterns::new(&config).unwrap();
        for (path, expected) in [
            ("m.layers.0.q", (4, 8.0)),
            ("m.layers.1.v", (2, 5.0)),
            ("m.layers.1.k", (2, 8.0)),
            // Not behind a dot: the path is looked up as it is, unless the end of an alternative matches.
            ("q", (4, 8.0)),
            ("v", (2, 7.0)),
            // `.*\.a` of `.*\.a|v$` ends anywhere.
            ("m.attention.k", (2, 7.0)),
        ] {
            assert_eq!(
                old.rank_and_alpha(path, 2, 8.0).unwrap(),
                expected,
                "{path}"
            );
        }
    }
}
