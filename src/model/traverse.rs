//! Reading and changing what is attached to the weights of any module.
//!
//! A change is planned first, from what [`collect`] finds, so that every error is met before anything has changed;
//! [`edit`] then cannot fail.

use std::collections::HashMap;

use burn::module::{Module, ModuleVisitor, Param, Reparameterization, Reparameterizer};
use burn::tensor::{DType, Device, Tensor};

use super::weight::{PeftWeight, REPARAMETERIZATION, Transfer};
use crate::layer::weight_dims;

/// One float parameter of a model and what is attached to it.
#[derive(Debug)]
pub(super) struct Site {
    /// Path of the parameter, as in `model.layers.0.self_attn.q_proj.weight`.
    pub path: String,
    /// Shape of the stored base: empty for a packed weight.
    pub shape: Vec<usize>,
    /// Dtype of the stored base; unknown, and not asked for, while it is uninitialised.
    pub dtype: Option<DType>,
    pub device: Device,
    pub trainable: bool,
    /// Whether it is the weight of a `burn::nn::Linear`.
    pub linear: bool,
    /// What this crate has attached to it.
    pub state: Option<PeftWeight>,
    /// Name of a reparameterization that is not this crate's.
    pub foreign: Option<String>,
    /// Trainable parameters inside a foreign reparameterization.
    pub foreign_params: usize,
}

impl Site {
    /// Path of the module that owns the weight, as PEFT names targets.
    pub fn module(&self) -> &str {
        self.path.strip_suffix(".weight").unwrap_or(&self.path)
    }

    /// `[d_in, d_out]` of a linear weight, packed or not.
    pub fn dims(&self) -> [usize; 2] {
        match self.state.as_ref().and_then(|state| state.nf4.as_ref()) {
            Some(nf4) => [nf4.shape()[1], nf4.shape()[0]],
            None => [self.shape[0], self.shape[1]],
        }
    }
}

/// Every float parameter of `module`, in its order, without initialising any.
pub(super) fn collect<M: Module>(module: &M) -> Vec<Site> {
    let mut collector = Collector::default();
    module.visit(&mut collector);
    Transfer::Idle.swap();
    collector.sites
}

#[derive(Default)]
struct Collector {
    path: Vec<(String, String)>,
    /// How deep in reparameterizations.
    depth: usize,
    sites: Vec<Site>,
}

impl ModuleVisitor for Collector {
    fn enter_module(&mut self, name: &str, container: &str) {
        if container == REPARAMETERIZATION {
            if self.depth == 0
                && name != PeftWeight::NAME
                && let Some(site) = self.sites.last_mut()
            {
                site.foreign = Some(name.into());
            }
            self.depth += 1;
        }
        self.path.push((name.into(), container.into()));
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.path.pop();
        if container == REPARAMETERIZATION {
            self.depth -= 1;
            if let Transfer::Collected(state) = Transfer::Idle.swap()
                && let Some(site) = self.sites.last_mut()
            {
                site.state = Some(state);
            }
        }
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.depth > 0 {
            if let Some(site) = self.sites.last_mut().filter(|site| site.foreign.is_some()) {
                site.foreign_params += param.lazy_shape().num_elements();
            }
            return;
        }
        let names: Vec<&str> = self.path.iter().map(|(name, _)| name.as_str()).collect();
        let linear = D == 2
            && self
                .path
                .last()
                .is_some_and(|(name, container)| name == "weight" && container == "Struct:Linear");
        self.sites.push(Site {
            path: names.join("."),
            shape: match linear {
                true => weight_dims(&as_matrix(param)).to_vec(),
                false => param.lazy_shape().to_vec(),
            },
            dtype: param.is_initialized().then(|| param.base().dtype()),
            device: param.lazy_device(),
            trainable: param.is_initialized() && param.base().is_require_grad(),
            linear,
            state: None,
            foreign: None,
            foreign_params: 0,
        });
        Transfer::Collect.swap();
    }
}

/// The same parameter, known to be a matrix.
fn as_matrix<const D: usize>(param: &Param<Tensor<D>>) -> Param<Tensor<2>> {
    let param: &dyn std::any::Any = param;
    param
        .downcast_ref::<Param<Tensor<2>>>()
        .expect("asked for matrices only")
        .clone()
}

/// Gives the weights at these parameter paths a new state. Paths that `module` does not have are ignored.
pub(super) fn edit<M: Module>(module: M, states: HashMap<String, PeftWeight>) -> M {
    let module = module.apply_reparameterization(Editor { states });
    Transfer::Idle.swap();
    module
}

struct Editor {
    states: HashMap<String, PeftWeight>,
}

impl Reparameterizer for Editor {
    type Reparam = PeftWeight;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<PeftWeight>) {
        let state = self.states.remove(path);
        replace_next(&state);
        (param, state)
    }
}

/// Burn attaches the returned state where there is none, and where there is one puts the old one back, mapped: the old
/// one then gives way to the new one by itself.
pub(super) fn replace_next(state: &Option<PeftWeight>) {
    match state {
        Some(state) => Transfer::Replace(state.clone()).swap(),
        None => Transfer::Idle.swap(),
    };
}
