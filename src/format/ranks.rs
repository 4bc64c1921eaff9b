//! The rank and the alpha of each module that has factors in a file, as the PEFT that wrote it meant them.

use super::config::AdapterConfig;
use super::version::Version;
use crate::model::{OldPatterns, PatternMap, TargetMatcher};
use crate::{PeftError, Result};

/// The first version of PEFT that looks ranks and alphas up apart.
const PATTERNS_APART: Version = Version(0, 15, 0);

/// The ranks and alphas of a configuration.
pub(super) struct Ranks<'a> {
    config: &'a AdapterConfig,
    matcher: TargetMatcher,
}

/// What the factors under a path are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Their rank, of experts that of each.
    pub rank: usize,
    /// Whether they are of experts in one tensor.
    pub experts: bool,
}

impl<'a> Ranks<'a> {
    /// # Errors
    ///
    /// Those of [`AdapterConfig::validate`].
    pub fn new(config: &'a AdapterConfig) -> Result<Self> {
        Ok(Self {
            matcher: config.validate()?,
            config,
        })
    }

    pub fn matcher(&self) -> &TargetMatcher {
        &self.matcher
    }

    /// What the factors under `path` are of, of which `A` has these rows.
    ///
    /// # Errors
    ///
    /// Those of patterns.
    pub fn place(&self, path: &str, rows: Option<usize>) -> Result<Place> {
        let config = self.config;
        let plain = Place {
            rank: self.matcher.rank_for(path, config.r)?,
            experts: false,
        };
        // A bare name in `target_parameters` may be that of a tensor of any module.
        let experts = config.experts_of(path);
        if experts.is_empty() {
            return Ok(plain);
        }
        let is_target = !path.ends_with(".base_layer") && self.matcher.matches(path)?;
        if is_target && rows == Some(plain.rank) {
            return Ok(plain);
        }
        let mut ranks = Vec::with_capacity(experts.len());
        for parameter in &experts {
            ranks.push(self.matcher.rank_for(parameter, config.r)?);
        }
        let divides = |rank: &usize| rows.is_some_and(|rows| rows.is_multiple_of(*rank));
        match ranks.iter().copied().find(divides) {
            Some(rank) => Ok(Place {
                rank,
                experts: true,
            }),
            None if is_target => Ok(plain),
            None => Ok(Place {
                rank: ranks[0],
                experts: true,
            }),
        }
    }
}

impl AdapterConfig {
    /// Makes the patterns those of PEFT 0.21 where an older one meant something else by them. `modules` are the modules that have factors,
    /// with the rows of `A`, which are their ranks.
    ///
    /// # Errors
    ///
    /// Those of [`validate`](Self::validate); [`PeftError::UnsupportedKey`] where the two rules give another alpha and the file does not
    /// tell which of them it was written by.
    pub(super) fn take_old_patterns(&mut self, modules: &[(&str, Option<usize>)]) -> Result<()> {
        let known = match self.version() {
            Some(version) if version < PATTERNS_APART => true,
            None if self.may_be_old && self.target_parameters.is_empty() => false,
            _ => return Ok(()),
        };
        let (r, alpha) = (self.r, self.lora_alpha);
        if self.targets.rank_pattern.is_empty() && self.targets.alpha_pattern.is_empty() {
            return Ok(());
        }
        let old = OldPatterns::new(&self.targets)?;
        let new = self.validate()?;
        let (mut ranks, mut alphas) = (PatternMap::new(), PatternMap::new());
        for &(path, rows) in modules {
            let (old_rank, old_alpha) = old.rank_and_alpha(path, r, alpha)?;
            let (rank, alpha) = (new.rank_for(path, r)?, new.alpha_for(path, alpha)?);
            if old_alpha != alpha && !known {
                return Err(PeftError::UnsupportedKey {
                    key: "alpha_pattern".into(),
                    value: format!("that of `{}`", path.escape_debug()),
                    reason: format!(
                        "PEFT before 0.15 took {old_alpha} for its alpha, later ones take {alpha}, and the file does not say which \
                         PEFT wrote it: `ReadOptions::assumed_peft_version` does"
                    ),
                });
            }
            let key = || format!("^{}", regex::escape(path));
            if old_alpha != alpha {
                alphas.insert(key(), old_alpha);
            }
            // The tensors tell the rank.
            if old_rank != rank && (known || rows == Some(old_rank)) {
                ranks.insert(key(), old_rank);
            }
        }
        prepend(ranks, &mut self.targets.rank_pattern);
        prepend(alphas, &mut self.targets.alpha_pattern);
        Ok(())
    }
}

/// Puts `first` before the keys of `map`, as the first that matches counts.
fn prepend<V: Clone>(first: PatternMap<V>, map: &mut PatternMap<V>) {
    if first.is_empty() {
        return;
    }
    let own = |map: &PatternMap<V>| {
        let entries = map
            .iter()
            .map(|(key, value)| (key.to_owned(), value.clone()));
        entries.collect::<Vec<_>>()
    };
    *map = own(&first).into_iter().chain(own(map)).collect();
}
