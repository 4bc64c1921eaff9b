//! What is attached to one parameter of a model: a packed base, and adapters by name.
//!
//! The effective weight is `W + Σ_i w_i·Δ_i` of the active adapters, with `W` dense or packed. It is a
//! [`Reparameterization`] of Burn, so a model that knows nothing of it computes right: `param.val()` composes the dense
//! effective weight. [`PeftForward`](super::PeftForward) computes the same without ever forming it.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use burn::module::{
    Devices, Module, ModuleMapper, ModuleVisitor, Param, ParamMapper, Reparameterization,
};
use burn::tensor::{DType, Device, FloatDType, Tensor};

use super::active::Active;
use super::compose::ComposeOptions;
use super::dense_look::{DenseLook, float_or};
use crate::adapter::{Change, FrozenMap, Lora, cast, forward_rows, forward_sum, merge_sum};
use crate::layer::{DenseMap, Nf4Map, WeightLayout};
use crate::nf4::Nf4Weight;

/// Name under which Burn's traversals find the packed base: `weight.peft.nf4.codes`.
pub(super) const NF4: &str = "nf4";

/// Container that traversals are told of what is attached to a weight: the packed base and each adapter.
pub(super) const CONTAINER: &str = "PeftWeight";

/// Container that Burn names when it traverses a reparameterization.
pub(super) const REPARAMETERIZATION: &str = "Reparameterization";

/// How forward passes have read a weight with something attached to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// No forward pass has read it yet.
    Unused,
    /// Always factored and packed, by [`PeftForward`](super::PeftForward): no dense weight was formed.
    Factored,
    /// At least once by Burn's own layers, which compose a dense effective weight and, in training, its gradient.
    Composed,
}

/// One adapter's change of one parameter; an adapter may have changes of several kinds in one place.
#[derive(Clone, Debug)]
pub(super) struct NamedChange {
    pub name: String,
    pub change: Change,
    /// Whether it trains while it is in use.
    pub trainable: bool,
}

/// What `materialize` is to make of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Materialize {
    /// The effective weight.
    Merge,
    /// The base as it is.
    KeepBase,
}

/// The reparameterization of one adapted or packed parameter.
#[derive(Clone, Debug)]
pub struct PeftWeight {
    /// The packed base; the parameter itself then holds one NaN in the shape of the dense weight.
    pub(super) nf4: Option<Nf4Weight>,
    /// Dtype of the dense weight that was packed: what `val()` composes.
    pub(super) dtype: FloatDType,
    /// The mappers of the dense parameter that was packed.
    pub(super) mapper: ParamMapper<Tensor<2>>,
    pub(super) layout: WeightLayout,
    /// Whether it is the weight of an embedding, whose adapters have tokens for inputs, so that dropout does not act.
    pub(super) looks_up: bool,
    pub(super) adapters: Vec<NamedChange>,
    /// Those in use, of the ones above.
    pub(super) active: Active,
    pub(super) enabled: bool,
    /// Set for the moment of a `materialize`.
    pub(super) materialize: Option<Materialize>,
    /// Path of the parameter, for messages.
    pub(super) path: Arc<str>,
    /// What is allowed where a layer composes the weight.
    pub(super) compose: ComposeOptions,
    /// How forward passes have read this weight, for the report only: clones of a model share it.
    way: Arc<AtomicU8>,
    /// How many groups a convolution has, once `forward_peft` has seen it; 0 before. Burn shows it to no visitor.
    groups: Arc<AtomicUsize>,
}

impl PeftWeight {
    pub(super) fn new(path: &str, layout: WeightLayout) -> Self {
        Self {
            nf4: None,
            dtype: FloatDType::F32,
            mapper: ParamMapper::default(),
            layout,
            looks_up: false,
            adapters: Vec::new(),
            active: Active::none(),
            enabled: true,
            materialize: None,
            path: path.into(),
            compose: ComposeOptions::default(),
            way: Arc::default(),
            groups: Arc::default(),
        }
    }

