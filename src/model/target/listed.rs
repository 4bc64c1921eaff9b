//! Targets that name every module by its whole path, for where patterns cannot say it.
//!
//! A pattern speaks of paths in one naming. Where a file names modules otherwise, or factors were given that no pattern
//! describes, the modules are listed one by one, and those whose rank or alpha differ from the default have a key each.

use super::TargetConfig;

/// An adapted module: what [`TargetConfig`] is to say of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Adapted {
    pub path: String,
    pub rank: usize,
    pub alpha: f64,
}

impl TargetConfig {
    /// Targets that name `adapted`, with their ranks and alphas, where `rank` and `alpha` are the defaults.
    pub(crate) fn listed(adapted: &[Adapted], rank: usize, alpha: f64) -> Self {
        let mut targets = Self::list(adapted.iter().map(|module| &module.path));
        let ranks = adapted.iter().filter(|module| module.rank != rank);
        targets.rank_pattern = ranks.map(|own| (own.path.as_str(), own.rank)).collect();
        let alphas = adapted.iter().filter(|module| module.alpha != alpha);
        targets.alpha_pattern = alphas.map(|own| (own.path.as_str(), own.alpha)).collect();
        targets
    }
}
