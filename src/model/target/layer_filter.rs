//! The layers whose modules get an adapter: `layers_to_transform` with `layers_pattern`.

use super::budget::Budget;
use super::config::{TargetConfig, TargetModules};
use super::pattern::Pattern;
use crate::{PeftError, Result};

/// `layers_to_transform` with `layers_pattern`.
#[derive(Clone, Debug)]
pub(super) struct LayerFilter {
    pub(super) layers: Vec<usize>,
    /// In order; the first that matches decides. Never empty.
    patterns: Vec<Pattern>,
    /// Whether the patterns are the user's.
    has_own_patterns: bool,
}

impl LayerFilter {
    pub(super) fn new(config: &TargetConfig, budget: &mut Budget) -> Result<Option<Self>> {
        let layers = config.layers_to_transform.as_deref().unwrap_or_default();
        if layers.is_empty() {
            return Ok(None);
        }
        let own = config.layers_pattern.as_deref().unwrap_or_default();
        let patterns = match own {
            [] => vec![Pattern::any_layer_index()?],
            own => own
                .iter()
                .map(|text| budget.spend(Pattern::layer_index("layers_pattern", text)?))
                .collect::<Result<_>>()?,
        };
        Ok(Some(Self {
            layers: layers.to_vec(),
            patterns,
            has_own_patterns: !own.is_empty(),
        }))
    }

    pub(super) fn keeps(&self, path: &str) -> Result<bool> {
        Ok(self
            .layer_of(path)?
            .is_some_and(|layer| self.layers.contains(&layer)))
    }

    /// The layer of `path`, if it lies in one.
    pub(super) fn layer_of(&self, path: &str) -> Result<Option<usize>> {
        for pattern in &self.patterns {
            if let Some(index) = pattern.index_group(path)? {
                // The first pattern that matches decides, with or without an index in it.
                return Ok(index.and_then(|digits| digits.parse().ok()));
            }
        }
        Ok(None)
    }

    /// The user's patterns as they were written.
    pub(super) fn own_patterns(&self) -> impl Iterator<Item = &Pattern> {
        self.patterns.iter().filter(|_| self.has_own_patterns)
    }
}

/// PEFT forbids what would be ignored.
pub(super) fn check_layers(config: &TargetConfig) -> Result<()> {
    let refuse =
        |name: &str, value: String, expected: &str| Err(PeftError::config(name, value, expected));
    let is_list = matches!(config.target_modules, TargetModules::List(_));
    match (&config.layers_to_transform, &config.layers_pattern) {
        (Some(layers), _) if !is_list => refuse(
            "layers_to_transform",
            format!("{layers:?}"),
            "none unless target_modules is a list",
        ),
        (_, Some(patterns)) if !is_list => refuse(
            "layers_pattern",
            format!("{patterns:?}"),
            "none unless target_modules is a list",
        ),
        (None, Some(patterns)) if !patterns.is_empty() => refuse(
            "layers_pattern",
            format!("{patterns:?}"),
            "layers_to_transform beside it",
        ),
        _ => Ok(()),
    }
}
