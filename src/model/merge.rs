//! Taking adapters off a model: merged into its weights, or dropped.
//!
//! Burn has one way to remove a reparameterization, `materialize`, and it folds in every one of a module. What is to
//! stay packed is therefore told to step aside and attached again afterwards.

use std::collections::HashMap;

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Tensor};

use super::active::Active;
use super::dense_look::{mappers, restore_mappers};
use super::peft_model::{PeftModel, refuse_foreign};
use super::statistics::with_own_statistics;
use super::tied::TiedPart;
use super::traverse::{See, Site, collect, edit, walk};
use super::weight::{Materialize, NamedChange, PeftWeight};
use crate::adapter::{TrainedCopy, cast};
use crate::layer::{MergeReport, Nf4MergeReport, WeightLayout, requantize};
use crate::nf4::{Nf4Config, Nf4Weight};
use crate::{PeftError, Result};

/// Largest change of a weight, over its largest value, that is taken for the rounding of a change that is none.
const NO_CHANGE: f32 = 1e-6;

/// Name of what a bias is merged into, for the moment of a `materialize`.
const MERGED: &str = "merged";

impl<M: Module> PeftModel<M> {
    /// Merges the active adapters into dense weights and takes the plain module.
    ///
    /// A weight is computed in f32 and cast once, to its own dtype (for a packed one, the dtype it had before it was
    /// packed); the report gives the largest change made by a cast. An NF4 weight under an adapter becomes dense:
    /// quantising the sum again would lose most of the change. One without stays packed.
    ///
    /// # Errors
    ///
    /// As [`merged`](Self::merged), which keeps the model; here an error drops it.
    pub fn merge_and_unload(self) -> Result<(M, MergeReport)> {
        let (report, biases) = self.check_merge()?;
        let merged = Merged {
            packed: HashMap::new(),
            biases,
        };
        let module = remove(self.into_module(), PeftWeight::is_changed, merged)?;
        Ok((module, report))
    }

    /// The plain module with the active adapters merged, as [`merge_and_unload`](Self::merge_and_unload) gives it, beside this
    /// model, which keeps its weights: going on with the model is the unmerging, and exact. Unmerged weights are shared.
    ///
    /// # Errors
    ///
    /// [`PeftError::NotFinite`] with the path of a weight that would hold a NaN or an infinity, and [`PeftError::Overflow`] where only its
    /// dtype makes the sum infinite;
    /// [`PeftError::Config`] while the rows of a batch have adapters of their own, for a bias of `B` on a layer without a bias, and
    /// for an adapter of PEFT on a convolution of several groups;
    /// [`PeftError::ForeignReparameterization`], as Burn would fold that one in too.
    pub fn merged(&self) -> Result<(M, MergeReport)> {
        let mut own = self.clone();
        own.module = own.module.map(with_own_statistics);
        own.merge_and_unload()
    }

    /// Merges the active adapters and takes the plain module with its packed weights packed: those under an adapter are
    /// quantised again with `config`, which keeps little of a small change. The reports say how much, by module path.
    ///
    /// A change below about 2 % of a weight falls between two codes and is lost almost whole; prefer
    /// [`merge_and_unload`](Self::merge_and_unload) or an unmerged adapter. Dense weights are merged as there.
    ///
    /// # Errors
    ///
    /// As [`merged`](Self::merged), which keeps the model; here an error drops it.
    pub fn merge_into_nf4(self, config: &Nf4Config) -> Result<(M, Vec<(String, Nf4MergeReport)>)> {
        let (_, biases) = self.check_merge()?;
        let mut requantizer = Requantizer {
            states: changed_states(self.module()),
            config,
            packed: HashMap::new(),
            reports: Vec::new(),
            result: Ok(()),
        };
        walk(self.module(), &mut requantizer);
        requantizer.result?;
        let merged = Merged {
            packed: requantizer.packed,
            biases,
        };
        let dense = |state: &PeftWeight| state.is_changed() && state.nf4.is_none();
        let module = remove(self.into_module(), dense, merged)?;
        Ok((module, requantizer.reports))
    }

    /// Removes all adapters and takes the module as it was before, packed weights packed.
    ///
    /// # Errors
    ///
    /// [`PeftError::ForeignReparameterization`], as Burn would fold that one in; the model is lost, keep a clone.
    pub fn unload(self) -> Result<M> {
        remove(self.into_module(), |_| false, Merged::default())
    }

    /// A clone with its adapters off, as the reference policy of a model whose training has not begun: only where the
    /// active adapters change nothing yet. Afterwards, or from a trained adapter, take [`reference`](Self::reference).
    ///
    /// Composes each adapted weight once; a change up to 10⁻⁶ of the weight's largest value counts as none.
    ///
    /// # Errors
    ///
    /// [`PeftError::NotTheBase`] with the path of a weight that an adapter changes; [`PeftError::Config`] for an adapter of PEFT on
    /// a convolution of several groups, whose change is none of the weight.
    pub fn base_reference(&self) -> Result<Self> {
        self.refuse_rows()?;
        collect(self.module()).iter().try_for_each(refuse_mixing)?;
        let mut changes = LargestChange {
            states: changed_states(self.module()),
            result: Ok(()),
        };
        walk(self.module(), &mut changes);
        changes.result?;
        Ok(self.disabled().reference())
    }

