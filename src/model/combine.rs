//! Adapters made of other adapters of the same model.

use std::collections::HashMap;

use burn::module::Module;

use super::attach::Joining;
use super::config::PeftConfig;
use super::peft_model::PeftModel;
use super::target::{Adapted, TargetConfig};
use crate::adapter::{Combination, Lora};
use crate::{PeftError, Result};

/// What several adapters change in one module, each with its weight.
pub(super) struct ModuleChanges {
    pub path: String,
    pub changes: Vec<(Lora, f64)>,
}

impl ModuleChanges {
    pub fn by_reference(&self) -> Vec<(&Lora, f64)> {
        let changes = self.changes.iter();
        changes.map(|(lora, weight)| (lora, *weight)).collect()
    }

    /// An error about this module.
    pub fn error(&self, source: PeftError) -> PeftError {
        PeftError::InModule {
            path: self.path.clone(),
            source: Box::new(source),
        }
    }
}

impl<M: Module> PeftModel<M> {
    /// Adds an adapter that combines others of this model, each with its weight: PEFT's `add_weighted_adapter`. As there, it is frozen
    /// and not active until [`set_adapter`](Self::set_adapter) chooses it. A module gets the sum of those of them that it has; the
    /// others stay as they are.
    ///
    /// [`Combination::Cat`] is exact: the new adapter changes the model as [`set_adapters`](Self::set_adapters) with the same
    /// weights does. The others combine factors, and are not. The best sum of a given rank is that of
    /// `add_weighted_adapter_svd` (feature `faer`). Its scale is 1, its dropout that of the first.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`]; [`PeftError::AdapterName`] for a new name that is none or is taken, or an adapter named
    /// twice; those of [`Combination::combine`], in [`PeftError::InModule`]. The model has not changed then.
    pub fn add_weighted_adapter(
        &mut self,
        name: &str,
        adapters: &[(&str, f64)],
        combination: Combination,
    ) -> Result<()> {
        let modules = self.changes_by_module(adapters)?;
        let mut factors = Vec::with_capacity(modules.len());
        for module in modules {
            let lora = combination
                .combine(&module.by_reference())
                .map_err(|source| module.error(source))?;
            factors.push((module.path, lora));
        }
        self.insert_made(name, factors)
    }

    /// The changes that these adapters make, each with its weight, module by module.
    pub(super) fn changes_by_module(&self, adapters: &[(&str, f64)]) -> Result<Vec<ModuleChanges>> {
        // Checks names and weights.
        self.with_adapters(adapters)?;
        let mut modules: Vec<ModuleChanges> = Vec::new();
        let mut places: HashMap<String, usize> = HashMap::new();
        for &(adapter, weight) in adapters {
            for (path, change) in self.changes(adapter)? {
                if change.lora().is_none_or(|lora| lora.bias.is_some()) {
                    return Err(PeftError::config(
                        format!("adapter `{adapter}`"),
                        format!("its own values of, or a bias for, `{path}`"),
                        "low-rank changes only, as others cannot be combined",
                    ));
                }
            }
            for (path, lora) in self.factors(adapter)? {
                match places.get(&path) {
                    Some(&place) => modules[place].changes.push((lora, weight)),
                    None => {
                        places.insert(path.clone(), modules.len());
                        modules.push(ModuleChanges {
                            path,
                            changes: vec![(lora, weight)],
                        });
                    }
                }
            }
        }
        Ok(modules)
    }

    /// Inserts an adapter made of others, whose configuration follows from its factors.
    pub(super) fn insert_made(&mut self, name: &str, factors: Vec<(String, Lora)>) -> Result<()> {
        let Some((_, most)) = factors.iter().max_by_key(|(_, lora)| lora.rank()) else {
            return Err(PeftError::NoTargets {
                candidates: 0,
                excluded: 0,
            });
        };
        let lora = most.config();
        let adapted = factors.iter().map(|(path, lora)| Adapted {
            path: path.clone(),
            rank: lora.rank(),
            alpha: lora.config().alpha,
        });
        let adapted: Vec<_> = adapted.collect();
        let targets = TargetConfig::listed(&adapted, lora.rank, lora.alpha);
        let changes = self.of_weights(factors);
        let joining = Joining {
            trainable: false,
            ..Joining::default()
        };
        self.join(name, &PeftConfig::new(lora, targets), changes, joining)
    }
}
