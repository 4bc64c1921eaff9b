//! State of a model that is no parameter: running statistics, which forward passes in training change.
//!
//! Burn's `BatchNorm` holds them as `RunningState`. A walk is shown them as float parameters called `running_mean` and `running_var`,
//! which tell of their nature by name only. Two properties of theirs matter here:
//!
//! * Clones of a module share them. What is to stay as it is, such as a reference model, takes statistics of its own
//!   ([`with_own_statistics`]).
//! * A walk sees them as they were before the last forward pass. [`settle`] brings them up to date.

use std::any::Any;
use std::collections::HashMap;

use burn::module::{Flag, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, Int, Tensor};

use super::peft_model::PeftModel;
use super::traverse::collect;

/// How the names of running statistics begin.
const RUNNING: &str = "running_";

/// Whether the parameter of this path, as walks have it, is a running statistic.
pub(crate) fn is_statistic(path: &str) -> bool {
    let name = path.rsplit('.').next().unwrap_or(path);
    name.starts_with(RUNNING)
}

impl<M: Module> PeftModel<M> {
    /// Whether the module has running statistics, as Burn's `BatchNorm` does.
    pub(crate) fn has_statistics(&self) -> bool {
        has_statistics(self.module())
    }

    /// Brings running statistics up to date, so that walks see what the last forward pass in training has made of them.
    pub(crate) fn settle_statistics(&self) {
        if self.has_statistics() {
            settle(self.module());
        }
    }

    /// Changes running statistics, and nothing else, by a mapper.
    #[cfg(feature = "optim")]
    pub(crate) fn map_statistics<F: ModuleMapper>(&mut self, mapper: &mut F) {
        let module = self.module.take();
        self.module = module.map(|module| with_own_statistics(module).map(mapper));
    }
}

fn has_statistics<M: Module>(module: &M) -> bool {
    collect(module).iter().any(|site| is_statistic(&site.path))
}

/// Adds what forward passes have left to each statistic. Burn does it on the way to a module for validation, of which handles are
/// made here and dropped.
fn settle<M: Module>(module: &M) {
    drop(module.valid());
}

/// The module with running statistics of its own, which have the values of now, beside parameters that are shared as before.
pub(super) fn with_own_statistics<M: Module>(module: M) -> M {
    if !has_statistics(&module) {
        return module;
    }
    settle(&module);
    let mut originals = Originals::default();
    module.visit(&mut originals);
    // This alone makes new statistics. Everything else gives way to what it was.
    module.valid().train().map(&mut originals)
}

/// The parameters of a module, by their ids.
#[derive(Default)]
struct Originals(HashMap<ParamId, Box<dyn Any>>);

impl Originals {
    fn keep<T: Clone + 'static>(&mut self, id: ParamId, param: &T) {
        self.0.insert(id, Box::new(param.clone()));
    }

    fn original<T: Clone + 'static>(&self, id: ParamId, param: T) -> T {
        let original = self.0.get(&id).and_then(|kept| kept.downcast_ref::<T>());
        original.cloned().unwrap_or(param)
    }
}

impl ModuleVisitor for Originals {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.keep(param.id, param);
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.keep(param.id, param);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.keep(param.id, param);
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        self.keep(flag.id, flag);
    }
}

impl ModuleMapper for Originals {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.original(param.id, param)
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        self.original(param.id, param)
    }

    fn map_bool<const D: usize>(
        &mut self,
        param: Param<Tensor<D, Bool>>,
    ) -> Param<Tensor<D, Bool>> {
        self.original(param.id, param)
    }

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        self.original(flag.id, flag)
    }
}
