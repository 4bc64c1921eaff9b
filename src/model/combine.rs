//! Adapters made of other adapters of the same model.

use burn::module::Module;

use super::config::PeftConfig;
use super::peft_model::PeftModel;
use super::target::{Adapted, TargetConfig};
use crate::adapter::{Combination, Lora};
use crate::{PeftError, Result};

impl<M: Module> PeftModel<M> {
    /// Adds an adapter that combines others of this model, each with its weight, and makes it the active one: PEFT's
    /// `add_weighted_adapter`. A module has those of them that it has; the others stay as they are.
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
        for (path, changes) in modules {
            let changes: Vec<_> = changes
                .iter()
                .map(|(lora, weight)| (lora, *weight))
                .collect();
            let lora = combination
                .combine(&changes)
                .map_err(|source| PeftError::InModule {
                    path: path.clone(),
                    source: Box::new(source),
                })?;
            factors.push((path, lora));
        }
        self.insert_made(name, factors)
    }

    /// The changes that these adapters make, each with its weight, module by module.
    pub(super) fn changes_by_module(
        &self,
        adapters: &[(&str, f64)],
    ) -> Result<Vec<(String, Vec<(Lora, f64)>)>> {
        // Checks names and weights.
        self.with_adapters(adapters)?;
        let mut modules: Vec<(String, Vec<(Lora, f64)>)> = Vec::new();
        for &(adapter, weight) in adapters {
            for (path, change) in self.changes(adapter)? {
                if change.lora().is_none_or(|lora| lora.bias.is_some()) {
                    return Err(PeftError::Config {
                        name: format!("adapter `{adapter}`"),
                        value: format!("its own values of, or a bias for, `{path}`"),
                        expected: "low-rank changes only, as others cannot be combined".into(),
                    });
                }
            }
            for (path, lora) in self.factors(adapter)? {
                match modules.iter_mut().find(|(known, _)| *known == path) {
                    Some((_, changes)) => changes.push((lora, weight)),
                    None => modules.push((path, vec![(lora, weight)])),
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
        self.insert_adapter(name, &PeftConfig::new(lora, targets), factors)
    }
}
