//! Fresh changes for the parameters that an adapter goes to.

use std::collections::{BTreeMap, HashMap};

use burn::module::{Module, Param};
use burn::tensor::{Device, FloatDType, Tensor};

use super::traverse::{See, Site, walk};
use crate::adapter::{Change, Lora, LoraConfig, Slices, TrainedCopy, TrainedRows, cast};
use crate::layer::{DenseMap, LayerKind, Nf4Map};
use crate::{PeftError, Result};

/// A fresh low-rank change for the weight at `site`, on `device`. `dense` has the weight as a matrix if it is dense and the
/// change needs it.
pub(super) fn fresh(
    config: &LoraConfig,
    site: &Site,
    device: &Device,
    dense: &HashMap<String, Tensor<2>>,
) -> Result<Lora> {
    let bias = None;
    let dims = site.dims();
    if site.layer == Some(LayerKind::Embedding) {
        let lora = config.init_embedding(dims, device)?;
        return match config.dora {
            false => Ok(lora),
            true => {
                let weight = dense[&site.path].clone();
                config.with_norms(lora, &DenseMap { weight, bias })
            }
        };
    }
    if let Some(experts) = site.experts() {
        let of_all = [
            ("dora", config.dora),
            ("bias of B", config.bias),
            ("dropout", config.dropout > 0.0),
            ("slices", config.slices != Slices::Whole),
            ("init", config.init.folds()),
        ];
        return match of_all.into_iter().find(|(_, has)| *has) {
            None => {
                let each = Slices::equal(vec![true; experts]);
                let config = config.clone().with_slices(each);
                config.init(dims[0], dims[1], device)
            }
            Some((name, _)) => Err(PeftError::config(
                format!("{name} of `{}`", site.path),
                "set",
                "plain LoRA, without dropout, on a tensor of experts",
            )),
        };
    }
    match site.nf4() {
        _ if !config.needs_weight() => config.init(dims[0], dims[1], device),
        Some(weight) => config.init_on(&Nf4Map { weight, bias }, dims, device),
        None => {
            let weight = dense[&site.path].clone();
            config.init_on(&DenseMap { weight, bias }, dims, device)
        }
    }
}

/// The dense base weights at these sites as matrices `[d_in, d_out]`, by their paths, shared; initialises those that are not
/// yet. Packed weights are left out.
pub(super) fn dense_weights<'a, M: Module>(
    module: &M,
    sites: impl IntoIterator<Item = &'a Site>,
) -> HashMap<String, Tensor<2>> {
    struct Weights<'a> {
        sites: HashMap<&'a str, &'a Site>,
        found: HashMap<String, Tensor<2>>,
    }

    impl See for Weights<'_> {
        fn see<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
            if let Some(site) = self.sites.get(path) {
                let weight = site.layout().to_matrix(param.base());
                self.found.insert(path.to_owned(), weight);
            }
        }
    }

    let sites = sites.into_iter().filter(|site| site.nf4().is_none());
    let sites = sites.map(|site| (site.path.as_str(), site));
    let mut weights = Weights {
        sites: sites.collect(),
        found: HashMap::new(),
    };
    if !weights.sites.is_empty() {
        walk(module, &mut weights);
    }
    weights.found
}

/// Copies of the parameters at `copied` in `dtype`, and of the rows of the embeddings at `rows`, by their paths; a packed weight
/// is unpacked.
pub(super) fn copies<M: Module>(
    module: &M,
    copied: &[&Site],
    rows: &BTreeMap<String, (&Site, Vec<usize>)>,
    dtype: FloatDType,
) -> Result<Vec<(String, Change)>> {
    struct Copies<'a> {
        copied: HashMap<&'a str, &'a Site>,
        rows: &'a BTreeMap<String, (&'a Site, Vec<usize>)>,
        dtype: FloatDType,
        changes: Result<Vec<(String, Change)>>,
    }

    impl See for Copies<'_> {
        fn see<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
            if let Some(site) = self.copied.get(path) {
                let value = param.base();
                let device = value.device();
                // It lives as long as its model: keep it out of the pools of transient tensors. Where nothing is cast, it
                // shares the base's memory until the first step.
                let copy = device.memory_persistent_allocations(value, |value| {
                    cast(site.state_or_new().base(value), self.dtype)
                });
                let copy = TrainedCopy::new(copy).into();
                if let Ok(changes) = &mut self.changes {
                    changes.push((path.to_owned(), copy));
                }
            }
            if let (Some((site, indices)), Ok(changes)) = (self.rows.get(path), &mut self.changes) {
                let weight = site.state_or_new().base(param.base()).reshape(site.dims());
                let weight = match site.is_linear() {
                    true => weight.transpose(),
                    false => weight,
                };
                let count = weight.dims()[0];
                let rows = TrainedRows::of(&weight, indices).and_then(|rows| {
                    let values = cast(rows.rows.val(), self.dtype);
                    TrainedRows::with_rows(values, indices, count)
                });
                let rows = rows.map(|rows| match site.is_linear() {
                    true => rows.of_head(),
                    false => rows,
                });
                match rows {
                    Ok(rows) => changes.push((path.to_owned(), rows.into())),
                    Err(source) => {
                        self.changes = Err(PeftError::InModule {
                            path: site.module().to_owned(),
                            source: Box::new(source),
                        });
                    }
                }
            }
        }
    }

    let mut seen = Copies {
        copied: copied
            .iter()
            .map(|site| (site.path.as_str(), *site))
            .collect(),
        rows,
        dtype,
        changes: Ok(Vec::new()),
    };
    if !copied.is_empty() || !rows.is_empty() {
        walk(module, &mut seen);
    }
    seen.changes
}
