//! The targets that a file says: the adapter's own where they are true of the model, otherwise every module by its path.

use crate::model::{Adapted, TargetConfig, TargetModules};
use crate::{PeftError, Result};

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
    let explicit = TargetConfig::listed(adapted, rank, alpha);
    if describes(&explicit, adapted, linear, rank, alpha)? {
        return Ok(explicit);
    }
    Err(PeftError::config(
        "target_modules",
        "the paths of the adapted modules",
        "no path that ends like another module's",
    ))
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