    /// The changes of the adapter `name`.
    pub(super) fn changes(&self, name: &str) -> impl Iterator<Item = &Change> {
        let own = self.adapters.iter().filter(move |own| own.name == name);
        own.map(|own| &own.change)
    }

    /// Whether an adapter changes the base.
    pub(super) fn is_changed(&self) -> bool {
        self.enabled
            && self
                .adapters
                .iter()
                .any(|adapter| self.active.uses(&adapter.name))
    }

    /// Whether a forward pass by Burn's own layers forms a dense weight that one by this crate would not.
    pub(super) fn is_composed(&self) -> bool {
        // Of experts there is no other way.
        let experts = matches!(self.layout, WeightLayout::Experts(_));
        self.nf4.is_some() || (!self.loras().is_empty() && !experts)
    }

    /// Name of the first adapter in use that has such a low-rank change.
    pub(super) fn name_of(&self, is_such: impl Fn(&Lora) -> bool) -> Option<&str> {
        let mut in_use = self.adapters.iter().filter(|adapter| {
            self.enabled && matches!(self.active, Active::Sum(_)) && self.active.uses(&adapter.name)
        });
        let found = in_use.find(|adapter| adapter.change.lora().is_some_and(&is_such));
        found.map(|adapter| adapter.name.as_str())
    }

    /// Makes these adapters trainable or frozen.
    pub(super) fn set_trainable(&mut self, names: &[&str], trainable: bool) {
        for adapter in &mut self.adapters {
            if names.contains(&adapter.name.as_str()) {
                adapter.trainable = trainable;
            }
        }
    }

    /// Uses those of `active` that this weight has.
    pub(super) fn activate(&mut self, active: &Active) {
        let mut active = active.clone();
        active.retain(|name| self.changes(name).next().is_some());
        self.active = active;
        self.settle_training();
    }

    /// Lets the adapters require a gradient that train: those that are trainable and in use, summed.
    pub(super) fn settle_training(&mut self) {
        for adapter in std::mem::take(&mut self.adapters) {
            let train = adapter.trainable && self.active.sums(&adapter.name);
            self.adapters.push(NamedChange {
                change: adapter.change.set_trainable(train),
                ..adapter
            });
        }
    }

    /// Whether the adapter's parameters train: it is trainable and in use.
    pub(super) fn trains(&self, adapter: &NamedChange) -> bool {
        adapter.trainable && self.active.sums(&adapter.name)
    }

    /// The changes in use with their weights, or `None` where every row of a batch has its own.
    pub(super) fn in_use(&self) -> Option<Vec<(&Change, f64)>> {
        let Active::Sum(active) = &self.active else {
            return None;
        };
        let active = active.iter().filter(|_| self.enabled);
        let changes =
            active.flat_map(|(name, weight)| self.changes(name).map(|change| (change, *weight)));
        Some(changes.collect())
    }

    /// The low-rank ones of those in use.
    pub(super) fn loras(&self) -> Vec<(&Lora, f64)> {
        let changes = self.in_use().unwrap_or_default().into_iter();
        changes
            .filter_map(|(change, weight)| Some((change.lora()?, weight)))
            .collect()
    }

    /// The low-rank changes of the rows of a batch, each with its rows.
    ///
    /// # Panics
    ///
    /// Panics if an input has another number of rows than were given adapters.
    pub(super) fn row_groups(&self, batch: usize) -> Vec<(&Lora, Vec<usize>)> {
        let Active::Rows(rows) = &self.active else {
            return Vec::new();
        };
        assert_eq!(
            batch,
            rows.len(),
            "the first axis of an input must be the batch whose rows were given adapters"
        );
        self.adapters
            .iter()
            .filter_map(|adapter| {
                Some((adapter.change.lora()?, self.active.rows_of(&adapter.name)))
            })
            .filter(|(_, rows)| !rows.is_empty())
            .collect()
    }

    pub(super) fn way(&self) -> Way {
        match self.way.load(Ordering::Relaxed) {
            0 => Way::Unused,
            1 => Way::Factored,
            _ => Way::Composed,
        }
    }

