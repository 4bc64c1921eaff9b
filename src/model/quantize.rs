//! Packing the weights of a whole model, one at a time.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, Param, Reparameterizer};
use burn::tensor::{DType, Tensor};

use super::dense_look::{into_matrix, of_matrix};
use super::peft_model::refuse_foreign;
use super::target::TargetReport;
use super::traverse::{See, Site, by_burns_paths, replace_next, walk};
use super::weight::{PeftWeight, Transfer};
use crate::nf4::{Nf4Config, Nf4Weight};
use crate::{PeftError, Result};

/// What packing did to a model.
#[derive(Clone, Debug)]
pub struct QuantizeReport {
    /// What was chosen and why.
    pub targets: TargetReport,
    /// Weights packed.
    pub weights: usize,
    /// Bytes of the dense weights.
    pub dense_bytes: usize,
    /// Bytes of the packed ones.
    pub packed_bytes: usize,
}

/// Packs the chosen weights. On an error the module comes back as it was.
pub(super) fn quantize<M: Module>(
    module: M,
    sites: Vec<Site>,
    targets: &TargetReport,
    config: &Nf4Config,
) -> (M, Result<QuantizeReport>) {
    let matched: HashSet<&str> = targets
        .matched
        .iter()
        .map(|target| target.path.as_str())
        .collect();
    let chosen: Vec<Site> = sites
        .into_iter()
        .filter(|site| matched.contains(site.module()))
        .collect();
    if let Err(error) = check(&module, &chosen) {
        return (module, Err(error));
    }
    let mut packed = Ok((0, 0, 0));
    let states = chosen
        .into_iter()
        .map(|site| (site.path.clone(), site.state_or_new()));
    let states = by_burns_paths(&module, states.collect());
    let _idle = Transfer::idle_afterwards();
    let module = module.apply_reparameterization(Packer {
        states,
        config,
        packed: &mut packed,
    });
    let report = packed.map(|(weights, dense_bytes, packed_bytes)| QuantizeReport {
        targets: targets.clone(),
        weights,
        dense_bytes,
        packed_bytes,
    });
    (module, report)
}

/// Meets every error before anything changes: what is attached, and values that are not finite.
fn check<M: Module>(module: &M, chosen: &[Site]) -> Result<()> {
    for site in chosen {
        refuse_foreign(site)?;
        if site.state.as_ref().is_some_and(|state| state.nf4.is_some()) {
            return Err(PeftError::AlreadyQuantized {
                path: site.path.clone(),
            });
        }
        if let Some(dtype) = site.dtype
            && !matches!(
                dtype,
                DType::F32 | DType::F16 | DType::BF16 | DType::F64 | DType::Flex32
            )
        {
            return Err(PeftError::DType {
                tensor: site.path.clone(),
                expected: "a float".into(),
                found: format!("{dtype:?}"),
            });
        }
    }
    let mut finite = Finite {
        chosen: chosen.iter().map(|site| site.path.as_str()).collect(),
        result: Ok(()),
    };
    walk(module, &mut finite);
    finite.result
}

struct Finite<'a> {
    chosen: HashSet<&'a str>,
    result: Result<()>,
}

impl See for Finite<'_> {
    fn see<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        if self.result.is_ok() && param.is_initialized() && self.chosen.contains(path) {
            let base = param.base().without_autodiff();
            let dims = base.dims();
            let weight: Tensor<2> = base.reshape([dims[0], dims[D - 1]]);
            self.result = Nf4Weight::check_finite(path, weight);
        }
    }
}

struct Packer<'a> {
    states: HashMap<String, PeftWeight>,
    config: &'a Nf4Config,
    packed: &'a mut Result<(usize, usize, usize)>,
}

impl Reparameterizer for Packer<'_> {
    type Reparam = PeftWeight;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<PeftWeight>) {
        let Some(mut state) = self.states.remove(path).filter(|_| self.packed.is_ok()) else {
            replace_next(&None);
            return (param, None);
        };
        // Consuming the parameter initialises it if need be, and leaves this the only handle to its tensor.
        let (id, dense, mapper) = into_matrix(param).consume();
        let (device, dtype) = (dense.device(), dense.dtype());
        let bytes = dense.shape().num_elements() * dtype.size();
        match (
            Nf4Weight::quantize(path, dense.clone(), self.config),
            &mut *self.packed,
        ) {
            (Ok(nf4), Ok((weights, dense_bytes, packed_bytes))) => {
                *weights += 1;
                *dense_bytes += bytes;
                *packed_bytes += nf4.num_bytes();
                let look = state.pack(nf4, dtype.into(), mapper);
                drop(dense);
                let state = Some(state);
                replace_next(&state);
                (look.param(id, device), state)
            }
            (Err(error), packed) => {
                *packed = Err(error);
                replace_next(&None);
                let dense = Param::from_mapped_value(id, dense, mapper);
                (of_matrix(dense), None)
            }
            (Ok(_), Err(_)) => unreachable!("only entered before an error"),
        }
    }
}
