//! What is attached to one weight of a model: a packed base, and adapters by name.
//!
//! The effective weight is `W + Δ` of the active adapters (or DoRA's rescaled one), with `W [d_in, d_out]` dense or packed. It is a
//! [`Reparameterization`] of Burn, so a model that knows nothing of it computes right: `param.val()` composes the dense
//! effective weight. [`PeftForward`](super::PeftForward) computes the same without ever forming it.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor, Param, Reparameterization};
use burn::tensor::{DType, Device, FloatDType, Tensor};

use super::active::Active;
use crate::adapter::{FrozenMap, Lora, cast, forward_rows, forward_sum, merge_sum};
use crate::layer::{DenseMap, Nf4Map};
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

/// One adapter of one weight.
#[derive(Clone, Debug)]
pub(super) struct NamedAdapter {
    pub name: String,
    pub lora: Lora,
}

/// The reparameterization of one adapted or packed weight.
#[derive(Clone, Debug)]
pub struct PeftWeight {
    /// The packed base; the parameter itself then holds an empty tensor.
    pub(super) nf4: Option<Nf4Weight>,
    /// Dtype of the dense weight that was packed: what `val()` composes.
    pub(super) dtype: FloatDType,
    pub(super) adapters: Vec<NamedAdapter>,
    /// Those in use, of the ones above.
    pub(super) active: Active,
    pub(super) enabled: bool,
    /// `materialize` drops this and leaves the base as it is, in place of merging into it.
    pub(super) keep_base: bool,
    /// How forward passes have read this weight, for the report only: clones of a model share it.
    way: Arc<AtomicU8>,
}

impl PeftWeight {
    pub(super) fn new() -> Self {
        Self {
            nf4: None,
            dtype: FloatDType::F32,
            adapters: Vec::new(),
            active: Active::none(),
            enabled: true,
            keep_base: false,
            way: Arc::default(),
        }
    }

    pub(super) fn adapter(&self, name: &str) -> Option<&Lora> {
        self.adapters
            .iter()
            .find(|adapter| adapter.name == name)
            .map(|adapter| &adapter.lora)
    }

    /// Whether an adapter changes the base.
    pub(super) fn is_changed(&self) -> bool {
        self.enabled
            && self
                .adapters
                .iter()
                .any(|adapter| self.active.uses(&adapter.name))
    }

    /// Uses those of `active` that this weight has. Only the factors of those that are summed require a gradient.
    pub(super) fn activate(&mut self, active: &Active) {
        let mut active = active.clone();
        active.retain(|name| self.adapter(name).is_some());
        self.active = active;
        for adapter in std::mem::take(&mut self.adapters) {
            let train = self.active.trains(&adapter.name);
            self.adapters.push(NamedAdapter {
                lora: adapter.lora.set_trainable(train),
                name: adapter.name,
            });
        }
    }

    /// The deltas in use with their weights, or `None` where every row of a batch has its own.
    fn deltas(&self) -> Option<Vec<(&Lora, f64)>> {
        let Active::Sum(active) = &self.active else {
            return None;
        };
        let active = active.iter().filter(|_| self.enabled);
        let deltas = active.filter_map(|(name, weight)| Some((self.adapter(name)?, *weight)));
        Some(deltas.collect())
    }

    pub(super) fn way(&self) -> Way {
        match self.way.load(Ordering::Relaxed) {
            0 => Way::Unused,
            1 => Way::Factored,
            _ => Way::Composed,
        }
    }

    /// `[..., d_in] -> [..., d_out]`, factored and packed.
    pub(super) fn forward<const D: usize>(
        &self,
        x: Tensor<D>,
        base: &Param<Tensor<2>>,
        bias: Option<Tensor<1>>,
    ) -> Tensor<D> {
        self.way.fetch_max(1, Ordering::Relaxed);
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
        match (&self.active, self.deltas()) {
            (_, Some(deltas)) => forward_sum(x, map, &deltas),
            (Active::Rows(rows), None) if self.enabled => {
                assert_eq!(
                    x.dims()[0],
                    rows.len(),
                    "the first axis of an input must be the batch whose rows were given adapters"
                );
                let groups: Vec<_> = self
                    .adapters
                    .iter()
                    .map(|NamedAdapter { name, lora }| (lora, self.active.rows_of(name)))
                    .filter(|(_, rows)| !rows.is_empty())
                    .collect();
                forward_rows(x, map, &groups)
            }
            _ => map.apply(x),
        }
    }

