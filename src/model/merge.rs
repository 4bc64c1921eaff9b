//! Taking adapters off a model: merged into its weights, or dropped.
//!
//! Burn has one way to remove a reparameterization, `materialize`, and it folds in every one of a module. What is to
//! stay packed is therefore told to step aside and attached again afterwards.

use std::collections::HashMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{FloatDType, Tensor};

use super::active::Active;
use super::peft_model::{PeftModel, refuse_foreign};
use super::traverse::{Site, collect, edit};
use super::weight::PeftWeight;
use crate::adapter::cast;
use crate::layer::{MergeReport, Nf4MergeReport, requantize};
use crate::nf4::{Nf4Config, Nf4Weight};
use crate::{PeftError, Result};

/// Largest change of a weight, over its largest value, that is taken for the rounding of a change that is none.
const NO_CHANGE: f32 = 1e-6;

impl<M: Module> PeftModel<M> {
    /// Merges the active adapters into dense weights and takes the plain module.
    ///
    /// A weight is computed in f32 and cast once, to its own dtype (for a packed one, the dtype it had before it was
    /// packed); the report gives the largest change made by a cast. An NF4 weight under an adapter becomes dense:
    /// quantising the sum again would lose most of the change. One without stays packed.
    ///
    /// # Errors
    ///
    /// As [`merged`](Self::merged); the model is lost, keep a clone.
    pub fn merge_and_unload(self) -> Result<(M, MergeReport)> {
        let report = self.check_merge()?;
        let module = remove(self.into_module(), PeftWeight::is_changed, HashMap::new())?;
        Ok((module, report))
    }

    /// The plain module with the active adapters merged, as [`merge_and_unload`](Self::merge_and_unload) gives it, beside this
    /// model, which keeps its weights: going on with the model is the unmerging, and exact. Unmerged weights are shared.
    ///
    /// # Errors
    ///
    /// [`PeftError::NotFinite`] with the path of a weight that would hold a NaN or an infinity;
    /// [`PeftError::Config`] while the rows of a batch have adapters of their own;
    /// [`PeftError::ForeignReparameterization`], as Burn would fold that one in too.
    pub fn merged(&self) -> Result<(M, MergeReport)> {
        self.clone().merge_and_unload()
    }

    /// Merges the active adapters and takes the plain module with its packed weights packed: those under an adapter are
    /// quantised again with `config`, which keeps little of a small change. The reports say how much, by module path.
    ///
    /// A change below about 2 % of a weight falls between two codes and is lost almost whole; prefer
    /// [`merge_and_unload`](Self::merge_and_unload) or an unmerged adapter. Dense weights are merged as there.
    ///
    /// # Errors
    ///
    /// As [`merged`](Self::merged); the model is lost, keep a clone.
    pub fn merge_into_nf4(self, config: &Nf4Config) -> Result<(M, Vec<(String, Nf4MergeReport)>)> {
        self.check_merge()?;
        let (mut packed, mut reports) = (HashMap::new(), Vec::new());
        visit_changed(self.module(), |path, state, base| {
            if state.nf4.is_some() {
                let merged = state.effective(base.clone()).detach();
                let (weight, report) = requantize(path, state.base(base), merged, config)?;
                packed.insert(path.to_owned(), weight);
                let module = path.strip_suffix(".weight").unwrap_or(path);
                reports.push((module.to_owned(), report));
            }
            Ok(())
        })?;
        let dense = |state: &PeftWeight| state.is_changed() && state.nf4.is_none();
        Ok((remove(self.into_module(), dense, packed)?, reports))
    }

    /// Removes all adapters and takes the module as it was before, packed weights packed.
    ///
    /// # Errors
    ///
    /// [`PeftError::ForeignReparameterization`], as Burn would fold that one in; the model is lost, keep a clone.
    pub fn unload(self) -> Result<M> {
        remove(self.into_module(), |_| false, HashMap::new())
    }