    /// How many groups a convolution is known to have.
    pub(super) fn groups(&self) -> Option<usize> {
        let groups = self.groups.load(Ordering::Relaxed);
        (groups > 0).then_some(groups)
    }

    /// Notes how many groups a convolution has.
    pub(super) fn note_groups(&self, groups: usize) {
        self.groups.store(groups, Ordering::Relaxed);
    }

    /// Notes that a forward pass has read this weight factored.
    pub(super) fn read_factored(&self) {
        self.way.fetch_max(1, Ordering::Relaxed);
    }

    /// `[..., d_in] -> [..., d_out]`, factored and packed.
    pub(super) fn forward<const D: usize>(
        &self,
        x: Tensor<D>,
        base: &Param<Tensor<2>>,
        bias: Option<Tensor<1>>,
    ) -> Tensor<D> {
        self.read_factored();
        if self.has_own_values() {
            // Values of the adapter's own are dense, and so is their gradient.
            let base = base.base();
            let dtype = self.effective_dtype(base.dtype());
            let weight = cast(self.with_own_values(base), dtype);
            return self.changed(x, &DenseMap { weight, bias });
        }
        match &self.nf4 {
            Some(weight) => self.changed(x, &Nf4Map { weight, bias }),
            None => self.changed(
                x,
                &DenseMap {
                    weight: base.base(),
                    bias,
                },
            ),
        }
    }

    fn changed<const D: usize>(&self, x: Tensor<D>, map: &impl FrozenMap) -> Tensor<D> {
        match &self.active {
            Active::Sum(_) => forward_sum(x, map, &self.loras()),
            Active::Rows(_) if self.enabled => {
                let groups = self.row_groups(x.dims()[0]);
                forward_rows(x, map, &groups)
            }
            Active::Rows(_) => map.apply(x),
        }
    }

    /// Whether an adapter in use sees the channels of all groups of a convolution, whose weight of shape `dims` has those of one.
    pub(super) fn mixes_groups(&self, dims: &[usize]) -> bool {
        let loras = self.loras();
        let mut loras = loras.iter();
        self.layout == WeightLayout::Kernel
            && loras.any(|(lora, _)| lora.dims()[0] != self.layout.dims(dims)[0])
    }

    /// Whether adapters in use have values of their own, whole or by rows.
    pub(super) fn has_own_values(&self) -> bool {
        let own = |adapter: &NamedChange| {
            adapter.change.lora().is_none() && self.active.uses(&adapter.name)
        };
        self.enabled && self.adapters.iter().any(own)
    }

