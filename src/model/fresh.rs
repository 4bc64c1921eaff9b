//! Fresh factors for the modules that an adapter goes to.

use std::collections::HashMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};

use super::traverse::Site;
use crate::Result;
use crate::adapter::{Lora, LoraConfig};
use crate::layer::{DenseMap, Nf4Map};

/// A fresh delta for the weight at `site`, on `device`. `dense` has the weight if it is dense and the delta needs it.
pub(super) fn fresh(
    config: &LoraConfig,
    site: &Site,
    device: &Device,
    dense: &HashMap<String, Tensor<2>>,
) -> Result<Lora> {
    let bias = None;
    match site.state.as_ref().and_then(|state| state.nf4.as_ref()) {
        _ if !config.needs_weight() => {
            let [d_in, d_out] = site.dims();
            config.init(d_in, d_out, device)
        }
        Some(weight) => config.init_on(&Nf4Map { weight, bias }, site.dims(), device),
        None => {
            let weight = dense[&site.path].clone();
            config.init_on(&DenseMap { weight, bias }, site.dims(), device)
        }
    }
}

/// The dense base weights at these parameter paths, shared; initialises those that are not yet.
pub(super) fn dense_weights<M: Module>(
    module: &M,
    paths: impl Fn(&str) -> bool,
) -> HashMap<String, Tensor<2>> {
    let mut weights = Weights {
        paths,
        path: Vec::new(),
        found: HashMap::new(),
    };
    module.visit(&mut weights);
    weights.found
}

struct Weights<F> {
    paths: F,
    path: Vec<String>,
    found: HashMap<String, Tensor<2>>,
}

impl<F: Fn(&str) -> bool> ModuleVisitor for Weights<F> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        if D == 2 && (self.paths)(&path) {
            let base = param.base();
            let dims = [base.dims()[0], base.dims()[D - 1]];
            self.found.insert(path, base.reshape(dims));
        }
    }
}