    /// A clone with its adapters off, as the reference policy of a model whose training has not begun: only where the
    /// active adapters change nothing yet. Afterwards, or from a trained adapter, take [`reference`](Self::reference).
    ///
    /// Composes each adapted weight once; a change up to 10⁻⁶ of the weight's largest value counts as none.
    ///
    /// # Errors
    ///
    /// [`PeftError::NotTheBase`] with the path of a weight that an adapter changes.
    pub fn base_reference(&self) -> Result<Self> {
        self.refuse_rows()?;
        visit_changed(self.module(), |path, state, base| {
            let change = (state.effective(base.clone()) - state.base(base.clone())).detach();
            let (change, most) = (largest(change), largest(state.base(base)));
            // Of a NaN neither is true.
            if change <= NO_CHANGE * most {
                return Ok(());
            }
            Err(PeftError::NotTheBase {
                path: path.to_owned(),
                change,
            })
        })?;
        Ok(self.disabled().freeze())
    }

    fn refuse_rows(&self) -> Result<()> {
        match self.active() {
            Active::Sum(_) => Ok(()),
            Active::Rows(rows) => Err(PeftError::Config {
                name: "active adapters".into(),
                value: format!("{} rows of a batch", rows.len()),
                expected: "one choice for the whole batch".into(),
            }),
        }
    }

    /// Meets every error of a merge, and measures what casts will change.
    fn check_merge(&self) -> Result<MergeReport> {
        self.refuse_rows()?;
        collect(self.module()).iter().try_for_each(refuse_foreign)?;
        let mut report = MergeReport {
            max_cast_error: 0.0,
        };
        visit_changed(self.module(), |path, state, base| {
            let dtype = state.effective_dtype(&base);
            let exact = state.effective(base).detach();
            let stored = cast(cast(exact.clone(), dtype), FloatDType::F32);
            Nf4Weight::check_finite(path, stored.clone())?;
            report.max_cast_error = report.max_cast_error.max(largest(stored - exact));
            Ok(())
        })?;
        Ok(report)
    }
}

/// The largest absolute value; 0 of nothing.
fn largest(x: Tensor<2>) -> f32 {
    match x.shape().num_elements() {
        0 => 0.0,
        _ => x.abs().max().into_scalar::<f32>(),
    }
}

/// Removes every state of this crate; a weight that `fold` does not want folded keeps its base, dense or packed, or gets the
/// one that `packed` has for its path.
fn remove<M: Module>(
    module: M,
    fold: impl Fn(&PeftWeight) -> bool,
    mut packed: HashMap<String, Nf4Weight>,
) -> Result<M> {
    let sites = collect(&module);
    sites.iter().try_for_each(refuse_foreign)?;
    let mut aside = HashMap::new();
    let mut again = HashMap::new();
    for Site { path, state, .. } in sites {
        let Some(mut state) = state.filter(|state| !fold(state)) else {
            continue;
        };
        if let Some(nf4) = packed.remove(&path).or_else(|| state.nf4.clone()) {
            let mut bare = PeftWeight::new();
            bare.dtype = state.dtype;
            bare.nf4 = Some(nf4);
            again.insert(path.clone(), bare);
        }
        state.keep_base = true;
        aside.insert(path, state);
    }
    Ok(edit(edit(module, aside).materialize(), again))
}

/// Shows every weight that adapters change, with its path and what is stored as its base.
pub(super) fn visit_changed<M: Module>(
    module: &M,
    see: impl FnMut(&str, &PeftWeight, Tensor<2>) -> Result<()>,
) -> Result<()> {
    let sites = collect(module).into_iter();
    let states = sites.filter_map(|site| Some((site.path, site.state?)));
    let mut visitor = Changed {
        states: states.filter(|(_, state)| state.is_changed()).collect(),
        path: Vec::new(),
        see,
        result: Ok(()),
    };
    module.visit(&mut visitor);
    visitor.result
}

struct Changed<F> {
    states: HashMap<String, PeftWeight>,
    path: Vec<String>,
    see: F,
    result: Result<()>,
}

impl<F: FnMut(&str, &PeftWeight, Tensor<2>) -> Result<()>> ModuleVisitor for Changed<F> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        if let Some(state) = self.states.get(&path)
            && self.result.is_ok()
        {
            let base = param.base();
            let dims = base.dims();
            self.result = (self.see)(&path, state, base.reshape([dims[0], dims[D - 1]]));
        }
    }
}