    fn refuse_rows(&self) -> Result<()> {
        match self.active() {
            Active::Sum(_) => Ok(()),
            Active::Rows(rows) => Err(PeftError::config(
                "active adapters",
                format!("{} rows of a batch", rows.len()),
                "one choice for the whole batch",
            )),
        }
    }

    /// Meets every error of a merge, measures what casts will change, and finds the biases that it makes, by their paths.
    fn check_merge(&self) -> Result<(MergeReport, HashMap<String, TrainedCopy>)> {
        self.refuse_rows()?;
        let sites = collect(self.module());
        sites.iter().try_for_each(refuse_foreign)?;
        sites.iter().try_for_each(refuse_mixing)?;
        sites.iter().try_for_each(refuse_split)?;
        let mut shifts: HashMap<String, Tensor<1>> = HashMap::new();
        for site in &sites {
            let state = site.state.as_ref();
            let Some(shift) = state.and_then(shift) else {
                continue;
            };
            let bias = format!("{}.bias", site.module());
            if !sites.iter().any(|site| site.path == bias) {
                return Err(PeftError::config(
                    format!("bias of B of `{}`", site.module()),
                    "true",
                    "a layer that has a bias, to merge it into",
                ));
            }
            shifts.insert(bias, shift);
        }
        let mut check = Check {
            states: changed_states(self.module()),
            shifts,
            biases: HashMap::new(),
            max_cast_error: 0.0,
            result: Ok(()),
        };
        walk(self.module(), &mut check);
        check.result?;
        let max_cast_error = check.max_cast_error;
        Ok((MergeReport { max_cast_error }, check.biases))
    }
}

/// A change that sees the channels of all groups of a convolution is no change of its weight.
fn refuse_mixing(site: &Site) -> Result<()> {
    let state = site.state.as_ref();
    match state.is_some_and(|state| state.mixes_groups(&site.shape)) {
        false => Ok(()),
        true => Err(PeftError::config(
            format!("groups of `{}`", site.module()),
            "a change that sees the channels of all",
            "a change of the weight, which has the channels of one group",
        )),
    }
}

/// What changes only the lookup or only the head of an embedding that both share cannot become one weight.
fn refuse_split(site: &Site) -> Result<()> {
    let state = site.state.as_ref();
    match state.is_some_and(|state| state.is_split() && state.is_head()) {
        false => Ok(()),
        true => Err(PeftError::config(
            format!("merge of `{}`", site.module()),
            "changes of the lookup alone, or of the output head alone, which share this weight",
            "`ensure_weight_tying` on the adapter, or a model whose head has a weight of its own: load the base into one with \
             `BaseOptions::with_tied`, and the adapter onto it",
        )),
    }
}

/// What the active adapters' biases of `B` add to the bias of the layer.
fn shift(state: &PeftWeight) -> Option<Tensor<1>> {
    let loras = state.loras().into_iter();
    let shifts = loras.filter_map(|(lora, weight)| Some(lora.shift()?.mul_scalar(weight)));
    let shifts = shifts.map(|shift| cast(shift, FloatDType::F32));
    shifts.reduce(|one, other| one + other)
}

/// The states of the parameters that adapters change, by their paths.
pub(super) fn changed_states<M: Module>(module: &M) -> HashMap<String, PeftWeight> {
    let sites = collect(module).into_iter();
    let states = sites.filter_map(|site| Some((site.path, site.state?)));
    states.filter(|(_, state)| state.is_changed()).collect()
}

/// Merges every parameter for a look at it.
struct Check {
    states: HashMap<String, PeftWeight>,
    shifts: HashMap<String, Tensor<1>>,
    biases: HashMap<String, TrainedCopy>,
    max_cast_error: f32,
    result: Result<()>,
}

impl See for Check {
    fn see<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        let (state, shift) = (self.states.get(path), self.shifts.get(path));
        if self.result.is_err() || (state.is_none() && shift.is_none()) {
            return;
        }
        let base = param.base();
        let bare = PeftWeight::new(path, WeightLayout::Matrix);
        let state = state.unwrap_or(&bare);
        let dtype = state.effective_dtype(base.dtype());
        let mut exact = state.effective(base).detach();
        if let Some(shift) = shift {
            exact = exact + shift.clone().detach().unsqueeze();
            let bias = cast(exact.clone(), dtype);
            self.biases.insert(path.to_owned(), TrainedCopy::new(bias));
        }
        let stored = cast(cast(exact.clone(), dtype), FloatDType::F32);
        let count = stored.shape().num_elements();
        let checked = Nf4Weight::check_finite(path, stored.clone().reshape([1, count]));
        self.result = checked.map_err(|error| overflow(error, exact.clone(), dtype));
        self.max_cast_error = self.max_cast_error.max(largest(stored - exact));
    }
}

