//! Reading and changing what is attached to the weights of any module.
//!
//! A change is planned first, from what [`collect`] finds, so that every error is met before anything has changed;
//! [`edit`] then cannot fail.

use std::collections::HashMap;

use burn::module::{Module, ModuleVisitor, Param, Reparameterization, Reparameterizer};
use burn::tensor::{DType, Device, Tensor};

use super::vocabulary::TokenLayer;
use super::weight::{PeftWeight, REPARAMETERIZATION, Transfer};
use crate::layer::{LayerKind, WeightLayout, weight_dims};
use crate::nf4::Nf4Weight;

/// One float parameter of a model and what is attached to it.
#[derive(Debug)]
pub(super) struct Site {
    /// Path of the parameter, as in `model.layers.0.self_attn.q_proj.weight`: see [`Path::of_parameter`].
    pub path: String,
    /// Shape of the parameter as a dense one.
    pub shape: Vec<usize>,
    /// Dtype of the dense base, also of a packed one; unknown, and not asked for, while it is uninitialised.
    pub dtype: Option<DType>,
    pub device: Device,
    pub trainable: bool,
    /// What layer of Burn's it is the weight of, if it is that of one that an adapter can change.
    pub layer: Option<LayerKind>,
    /// Name of the type that holds it, as Burn's derive says it: `Linear`, `RmsNorm`, ...
    pub holder: String,
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

    /// The packed base, if there is one.
    pub fn nf4(&self) -> Option<&Nf4Weight> {
        self.state.as_ref()?.nf4.as_ref()
    }

    /// `[d_in, d_out]` of the weight of a layer, packed or not.
    ///
    /// # Panics
    ///
    /// Panics for a parameter of fewer than two axes.
    pub fn dims(&self) -> [usize; 2] {
        self.layout().dims(&self.shape)
    }

    /// Its name in its module as PyTorch has it, where Burn has another: of its norms.
    pub fn torch_name(&self) -> &str {
        let name = self.path.rsplit('.').next().unwrap_or(&self.path);
        let norms = [
            "BatchNorm",
            "GroupNorm",
            "InstanceNorm",
            "LayerNorm",
            "RmsNorm",
        ];
        match name {
            "gamma" if norms.contains(&self.holder.as_str()) => "weight",
            "beta" if norms.contains(&self.holder.as_str()) => "bias",
            name => name,
        }
    }

    /// How the weight is a matrix.
    pub fn layout(&self) -> WeightLayout {
        let attached = self.state.as_ref().map(|state| state.layout);
        let attached = attached.unwrap_or_default();
        self.layer.map_or(attached, LayerKind::layout)
    }

    /// What is attached to it, or what is to be filled.
    pub fn state_or_new(&self) -> PeftWeight {
        let new = || PeftWeight::new(&self.path, self.layout());
        self.state.clone().unwrap_or_else(new)
    }

    pub fn is_linear(&self) -> bool {
        self.layer == Some(LayerKind::Linear)
    }

    /// Whether it is the weight of a layer that targets name by its module.
    pub fn is_target(&self) -> bool {
        self.layer.is_some() && self.experts().is_none()
    }

    /// The layer as one that may have a row for each token.
    pub fn token_layer(&self) -> Option<TokenLayer<'_>> {
        let kind = self.layer?;
        matches!(kind, LayerKind::Linear | LayerKind::Embedding).then(|| TokenLayer {
            module: self.module(),
            kind,
            dims: self.dims(),
        })
    }

    /// How many experts it has the weights of.
    pub fn experts(&self) -> Option<usize> {
        match self.layer {
            Some(LayerKind::Experts(_)) => self.shape.first().copied(),
            _ => None,
        }
    }

    /// What the patterns of ranks and alphas see: the module of a layer, the whole path of a tensor of experts.
    pub fn target_path(&self) -> &str {
        match self.experts() {
            None => self.module(),
            Some(_) => &self.path,
        }
    }
}

/// Every float parameter of `module`, in its order, without initialising any.
pub(super) fn collect<M: Module>(module: &M) -> Vec<Site> {
    let _idle = Transfer::idle_afterwards();
    let mut collector = Collector::default();
    module.visit(&mut collector);
    collector.sites
}

/// What [`walk`] shows parameters to: a closure cannot be generic over their number of axes.
pub(super) trait See {
    /// A float parameter of the model itself, none of what is attached to one, with its path.
    fn see<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>);
}

/// Shows every float parameter of `module`, in its order.
pub(super) fn walk<M: Module>(module: &M, see: &mut impl See) {
    module.visit(&mut Walk {
        see,
        path: Path::default(),
        depth: 0,
    });
}

/// What begins the container of an enum's variant, as Burn's derive says it.
const ENUM: &str = "Enum:";

/// The modules around a parameter, and the parameter, outermost first: their names and containers, as Burn's derive says them.
#[derive(Default)]
struct Path(Vec<(String, String)>);

