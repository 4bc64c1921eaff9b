//! The parameters of a model's adapters, by path.

use std::collections::{BTreeMap, HashSet};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Tensor, TensorData};

use crate::model::{PeftModel, is_statistic};
use crate::{PeftError, Result};

/// A parameter of an adapter.
#[derive(Clone, Debug)]
pub(super) struct Parameter {
    pub id: ParamId,
    pub shape: Vec<usize>,
    pub dtype: DType,
}

/// Every parameter of every adapter, active or not, by its path.
pub(super) fn parameters<M: Module>(model: &PeftModel<M>) -> BTreeMap<String, Parameter> {
    let mut found = BTreeMap::new();
    each(model, |path, id, tensor| {
        let (shape, dtype) = (tensor.shape, tensor.dtype);
        found.insert(path, Parameter { id, shape, dtype });
    });
    found
}

/// The values of [`parameters`].
///
/// # Errors
///
/// [`PeftError::DeviceRead`].
pub(super) fn values<M: Module>(model: &PeftModel<M>) -> Result<BTreeMap<String, TensorData>> {
    let mut found = BTreeMap::new();
    let mut failed = None;
    each(model, |path, _, tensor| match (tensor.read)() {
        Ok(data) => {
            found.insert(path, data);
        }
        Err(reason) => {
            failed.get_or_insert(PeftError::DeviceRead {
                tensor: path,
                reason,
            });
        }
    });
    failed.map_or(Ok(found), Err)
}

/// Gives parameters new values, which have their shapes and dtypes.
pub(super) fn replace<M: Module>(
    model: PeftModel<M>,
    values: BTreeMap<String, TensorData>,
) -> PeftModel<M> {
    let path = Vec::new();
    let mut replacer = Replacer { path, values };
    model.adapters_only().map(&mut replacer).into_inner()
}

/// The running statistics of the model, as its last forward pass in training left them, by their paths.
///
/// # Errors
///
/// [`PeftError::DeviceRead`].
pub(super) fn statistics<M: Module>(model: &PeftModel<M>) -> Result<BTreeMap<String, TensorData>> {
    let mut found = BTreeMap::new();
    if !model.has_statistics() {
        return Ok(found);
    }
    model.settle_statistics();
    let mut failed = None;
    let mut walk = Walk {
        path: Vec::new(),
        wanted: is_statistic,
        show: |path, _, tensor: Shown| match (tensor.read)() {
            Ok(data) => {
                found.insert(path, data);
            }
            Err(reason) => {
                failed.get_or_insert(PeftError::DeviceRead {
                    tensor: path,
                    reason,
                });
            }
        },
    };
    model.visit(&mut walk);
    failed.map_or(Ok(found), Err)
}

/// Gives running statistics new values, which have their shapes and dtypes.
pub(super) fn replace_statistics<M: Module>(
    model: &mut PeftModel<M>,
    values: BTreeMap<String, TensorData>,
) {
    if !values.is_empty() {
        let path = Vec::new();
        model.map_statistics(&mut Replacer { path, values });
    }
}

/// A parameter outside of adapters that trains, whose progress a checkpoint of adapters would lose: its path.
pub(super) fn trains_elsewhere<M: Module>(model: &PeftModel<M>) -> Option<String> {
    let adapters = parameters(model);
    let mut search = Search {
        path: Vec::new(),
        adapters: adapters.values().map(|parameter| parameter.id).collect(),
        found: None,
    };
    model.visit(&mut search);
    search.found
}

/// One parameter as [`each`] shows it.
struct Shown<'a> {
    shape: Vec<usize>,
    dtype: DType,
    read: &'a dyn Fn() -> Result<TensorData, String>,
}

fn each<M: Module>(model: &PeftModel<M>, show: impl FnMut(String, ParamId, Shown)) {
    let mut walk = Walk {
        path: Vec::new(),
        wanted: |_: &str| true,
        show,
    };
    // Handles are cloned, not tensors.
    model.clone().adapters_only().visit(&mut walk);
}

struct Walk<W, F> {
    path: Vec<String>,
    /// Which paths are shown; the values of others are not asked for.
    wanted: W,
    show: F,
}

impl<W: Fn(&str) -> bool, F: FnMut(String, ParamId, Shown)> ModuleVisitor for Walk<W, F> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        if !(self.wanted)(&path) {
            return;
        }
        let tensor = param.val();
        let shown = Shown {
            shape: tensor.dims().to_vec(),
            dtype: tensor.dtype(),
            read: &|| {
                let data = tensor.clone().try_into_data();
                data.map_err(|error| error.to_string())
            },
        };
        (self.show)(path, param.id, shown);
    }
}

struct Replacer {
    path: Vec<String>,
    values: BTreeMap<String, TensorData>,
}

impl ModuleMapper for Replacer {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(data) = self.values.remove(&self.path.join(".")) else {
            return param;
        };
        let (device, dtype, id) = (param.lazy_device(), data.dtype(), param.id);
        param.transform_for_load(Tensor::from_data(data, (&device, dtype)), id)
    }
}

struct Search {
    path: Vec<String>,
    adapters: HashSet<ParamId>,
    found: Option<String>,
}

impl ModuleVisitor for Search {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // Asked of the stored base: the value of an adapted weight would be composed.
        let trains = param.is_initialized() && param.base().is_require_grad();
        if trains && !self.adapters.contains(&param.id) {
            self.found.get_or_insert_with(|| self.path.join("."));
        }
    }
}
