//! Targets that name every module by its whole path, for where patterns cannot say it.
//!
//! A pattern speaks of paths in one naming. Where a [`NameMap`](super::NameMap) renames modules, or factors were given
//! that no pattern describes, the modules are listed one by one, and those whose rank or alpha differ from the default
//! stand in one pattern for each value: `a\.q|b\.q`.

use crate::model::{PatternMap, TargetConfig, TargetModules};
use crate::{PeftError, Result};

/// An adapted module: what [`TargetConfig`] is to say of it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Adapted {
    pub path: String,
    pub rank: usize,
    pub alpha: f64,
}

/// Targets that name exactly `adapted`, with their ranks and alphas, where `rank` and `alpha` are the defaults.
pub(super) fn targets(adapted: &[Adapted], rank: usize, alpha: f64) -> TargetConfig {
    let mut targets = TargetConfig::list(adapted.iter().map(|module| &module.path));
    targets.rank_pattern = patterns(adapted, rank, |module| module.rank);
    targets.alpha_pattern = patterns(adapted, alpha, |module| module.alpha);
    targets
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

/// `preferred` if it is a list and says of all linear modules what is true of them, otherwise the explicit form.
///
/// PEFT applies an expression to every module of its model, not only to linear ones, and stops at the first that it
/// cannot adapt: `.*self_attn.*` matches the attention module itself. And its `"all-linear"` may mean other modules than
/// ours. So what these two chose is listed, as PEFT itself does with the latter on saving.
///
/// `linear` are the paths of the model's linear modules, in the same naming.
///
/// # Errors
///
/// [`PeftError::Config`] where even whole paths name one module too many, because one ends like another.
pub(super) fn describe(
    preferred: Option<&TargetConfig>,
    adapted: &[Adapted],
    linear: &[String],
    rank: usize,
    alpha: f64,
) -> Result<TargetConfig> {
    if let Some(preferred) = preferred {
        let mut preferred = preferred.clone();
        if !matches!(preferred.target_modules, TargetModules::List(_)) {
            let paths = adapted.iter().map(|module| module.path.clone());
            preferred.target_modules = TargetModules::List(paths.collect());
            preferred.exclude_modules = None;
        }
        if describes(&preferred, adapted, linear, rank, alpha)? {
            return Ok(preferred);
        }
    }
    let explicit = targets(adapted, rank, alpha);
    if describes(&explicit, adapted, linear, rank, alpha)? {
        return Ok(explicit);
    }
    Err(PeftError::Config {
        name: "target_modules".into(),
        value: "the paths of the adapted modules".into(),
        expected: "no path that ends like another module's".into(),
    })
}

/// Whether `targets` chooses exactly `adapted` among `linear`, with their ranks and alphas.
fn describes(
    targets: &TargetConfig,
    adapted: &[Adapted],
    linear: &[String],
    rank: usize,
    alpha: f64,
) -> Result<bool> {
    let matcher = targets.compile(None)?;
    for module in adapted {
        let path = &module.path;
        if !matcher.matches(path)?
            || matcher.rank_for(path, rank)? != module.rank
            || matcher.alpha_for(path, alpha)? != module.alpha
        {
            return Ok(false);
        }
    }
    let mut matched = 0;
    for path in linear {
        matched += usize::from(matcher.matches(path)?);
    }
    Ok(matched == adapted.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(modules: &[(&str, usize, f64)]) -> Vec<Adapted> {
        let module = |&(path, rank, alpha): &(&str, _, _)| Adapted {
            path: path.into(),
            rank,
            alpha,
        };
        modules.iter().map(module).collect()
    }

    fn linear() -> Vec<String> {
        ["a.q", "a.v", "b.q", "b.v", "head"]
            .map(String::from)
            .into()
    }

    #[test]
    fn a_description_that_is_true_is_kept() {
        let all = adapted(&[("a.q", 4, 8.0), ("b.q", 2, 8.0)]);
        let preferred = TargetConfig::list(["q"]).with_rank_pattern("b.q", 2);
        assert_eq!(
            describe(Some(&preferred), &all, &linear(), 4, 8.0).unwrap(),
            preferred
        );
    }

    #[test]
    fn all_linear_and_expressions_are_listed_and_keep_their_patterns() {
        let all = adapted(&[("a.q", 4, 8.0), ("a.v", 4, 8.0), ("b.q", 2, 8.0)]);
        let expected = TargetConfig::list(["a.q", "a.v", "b.q"]).with_rank_pattern("b.q", 2);
        for preferred in [
            TargetConfig::all_linear()
                .with_exclude_modules(["b.v"])
                .with_rank_pattern("b.q", 2),
            TargetConfig::regex("a.*|b.q").with_rank_pattern("b.q", 2),
        ] {
            assert_eq!(
                describe(Some(&preferred), &all, &linear(), 4, 8.0).unwrap(),
                expected
            );
        }
    }

    #[test]
    fn a_description_that_is_not_true_is_replaced() {
        let all = adapted(&[("a.q", 4, 1.5), ("a.v", 2, 8.0), ("b.q", 2, 8.0)]);
        let expected = TargetConfig::list(["a.q", "a.v", "b.q"])
            .with_rank_pattern(r"a\.v|b\.q", 2)
            .with_alpha_pattern(r"a\.q", 1.5);
        for preferred in [
            None,
            Some(TargetConfig::list(["q", "v"])),
            Some(TargetConfig::list(["a.q"])),
        ] {
            let found = describe(preferred.as_ref(), &all, &linear(), 4, 8.0).unwrap();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn paths_that_end_alike_are_an_error_rather_than_one_module_too_many() {
        let linear = ["head", "draft.head"].map(String::from);
        let error = describe(None, &adapted(&[("head", 4, 8.0)]), &linear, 4, 8.0).unwrap_err();
        assert!(error.to_string().contains("target_modules"), "{error}");
        // The longer one alone, or both, can be told.
        assert!(describe(None, &adapted(&[("draft.head", 4, 8.0)]), &linear, 4, 8.0).is_ok());
        let both = adapted(&[("head", 4, 8.0), ("draft.head", 4, 8.0)]);
        assert!(describe(None, &both, &linear, 4, 8.0).is_ok());
    }
}