impl Path {
    fn enter(&mut self, name: &str, container: &str) {
        self.0.push((name.into(), container.into()));
    }

    fn exit(&mut self) {
        self.0.pop();
    }

    /// All names that are no variant of an enum.
    ///
    /// Burn's own paths have a segment for each variant, as in `layers.0.norm.Rms.gamma`. No file of PyTorch's has one, and no user names
    /// one. Two parameters never get the same path by this, since an enum has one variant at a time.
    fn of_parameter(&self) -> String {
        let names = self
            .0
            .iter()
            .filter(|(_, container)| !container.starts_with(ENUM));
        join(names)
    }

    /// As Burn has it.
    fn of_burn(&self) -> String {
        join(self.0.iter())
    }

    /// The name of the parameter, and of the type that holds it: `Linear`, `RmsNorm`, ...
    fn last(&self) -> (&str, &str) {
        let last = self.0.last().map_or(("", ""), |(name, container)| {
            (name.as_str(), container.as_str())
        });
        (last.0, last.1.strip_prefix("Struct:").unwrap_or(""))
    }
}

fn join<'a>(names: impl Iterator<Item = &'a (String, String)>) -> String {
    let names: Vec<&str> = names.map(|(name, _)| name.as_str()).collect();
    names.join(".")
}

struct Walk<'a, S> {
    see: &'a mut S,
    path: Path,
    /// How deep in reparameterizations.
    depth: usize,
}

impl<S: See> ModuleVisitor for Walk<'_, S> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.depth += usize::from(container == REPARAMETERIZATION);
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.depth -= usize::from(container == REPARAMETERIZATION);
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.depth == 0 {
            self.see.see(&self.path.of_parameter(), param);
        }
    }
}

#[derive(Default)]
struct Collector {
    path: Path,
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
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.path.exit();
        if container == REPARAMETERIZATION {
            self.depth -= 1;
            if let Transfer::Collected(state) = Transfer::Idle.swap()
                && let Some(site) = self.sites.last_mut()
            {
                if let Some(look) = state.look() {
                    site.shape = look.dims.into();
                    site.dtype = Some(look.dtype.into());
                }
                site.state = Some(*state);
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
        let (name, holder) = self.path.last();
        let layer = LayerKind::of(holder, name, D);
        self.sites.push(Site {
            path: self.path.of_parameter(),
            shape: match layer {
                Some(LayerKind::Linear) => weight_dims(&as_matrix(param)).to_vec(),
                _ => param.lazy_shape().to_vec(),
            },
            dtype: param.is_initialized().then(|| param.base().dtype()),
            device: param.lazy_device(),
            trainable: param.is_initialized() && param.base().is_require_grad(),
            layer,
            holder: holder.into(),
            state: None,
            foreign: None,
            foreign_params: 0,
        });
        Transfer::Collect.swap();
    }
}

/// What is given by the paths of parameters, by the paths that Burn gives a [`Reparameterizer`].
pub(super) fn by_burns_paths<M: Module, T>(
    module: &M,
    values: HashMap<String, T>,
) -> HashMap<String, T> {
    let mut variants = Variants::default();
    module.visit(&mut variants);
    let mut paths = variants.paths;
    let values = values.into_iter();
    values
        .map(|(path, value)| (paths.remove(&path).unwrap_or(path), value))
        .collect()
}

/// Burn's paths of the parameters inside of enums, by this crate's.
#[derive(Default)]
struct Variants {
    path: Path,
    paths: HashMap<String, String>,
}

impl ModuleVisitor for Variants {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, _param: &Param<Tensor<D>>) {
        let (path, burns) = (self.path.of_parameter(), self.path.of_burn());
        if path != burns {
            self.paths.insert(path, burns);
        }
    }
}

/// The same parameter, known to be a matrix.
pub(super) fn as_matrix<const D: usize>(param: &Param<Tensor<D>>) -> Param<Tensor<2>> {
    let param: &dyn std::any::Any = param;
    param
        .downcast_ref::<Param<Tensor<2>>>()
        .expect("asked for matrices only")
        .clone()
}

/// Gives the weights at these parameter paths a new state. Paths that `module` does not have are ignored.
pub(super) fn edit<M: Module>(module: M, states: HashMap<String, PeftWeight>) -> M {
    let states = by_burns_paths(&module, states);
    let _idle = Transfer::idle_afterwards();
    module.apply_reparameterization(Editor { states })
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
        let param = match state.as_ref().and_then(PeftWeight::look) {
            Some(look) => look.param(param.id, param.lazy_device()),
            None => param,
        };
        (param, state)
    }
}

/// Burn attaches the returned state where there is none, and where there is one puts the old one back, mapped: the old
/// one then gives way to the new one by itself.
pub(super) fn replace_next(state: &Option<PeftWeight>) {
    match state {
        Some(state) => Transfer::Replace(Box::new(state.clone())).swap(),
        None => Transfer::Idle.swap(),
    };
}