    /// The effective value in f32, in the parameter's shape, differentiable in what trains: low-rank changes of the base with
    /// the values that adapters have of their own.
    ///
    /// # Panics
    ///
    /// Panics where every row of a batch has a weight of its own.
    pub(super) fn effective<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        assert!(
            !self.enabled || matches!(self.active, Active::Sum(_)),
            "rows of a batch under different adapters have no one weight: call `forward_peft`"
        );
        let base = self.with_own_values(base);
        let loras = self.loras();
        if loras.is_empty() {
            return base;
        }
        let dims = base.dims();
        let matrix = merge_sum(self.layout.to_matrix(base), &loras);
        self.layout.of_matrix(matrix, dims)
    }

    /// `P + Σ_i w_i·(V_i - P)`, the base with the values `V_i` that adapters have of their own, in f32; `V` itself where one alone
    /// has the weight 1.
    pub(super) fn with_own_values<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let changes = self.in_use().unwrap_or_default().into_iter();
        let own: Vec<_> = changes
            .filter(|(change, _)| change.lora().is_none())
            .collect();
        if let [(Change::Copy(copy), 1.0)] = own[..] {
            return cast(copy.value(), FloatDType::F32);
        }
        let base = self.base(base);
        let value = |change: &Change| match change {
            Change::Copy(copy) => cast(copy.value(), FloatDType::F32),
            Change::Rows(rows) => {
                let dims = base.dims();
                let matrix = base.clone().reshape([dims[0], dims[D - 1]]);
                rows.replace(matrix).reshape(dims)
            }
            Change::Lora(_) => base.clone(),
        };
        match own[..] {
            [] => base,
            [(change, 1.0)] => value(change),
            _ => own.iter().fold(base.clone(), |sum, (change, weight)| {
                sum + (value(change) - base.clone()).mul_scalar(*weight)
            }),
        }
    }

    /// The value under the adapters, in f32, in the parameter's shape.
    pub(super) fn base<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        match &self.nf4 {
            Some(nf4) => {
                let matrix = nf4.dequantize(FloatDType::F32).transpose();
                let dims = matrix.dims();
                // Packed are matrices only.
                let dims: [usize; D] = dims[..].try_into().expect("two axes");
                matrix.reshape(dims)
            }
            None => match base.dtype() {
                DType::QFloat(_) => cast(base.dequantize(), FloatDType::F32),
                _ => cast(base, FloatDType::F32),
            },
        }
    }

    /// The effective value in the dtype that a layer computes in: what `val()` gives, also where that is refused.
    pub(super) fn composed<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        if self.nf4.is_none() && !self.is_changed() {
            return base;
        }
        let dtype = self.effective_dtype(base.dtype());
        let weight = match self.is_changed() {
            true => self.effective(base),
            false => self.base(base),
        };
        cast(weight, dtype)
    }

    /// Dtype of the effective value of a base that is stored in `dtype`.
    pub(super) fn effective_dtype(&self, dtype: DType) -> FloatDType {
        match (&self.nf4, dtype) {
            (Some(_), dtype) => float_or(dtype, self.dtype),
            (None, DType::QFloat(_)) => FloatDType::F32,
            (None, dtype) => dtype.into(),
        }
    }

    /// Takes a packed base in place of the dense one of a parameter that has these mappers and had this dtype. Returns what the
    /// parameter then shows.
    pub(super) fn pack(
        &mut self,
        nf4: Nf4Weight,
        dtype: FloatDType,
        mapper: ParamMapper<Tensor<2>>,
    ) -> DenseLook {
        let [d_out, d_in] = nf4.shape();
        self.nf4 = Some(nf4);
        self.dtype = dtype;
        self.mapper = mapper.clone();
        DenseLook {
            dims: [d_in, d_out],
            dtype,
            mapper,
        }
    }

    /// What the base of a packed weight shows.
    pub(super) fn look(&self) -> Option<DenseLook> {
        let [d_out, d_in] = self.nf4.as_ref()?.shape();
        Some(DenseLook {
            dims: [d_in, d_out],
            dtype: self.dtype,
            mapper: self.mapper.clone(),
        })
    }

    fn each(
        self,
        mut nf4: impl FnMut(Nf4Weight) -> Nf4Weight,
        mut change: impl FnMut(&str, Change) -> Change,
    ) -> Self {
        let changed = |adapter: NamedChange| NamedChange {
            change: change(&adapter.name, adapter.change),
            ..adapter
        };
        Self {
            nf4: self.nf4.map(&mut nf4),
            adapters: self.adapters.into_iter().map(changed).collect(),
            ..self
        }
    }
}

impl Reparameterization for PeftWeight {
    const NAME: &'static str = "peft";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let keep = self.materialize == Some(Materialize::KeepBase);
        if keep || (self.nf4.is_none() && !self.is_changed()) {
            return base;
        }
        if self.materialize.is_none() {
            self.check_composed(&base.dims(), &base.device());
            if self.is_composed() {
                self.way.store(2, Ordering::Relaxed);
            }
        }
        self.composed(base)
    }
}

/// The value of a parameter where this crate composes it itself, because there is no other way to compute with what is attached to
/// it.
pub(super) fn composed_value<const D: usize>(param: &Param<Tensor<D>>) -> Tensor<D> {
    match param.reparameterization::<PeftWeight>() {
        Some(state) => state.composed(param.base()),
        None => param.val(),
    }
}

