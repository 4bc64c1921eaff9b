//! Taking adapters off a model: merged into its weights, or dropped.
//!
//! Burn has one way to remove a reparameterization, `materialize`, and it folds in every one of a module. What is to
//! stay packed is therefore told to step aside and attached again afterwards.

use std::collections::HashMap;

use burn::module::Module;
use burn::tensor::{FloatDType, Tensor};

use super::peft_model::refuse_foreign;
use super::traverse::{Site, collect, edit};
use super::weight::PeftWeight;
use crate::Result;
use crate::adapter::cast;
use crate::layer::MergeReport;

/// Folds the active deltas into dense weights.
pub(super) fn merge<M: Module>(module: M) -> Result<(M, MergeReport)> {
    let sites = collect(&module);
    let mut report = MergeReport {
        max_cast_error: 0.0,
    };
    let mut bases = Bases {
        sites: &sites,
        path: Vec::new(),
        report: &mut report,
    };
    module.visit(&mut bases);
    let module = remove(module, sites, |state| state.delta().is_some())?;
    Ok((module, report))
}

/// Drops every delta.
pub(super) fn unload<M: Module>(module: M) -> Result<M> {
    let sites = collect(&module);
    remove(module, sites, |_| false)
}

/// Removes every state of this crate; a weight that `fold` does not want folded keeps its base, packed or dense.
fn remove<M: Module>(module: M, sites: Vec<Site>, fold: impl Fn(&PeftWeight) -> bool) -> Result<M> {
    sites.iter().try_for_each(refuse_foreign)?;
    let mut aside = HashMap::new();
    let mut packed = HashMap::new();
    for site in sites {
        let Some(state) = site.state.filter(|state| !fold(state)) else {
            continue;
        };
        if state.nf4.is_some() {
            let mut state = state.clone();
            state.adapters.clear();
            state.active = None;
            packed.insert(site.path.clone(), state);
        }
        let mut state = state;
        state.keep_base = true;
        aside.insert(site.path, state);
    }
    Ok(edit(edit(module, aside).materialize(), packed))
}

/// Measures what the cast of each merged weight changes.
struct Bases<'a> {
    sites: &'a [Site],
    path: Vec<String>,
    report: &'a mut MergeReport,
}

impl burn::module::ModuleVisitor for Bases<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &burn::module::Param<Tensor<D>>) {
        let path = self.path.join(".");
        let site = self.sites.iter().find(|site| site.path == path);
        let state = site.and_then(|site| site.state.as_ref());
        if let Some(state) = state.filter(|state| state.delta().is_some()) {
            let base = param.base();
            let dims = base.dims();
            let base: Tensor<2> = base.reshape([dims[0], dims[D - 1]]);
            let dtype = state.effective_dtype(&base);
            if dtype != FloatDType::F32 {
                let exact = state.effective(base).detach();
                let error = (cast(cast(exact.clone(), dtype), FloatDType::F32) - exact).abs();
                let error = error.max().into_scalar::<f32>();
                self.report.max_cast_error = self.report.max_cast_error.max(error);
            }
        }
    }
}