    /// The effective weight `[d_in, d_out]` in f32, differentiable in the factors.
    ///
    /// # Panics
    ///
    /// Panics where every row of a batch has a weight of its own.
    pub(super) fn effective(&self, base: Tensor<2>) -> Tensor<2> {
        let base = self.base(base);
        if !self.is_changed() {
            return base;
        }
        let deltas = self.deltas().expect(
            "rows of a batch under different adapters have no one weight: call `forward_peft`",
        );
        merge_sum(base, &deltas)
    }

    /// The weight under the adapters, `[d_in, d_out]` in f32.
    pub(super) fn base(&self, base: Tensor<2>) -> Tensor<2> {
        match &self.nf4 {
            Some(nf4) => nf4.dequantize(FloatDType::F32).transpose(),
            None => match base.dtype() {
                DType::QFloat(_) => cast(base.dequantize(), FloatDType::F32),
                _ => cast(base, FloatDType::F32),
            },
        }
    }

    /// Dtype of the effective weight.
    pub(super) fn effective_dtype(&self, base: &Tensor<2>) -> FloatDType {
        match (&self.nf4, base.dtype()) {
            (Some(_), _) => self.dtype,
            (None, DType::QFloat(_)) => FloatDType::F32,
            (None, dtype) => dtype.into(),
        }
    }

    fn each(
        self,
        mut nf4: impl FnMut(Nf4Weight) -> Nf4Weight,
        mut lora: impl FnMut(&str, Lora) -> Lora,
    ) -> Self {
        Self {
            nf4: self.nf4.map(&mut nf4),
            adapters: self
                .adapters
                .into_iter()
                .map(
                    |NamedAdapter {
                         name,
                         lora: factors,
                     }| {
                        let factors = lora(&name, factors);
                        NamedAdapter {
                            name,
                            lora: factors,
                        }
                    },
                )
                .collect(),
            ..self
        }
    }
}

impl Reparameterization for PeftWeight {
    const NAME: &'static str = "peft";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        if self.keep_base || (self.nf4.is_none() && !self.is_changed()) {
            return base;
        }
        self.way.store(2, Ordering::Relaxed);
        // Attached to matrices only, so that D is 2; a packed one is an empty matrix.
        let dims = base.dims();
        let base: Tensor<2> = base.reshape([dims[0], dims[D - 1]]);
        let dtype = self.effective_dtype(&base);
        let weight = cast(self.effective(base), dtype);
        let [d_in, d_out] = weight.dims();
        weight.reshape(burn::tensor::Shape::from([d_in, d_out]))
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
    Collected(PeftWeight),
    /// What takes the place of the next state mapped.
    Replace(PeftWeight),
}

impl Transfer {
    pub(super) fn swap(self) -> Self {
        TRANSFER.replace(self)
    }
}

impl Module for PeftWeight {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        TRANSFER.with_borrow_mut(|transfer| {
            if let Transfer::Collect = transfer {
                *transfer = Transfer::Collected(self.clone());
            }
        });
        if let Some(nf4) = &self.nf4 {
            visitor.enter_module(NF4, CONTAINER);
            nf4.visit(visitor);
            visitor.exit_module(NF4, CONTAINER);
        }
        for adapter in &self.adapters {
            visitor.enter_module(&adapter.name, CONTAINER);
            adapter.lora.visit(visitor);
            visitor.exit_module(&adapter.name, CONTAINER);
        }
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        match Transfer::Idle.swap() {
            Transfer::Replace(state) => return state,
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
            |name, lora| {
                let mapper = &mut *mapper.borrow_mut();
                mapper.enter_module(name, CONTAINER);
                let lora = lora.map(*mapper);
                mapper.exit_module(name, CONTAINER);
                lora
            },
        )
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        let devices = self
            .nf4
            .iter()
            .fold(devices, |devices, nf4| nf4.collect_devices(devices));
        self.adapters.iter().fold(devices, |devices, adapter| {
            adapter.lora.collect_devices(devices)
        })
    }

    fn to_device(self, device: &Device) -> Self {
        self.each(
            |nf4| nf4.to_device(device),
            |_, lora| lora.to_device(device),
        )
    }

    fn fork(self, device: &Device) -> Self {
        self.each(|nf4| nf4.fork(device), |_, lora| lora.fork(device))
    }

    fn valid(&self) -> Self {
        self.clone().each(|nf4| nf4.valid(), |_, lora| lora.valid())
    }

    fn train(self) -> Self {
        self.each(Module::train, |_, lora| lora.train())
    }

    fn materialize(self) -> Self {
        self
    }
}
