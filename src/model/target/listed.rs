//! Targets that name every module by its whole path, for where patterns cannot say it.
//!
//! A pattern speaks of paths in one naming. Where a file names modules otherwise, or factors were given that no pattern
//! describes, the modules are listed one by one, and those whose rank or alpha differ from the default stand in one pattern for
//! each value: `a\.q|b\.q`.

use super::{PatternMap, TargetConfig};

/// An adapted module: what [`TargetConfig`] is to say of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Adapted {
    pub path: String,
    pub rank: usize,
    pub alpha: f64,
}

impl TargetConfig {
    /// Targets that name exactly `adapted`, with their ranks and alphas, where `rank` and `alpha` are the defaults.
    pub(crate) fn listed(adapted: &[Adapted], rank: usize, alpha: f64) -> Self {
        let mut targets = Self::list(adapted.iter().map(|module| &module.path));
        targets.rank_pattern = patterns(adapted, rank, |module| module.rank);
        targets.alpha_pattern = patterns(adapted, alpha, |module| module.alpha);
        targets
    }
}

/// One key for each value other than `default`, in the order in which the values appear.
fn patterns<V: Copy + PartialEq>(
    adapted: &[Adapted],
    default: V,
    value: impl Fn(&Adapted) -> V,
) -> PatternMap<V> {
    let mut keys: Vec<(String, V)> = Vec::new();
    for module in adapted.iter().filter(|module| value(module) != default) {
        let path = regex::escape(&module.path);
        match keys.iter_mut().find(|(_, known)| *known == value(module)) {
            Some((key, _)) => *key = format!("{key}|{path}"),
            None => keys.push((path, value(module))),
        }
    }
    keys.into_iter().collect()
}
