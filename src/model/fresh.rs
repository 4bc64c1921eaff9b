//! Fresh changes for the parameters that an adapter goes to.

use std::collections::{BTreeMap, HashMap};

#[cfg(feature = "faer")]
use burn::module::Module;
use burn::module::Param;
use burn::tensor::{DType, Device, FloatDType, Tensor};
use half::{bf16, f16};

use super::tied::Wanted;
#[cfg(feature = "faer")]
use super::traverse::walk;
use super::traverse::{See, Site};
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
#[cfg(feature = "faer")]
pub(super) fn dense_weights<'a, M: Module>(
    module: &M,
    sites: impl IntoIterator<Item = &'a Site>,
) -> HashMap<String, Tensor<2>> {
    let mut weights = Weights::of(sites);
    if !weights.sites.is_empty() {
        walk(module, &mut weights);
    }
    weights.found
}

/// Collects dense base weights as matrices `[d_in, d_out]`, by their paths, shared. Packed weights are left out.
pub(super) struct Weights<'a> {
    sites: HashMap<&'a str, &'a Site>,
    pub found: HashMap<String, Tensor<2>>,
}

impl<'a> Weights<'a> {
    /// To collect those at `sites`.
    pub fn of(sites: impl IntoIterator<Item = &'a Site>) -> Self {
        let sites = sites.into_iter().filter(|site| site.nf4().is_none());
        let sites = sites.map(|site| (site.path.as_str(), site));
        Self {
            sites: sites.collect(),
            found: HashMap::new(),
        }
    }
}

impl Wanted for Weights<'_> {
    fn wants(&self, path: &str) -> bool {
        self.sites.contains_key(path)
    }
}

impl See for Weights<'_> {
    fn see<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        if let Some(site) = self.sites.get(path) {
            let weight = site.layout().to_matrix(param.base());
            self.found.insert(path.to_owned(), weight);
        }
    }
}

/// Makes copies of parameters and of rows of embeddings, by their paths; a packed weight is unpacked.
pub(super) struct Copies<'a> {
    copied: HashMap<&'a str, &'a Site>,
    rows: &'a BTreeMap<String, (&'a Site, Vec<usize>)>,
    dtype: FloatDType,
    pub changes: Result<Vec<(String, Change)>>,
}

impl<'a> Copies<'a> {
    /// To copy the parameters at `copied`, and the rows of the embeddings at `rows`, in `dtype`.
    pub fn new(
        copied: &[&'a Site],
        rows: &'a BTreeMap<String, (&'a Site, Vec<usize>)>,
        dtype: FloatDType,
    ) -> Self {
        let copied = copied.iter().map(|site| (site.path.as_str(), *site));
        Self {
            copied: copied.collect(),
            rows,
            dtype,
            changes: Ok(Vec::new()),
        }
    }
}

impl Wanted for Copies<'_> {
    fn wants(&self, path: &str) -> bool {
        self.copied.contains_key(path) || self.rows.contains_key(path)
    }
}

impl See for Copies<'_> {
    fn see<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        if let Some(site) = self.copied.get(path) {
            let value = param.base();
            let (device, from) = (value.device(), value.dtype());
            // It lives as long as its model: keep it out of the pools of transient tensors. Where nothing is cast, it
            // shares the base's memory until the first step.
            let copy = device.memory_persistent_allocations(value, |value| {
                let value = site.state_or_new().base(value);
                cast_finite(path, value, from, self.dtype)
            });
            match (copy, &mut self.changes) {
                (Ok(copy), Ok(changes)) => {
                    changes.push((path.to_owned(), TrainedCopy::new(copy).into()));
                }
                (Err(error), changes @ Ok(_)) => *changes = Err(error),
                (_, Err(_)) => {}
            }
        }
        if let (Some((site, indices)), Ok(changes)) = (self.rows.get(path), &mut self.changes) {
            let base = param.base();
            let from = base.dtype();
            // Of a dense table only the rows are cast.
            let weight = match (site.nf4(), from) {
                (Some(_), _) | (_, DType::QFloat(_)) => site.state_or_new().base(base),
                _ => base,
            };
            let weight = weight.reshape(site.dims());
            let weight = match site.is_linear() {
                true => weight.transpose(),
                false => weight,
            };
            let count = weight.dims()[0];
            let rows = TrainedRows::of(&weight, indices).and_then(|rows| {
                let values = cast_finite(path, rows.rows.val(), from, self.dtype)?;
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

/// The values of the parameter at `path`, or of a part of it, in `dtype`; the parameter has the type `from`.
///
/// # Errors
///
/// [`PeftError::Overflow`] if a finite value is infinite in `dtype`.
fn cast_finite<const D: usize>(
    path: &str,
    values: Tensor<D>,
    from: DType,
    dtype: FloatDType,
) -> Result<Tensor<D>> {
    let is_infinite = |value: f32| match dtype {
        FloatDType::F16 => f16::from_f32(value).is_infinite(),
        FloatDType::BF16 => bf16::from_f32(value).is_infinite(),
        _ => false,
    };
    let is_half = matches!(dtype, FloatDType::F16 | FloatDType::BF16);
    if is_half && from != dtype.into() && values.shape().num_elements() > 0 {
        let detached = values.clone().detach();
        let ends = [detached.clone().max(), detached.clone().min()];
        if ends
            .into_iter()
            .any(|end| is_infinite(end.into_scalar::<f32>()))
        {
            let data = detached.into_data();
            let mut values = data.iter::<f32>().enumerate();
            if let Some((index, value)) =
                values.find(|(_, value)| value.is_finite() && is_infinite(*value))
            {
                return Err(PeftError::Overflow {
                    tensor: path.to_owned(),
                    index,
                    value: value.into(),
                    dtype: format!("{dtype:?}"),
                    way_out: "choose F32, or BF16, which has the range of F32, for `LoraConfig::dtype`",
                });
            }
        }
    }
    Ok(cast(values, dtype))
}