thread_local! {
    /// Hands the state of the weight that is being traversed to and from a traversal of this crate. Burn erases the type
    /// of a reparameterization before it reaches a visitor or mapper and puts it back after a mapper, so that nothing
    /// else can read or change one in place; a traversal never leaves its thread.
    static TRANSFER: RefCell<Transfer> = const { RefCell::new(Transfer::Idle) };
}

#[derive(Debug)]
pub(super) enum Transfer {
    Idle,
    /// The next state visited leaves a copy (of handles, not of tensors).
    Collect,
    /// What a visited state left.
    Collected(Box<PeftWeight>),
    /// The next state visited leaves what its packed base shows, if it has one.
    Look,
    /// What a visited state left of that.
    Looked(DenseLook),
    /// The next state mapped composes to this dtype, as its base was cast.
    Cast(FloatDType),
    /// What takes the place of the next state mapped.
    Replace(Box<PeftWeight>),
}

impl Transfer {
    pub(super) fn swap(self) -> Self {
        TRANSFER.replace(self)
    }

    /// Makes the hand-over idle when the guard is dropped, also by a panic: whatever walks a model next must not be taken for a
    /// traversal of this crate.
    pub(super) fn idle_afterwards() -> Idle {
        Self::Idle.swap();
        Idle
    }
}

/// See [`Transfer::idle_afterwards`].
#[must_use]
pub(super) struct Idle;

impl Drop for Idle {
    fn drop(&mut self) {
        Transfer::Idle.swap();
    }
}

impl Module for PeftWeight {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        TRANSFER.with_borrow_mut(|transfer| match transfer {
            Transfer::Collect => *transfer = Transfer::Collected(Box::new(self.clone())),
            Transfer::Look => {
                if let Some(look) = self.look() {
                    *transfer = Transfer::Looked(look);
                }
            }
            _ => {}
        });
        if let Some(nf4) = &self.nf4 {
            visitor.enter_module(NF4, CONTAINER);
            nf4.visit(visitor);
            visitor.exit_module(NF4, CONTAINER);
        }
        for adapter in &self.adapters {
            visitor.enter_module(&adapter.name, CONTAINER);
            adapter.change.visit(visitor);
            visitor.exit_module(&adapter.name, CONTAINER);
        }
    }

    fn map<M: ModuleMapper>(mut self, mapper: &mut M) -> Self {
        match Transfer::Idle.swap() {
            Transfer::Replace(state) => return *state,
            Transfer::Cast(dtype) => self.dtype = dtype,
            other => drop(other.swap()),
        }
        let mapper = RefCell::new(mapper);
        self.each(
            |nf4| {
                let mapper = &mut *mapper.borrow_mut();
                mapper.enter_module(NF4, CONTAINER);
                let nf4 = nf4.map(*mapper);
                mapper.exit_module(NF4, CONTAINER);
                nf4
            },
            |name, change| {
                let mapper = &mut *mapper.borrow_mut();
                mapper.enter_module(name, CONTAINER);
                let change = change.map(*mapper);
                mapper.exit_module(name, CONTAINER);
                change
            },
        )
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        let devices = self
            .nf4
            .iter()
            .fold(devices, |devices, nf4| nf4.collect_devices(devices));
        self.adapters.iter().fold(devices, |devices, adapter| {
            adapter.change.collect_devices(devices)
        })
    }

    fn to_device(self, device: &Device) -> Self {
        self.each(
            |nf4| nf4.to_device(device),
            |_, change| change.to_device(device),
        )
    }

    fn fork(self, device: &Device) -> Self {
        self.each(|nf4| nf4.fork(device), |_, change| change.fork(device))
    }

    fn valid(&self) -> Self {
        self.clone()
            .each(|nf4| nf4.valid(), |_, change| change.valid())
    }

    fn train(self) -> Self {
        self.each(Module::train, |_, change| change.train())
    }

    fn materialize(self) -> Self {
        self
    }
}
