//! Giving the parameters of a model other values, dense or packed, while what is attached to them stays.

use std::collections::HashMap;

use burn::module::{Module, Param, Reparameterizer};
use burn::tensor::{Device, FloatDType, Shape, Tensor};

use super::dense_look::mapper_of;
use super::peft_model::refuse_foreign;
use super::target::{TargetConfig, TargetReport};
use super::traverse::{See, as_matrix, by_burns_paths, collect, replace_next, walk};
use super::vocabulary::{TokenLayer, output_head};
use super::weight::{PeftWeight, Transfer};
use crate::layer::{LayerKind, loader_transposes};
use crate::nf4::Nf4Weight;
use crate::{PeftError, Result};

/// A float parameter that is to get other values.
#[derive(Clone, Debug)]
pub(crate) struct BaseParameter {
    /// Its path.
    pub path: String,
    /// Its name in its module, as PyTorch has it.
    pub torch_name: String,
    /// Its shape as a dense one: `[d_in, d_out]` of a linear layer.
    pub shape: Vec<usize>,
    /// What layer it is the weight of, if it is that of one that an adapter can change.
    pub layer: Option<LayerKind>,
    /// Whether Burn itself transposes what is loaded into it: a linear layer of column layout.
    pub loader_transposes: bool,
    /// Where it lies.
    pub device: Device,
}

impl BaseParameter {
    /// Path of its module.
    pub fn module(&self) -> &str {
        self.path.rsplit_once('.').map_or("", |(module, _)| module)
    }

    /// Whether it is the weight of a linear layer, which PyTorch holds transposed.
    pub fn is_linear(&self) -> bool {
        self.layer == Some(LayerKind::Linear)
    }

    /// The layer as one that may have a row for each token.
    pub fn token_layer(&self) -> Option<TokenLayer<'_>> {
        let kind = self.layer?;
        matches!(kind, LayerKind::Linear | LayerKind::Embedding).then(|| TokenLayer {
            module: self.module(),
            kind,
            dims: [self.shape[0], self.shape[1]],
        })
    }
}

/// Other values for a parameter.
pub(crate) enum NewBase {
    /// Dense ones, flat, and the shape that they are loaded in.
    Dense(Tensor<1>, Vec<usize>),
    /// Packed ones of a linear layer, and the dtype of what they compose to.
    Packed(Nf4Weight, FloatDType),
}

/// The float parameters of `module`, in its order, without initialising any.
///
/// # Errors
///
/// [`PeftError::AlreadyQuantized`] and [`PeftError::ForeignReparameterization`] for one that cannot get other values.
pub(crate) fn base_parameters<M: Module>(module: &M) -> Result<Vec<BaseParameter>> {
    let mut parameters = Vec::new();
    for site in collect(module) {
        refuse_foreign(&site)?;
        if site.nf4().is_some() {
            return Err(PeftError::AlreadyQuantized { path: site.path });
        }
        parameters.push(BaseParameter {
            torch_name: site.torch_name().to_owned(),
            layer: site.layer,
            path: site.path,
            shape: site.shape,
            loader_transposes: false,
            device: site.device,
        });
    }
    walk(module, &mut Loaders(&mut parameters, 0));
    Ok(parameters)
}

/// Notes which parameters are transposed by their loaders; the second field counts those that were seen.
struct Loaders<'a>(&'a mut [BaseParameter], usize);

impl See for Loaders<'_> {
    fn see<const D: usize>(&mut self, _path: &str, param: &Param<Tensor<D>>) {
        if let Some(parameter) = self.0.get_mut(self.1)
            && parameter.is_linear()
        {
            parameter.loader_transposes = loader_transposes(&as_matrix(param));
        }
        self.1 += 1;
    }
}

/// The linear layers among `parameters` that `targets` choose; the output head is the layer `head`, or found without a name.
///
/// # Errors
///
/// Those of the targets.
pub(crate) fn choose_linear(
    parameters: &[BaseParameter],
    head: Option<&str>,
    targets: &TargetConfig,
) -> Result<TargetReport> {
    let linear = parameters.iter().filter(|parameter| parameter.is_linear());
    let modules: Vec<String> = linear
        .map(|parameter| parameter.module().to_owned())
        .collect();
    let layers = parameters.iter().filter_map(BaseParameter::token_layer);
    let head = output_head(&layers.collect::<Vec<_>>(), head);
    targets.compile(head)?.resolve(&modules)
}

/// Gives the parameters at these paths other values, which fit them. Adapters stay, and so do ids and whether a parameter
/// requires a gradient; none is initialised that was not.
pub(crate) fn replace_bases<M: Module>(module: M, bases: HashMap<String, NewBase>) -> M {
    let sites = collect(&module).into_iter();
    let states = sites
        .filter(|site| matches!(bases.get(&site.path), Some(NewBase::Packed(..))))
        .map(|site| (site.path.clone(), site.state_or_new()))
        .collect();
    let mut bases = by_burns_paths(&module, bases);
    let states = by_burns_paths(&module, states);
    let _idle = Transfer::idle_afterwards();
    module.apply_reparameterization(Replacer {
        bases: &mut bases,
        states,
    })
}

struct Replacer<'a> {
    bases: &'a mut HashMap<String, NewBase>,
    states: HashMap<String, PeftWeight>,
}

impl Reparameterizer for Replacer<'_> {
    type Reparam = PeftWeight;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<PeftWeight>) {
        let (values, state) = match self.bases.remove(path) {
            None => {
                replace_next(&None);
                return (param, None);
            }
            Some(NewBase::Dense(values, shape)) => (shaped(values, shape), None),
            Some(NewBase::Packed(weight, dtype)) => {
                let mut state = self.states.remove(path);
                let look = state
                    .as_mut()
                    .map(|state| state.pack(weight, dtype, mapper_of(&param)));
                replace_next(&state);
                let param = match look {
                    Some(look) => look.param(param.id, param.lazy_device()),
                    None => param,
                };
                return (param, state);
            }
        };
        replace_next(&state);
        let id = param.id;
        // As Burn loads a record: the old value is not asked for, and a loader of its own is heard.
        (param.transform_for_load(values, id), state)
    }
}

/// Flat values in a shape of as many.
fn shaped<const D: usize>(values: Tensor<1>, shape: Vec<usize>) -> Tensor<D> {
    let shape = Shape::from(shape);
    match shape.num_elements() {
        // A side of zero means another one to Burn's `reshape`.
        0 => Tensor::zeros(shape, (&values.device(), values.dtype())),
        _ => values.reshape(shape),
    }
}