/// The error of a value that is infinite once it is cast to `dtype`, in place of one that says only that it is not finite.
fn overflow<const D: usize>(error: PeftError, exact: Tensor<D>, dtype: FloatDType) -> PeftError {
    let PeftError::NotFinite { tensor, index, .. } = &error else {
        return error;
    };
    let count = exact.shape().num_elements();
    let value = exact.reshape([count]).narrow(0, *index, 1);
    match value.into_scalar::<f32>() {
        value if value.is_finite() => PeftError::Overflow {
            tensor: tensor.clone(),
            index: *index,
            value: value.into(),
            dtype: format!("{dtype:?}"),
            way_out: "load the base in F32, or in BF16, which has the range of F32",
        },
        _ => error,
    }
}

/// Quantises the packed weights again with their changes.
struct Requantizer<'a> {
    states: HashMap<String, PeftWeight>,
    config: &'a Nf4Config,
    packed: HashMap<String, Nf4Weight>,
    reports: Vec<(String, Nf4MergeReport)>,
    result: Result<()>,
}

impl See for Requantizer<'_> {
    fn see<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        let Some(state) = self.states.get(path).filter(|state| state.nf4.is_some()) else {
            return;
        };
        if self.result.is_err() {
            return;
        }
        let base = param.base();
        let matrix = |weight: Tensor<D>| WeightLayout::Matrix.to_matrix(weight);
        let merged = matrix(state.effective(base.clone()).detach());
        match requantize(path, matrix(state.base(base)), merged, self.config) {
            Ok((weight, report)) => {
                self.packed.insert(path.to_owned(), weight);
                let module = path.strip_suffix(".weight").unwrap_or(path);
                self.reports.push((module.to_owned(), report));
            }
            Err(error) => self.result = Err(error),
        }
    }
}

/// Whether every change is none.
struct LargestChange {
    states: HashMap<String, PeftWeight>,
    result: Result<()>,
}

impl See for LargestChange {
    fn see<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        let Some(state) = self.states.get(path).filter(|_| self.result.is_ok()) else {
            return;
        };
        let base = param.base();
        let change = (state.effective(base.clone()) - state.base(base.clone())).detach();
        let shift = shift(state).map_or(0.0, largest);
        let of_head = match state.is_split() {
            true => {
                let base = WeightLayout::Matrix.to_matrix(base.clone());
                largest((state.effective_head(base.clone()) - state.base(base)).detach())
            }
            false => 0.0,
        };
        let change = largest(change).max(shift).max(of_head);
        let most = largest(state.base(base));
        // Of a NaN neither is true.
        if change <= NO_CHANGE * most {
            return;
        }
        self.result = Err(PeftError::NotTheBase {
            path: path.to_owned(),
            change,
        });
    }
}

/// The largest absolute value; 0 of nothing.
fn largest<const D: usize>(x: Tensor<D>) -> f32 {
    match x.shape().num_elements() {
        0 => 0.0,
        _ => x.abs().max().into_scalar::<f32>(),
    }
}

/// Folds in whatever is attached to parameters. Those that were packed are as they were before they were packed.
pub(super) fn materialize<M: Module>(module: M) -> M {
    let mappers = mappers(&module);
    restore_mappers(module.materialize(), mappers)
}

/// What a merge has computed beforehand, by parameter paths.
#[derive(Default)]
struct Merged {
    packed: HashMap<String, Nf4Weight>,
    biases: HashMap<String, TrainedCopy>,
}

/// Removes every state of this crate; a weight that `fold` does not want folded keeps its base, dense or packed, or gets what
/// `merged` has for its path.
fn remove<M: Module>(
    module: M,
    fold: impl Fn(&PeftWeight) -> bool,
    mut merged: Merged,
) -> Result<M> {
    let sites = collect(&module);
    sites.iter().try_for_each(refuse_foreign)?;
    let mut last = HashMap::new();
    let mut again = HashMap::new();
    for site in sites {
        let mut state = site.state_or_new();
        if let Some(bias) = merged.biases.remove(&site.path) {
            state.adapters = vec![NamedChange {
                name: MERGED.into(),
                change: bias.into(),
                part: TiedPart::Both,
                trainable: false,
            }];
            state.active = Active::one(MERGED);
            state.enabled = true;
            state.materialize = Some(Materialize::Merge);
            last.insert(site.path, state);
            continue;
        }
        if site.state.is_none() {
            continue;
        }
        state.materialize = Some(match fold(&state) {
            true => Materialize::Merge,
            false => {
                if let Some(nf4) = merged
                    .packed
                    .remove(&site.path)
                    .or_else(|| state.nf4.clone())
                {
                    let mut bare = PeftWeight::new(&site.path, state.layout);
                    bare.pack(nf4, state.dtype, state.mapper.clone());
                    again.insert(site.path.clone(), bare);
                }
                Materialize::KeepBase
            }
        });
        last.insert(site.path, state);
    }
    let mappers = mappers(&module);
    let module = edit(module, last).materialize();
    Ok(edit(restore_mappers(module, mappers), again))
}
