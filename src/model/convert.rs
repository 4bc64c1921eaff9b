//! Adapters of a model as one plain LoRA, by SVD: `s·A·B ≈ Σ_i w_i·Δ_i`, where `Δ_i [d_in, d_out]` is what adapter `i` alone adds to a
//! weight, whatever kind it is of.
//!
//! A DoRA, or one that begins with a part of the weight, becomes what every tool can serve. Sums of low-rank changes are
//! decomposed by their factors; only a change that is no low-rank product, or is pruned, is formed, one module at a time.

use std::collections::HashMap;

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::combine::ModuleChanges;
use super::merge::changed_states;
use super::peft_model::PeftModel;
use super::traverse::{See, walk};
use super::weight::PeftWeight;
use crate::Result;
use crate::adapter::{Combination, DeltaReport, Lora, Truncation, change_of};

impl<M: Module> PeftModel<M> {
    /// Adds the plain LoRA nearest to the weighted sum of what these adapters change: converts one, a
    /// DoRA for instance, or sums up several. Reports the rank and the relative error of every module.
    ///
    /// The change of a DoRA depends on its weight: the new adapter is for this base, packed or dense as it is now. It has
    /// nearly full rank, and how well a small one does is for the report to say. A plain LoRA at its own rank is exact.
    ///
    /// ```
    /// # fn convert<M: burn::module::Module>(model: &mut burn_peft::model::PeftModel<M>) -> burn_peft::Result<()> {
    /// use burn_peft::adapter::Truncation;
    ///
    /// for (module, report) in model.add_lora_of("lora", &[("dora", 1.0)], Truncation::Within(0.05))? {
    ///     println!("{module}: rank {}, {:.1} % missed", report.rank, 100.0 * report.relative_error);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`add_weighted_adapter_svd`](Self::add_weighted_adapter_svd).
    pub fn add_lora_of(
        &mut self,
        name: &str,
        adapters: &[(&str, f64)],
        truncation: Truncation,
    ) -> Result<Vec<(String, DeltaReport)>> {
        self.add_weighted_adapter_svd(name, adapters, Combination::Linear, truncation)
    }

    /// As [`add_weighted_adapter`](Self::add_weighted_adapter), with the changes themselves combined in place of their factors, and
    /// the result cut to a rank by SVD: PEFT's `svd` (for [`Combination::Linear`]), `ties_svd`, `dare_linear_svd`, `dare_ties_svd` and
    /// `magnitude_prune_svd`. Adapters may have different ranks, and be DoRA. Modules whose rank is not the largest stand in
    /// the configuration's `rank_pattern`.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`](crate::PeftError::UnknownAdapter);
    /// [`PeftError::AdapterName`](crate::PeftError::AdapterName) for a new name that is none or is taken, or an adapter named twice;
    /// [`PeftError::NoTargets`](crate::PeftError::NoTargets) without adapters; those of [`Combination::combine_svd`], in
    /// [`PeftError::InModule`](crate::PeftError::InModule). The model has not changed then.
    pub fn add_weighted_adapter_svd(
        &mut self,
        name: &str,
        adapters: &[(&str, f64)],
        combination: Combination,
        truncation: Truncation,
    ) -> Result<Vec<(String, DeltaReport)>> {
        self.check_new_name(name)?;
        let modules = self.changes_by_module(adapters)?;
        let made = self.on_weights(&modules, adapters, combination, truncation)?;
        let (mut factors, mut reports) = (Vec::new(), Vec::new());
        for module in modules {
            let (lora, report) = match made.get(&module.path) {
                Some(made) => made.clone(),
                None => combination
                    .combine_svd(&module.by_reference(), truncation)
                    .map_err(|source| module.error(source))?,
            };
            factors.push((module.path.clone(), lora));
            reports.push((module.path, report));
        }
        self.insert_made(name, factors)?;
        Ok(reports)
    }

    /// The new factors of those modules where a change depends on the weight.
    fn on_weights(
        &self,
        modules: &[ModuleChanges],
        adapters: &[(&str, f64)],
        combination: Combination,
        truncation: Truncation,
    ) -> Result<HashMap<String, (Lora, DeltaReport)>> {
        let on_weight = |module: &&ModuleChanges| {
            let mut changes = module.changes.iter();
            changes.any(|(lora, _)| lora.magnitude.is_some())
        };
        let modules = modules.iter().filter(on_weight);
        let modules: HashMap<_, _> = modules
            .map(|module| (format!("{}.weight", module.path), module))
            .collect();
        if modules.is_empty() {
            return Ok(HashMap::new());
        }
        let model = self.with_adapters(adapters)?;
        let mut nearest = Nearest {
            states: changed_states(model.module()),
            modules,
            combination,
            truncation,
            made: Ok(HashMap::new()),
        };
        walk(model.module(), &mut nearest);
        nearest.made
    }
}

/// Combines the changes of those modules where one depends on the weight.
struct Nearest<'a> {
    states: HashMap<String, PeftWeight>,
    /// By the paths of the weights.
    modules: HashMap<String, &'a ModuleChanges>,
    combination: Combination,
    truncation: Truncation,
    made: Result<HashMap<String, (Lora, DeltaReport)>>,
}

impl See for Nearest<'_> {
    fn see<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        let (Some(module), Some(state), Ok(made)) = (
            self.modules.get(path),
            self.states.get(path),
            &mut self.made,
        ) else {
            return;
        };
        let weight = state.layout.to_matrix(state.base(param.base()).detach());
        let dense = |lora: &Lora| change_of(lora, &weight).detach();
        let result = self
            .combination
            .nearest(&module.by_reference(), self.truncation, dense);
        match result.map_err(|source| module.error(source)) {
            Ok(lora) => {
                made.insert(module.path.clone(), lora);
            }
            Err(error) => self.made = Err(error),
        }
    }
}
