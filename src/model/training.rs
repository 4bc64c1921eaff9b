//! Whether anything of a model trains.

use std::collections::BTreeSet;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;

use super::weight::{CONTAINER, NF4};
use crate::PeftError;

/// An error that names the adapters of `module` if it has some and no parameter of it requires a gradient: a step would change
/// nothing.
pub(crate) fn nothing_trains<M: Module>(module: &M) -> Option<PeftError> {
    let mut search = Search::default();
    module.visit(&mut search);
    if search.trains || search.adapters.is_empty() {
        return None;
    }
    let adapters: Vec<String> = search.adapters.into_iter().collect();
    Some(PeftError::config(
        "trainable parameters",
        format!("none: the adapters {adapters:?} are frozen or not active"),
        "at least one: choose an adapter by `set_adapter`, unfreeze one that was loaded to be used by `set_trainable`, or load it by \
         `LoadOptions::with_trainable(true)`",
    ))
}

#[derive(Default)]
struct Search {
    adapters: BTreeSet<String>,
    trains: bool,
}

impl ModuleVisitor for Search {
    fn enter_module(&mut self, name: &str, container: &str) {
        if container == CONTAINER && name != NF4 && !self.adapters.contains(name) {
            self.adapters.insert(name.to_owned());
        }
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.trains |= param.is_require_grad();
    }
}
