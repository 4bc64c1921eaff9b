//! Choosing the adapters that a model uses.
//!
//! A choice belongs to one [`PeftModel`]: clones share tensors, not choices. A choice for one call is therefore a clone,
//! [`with_adapters`](PeftModel::with_adapters), which costs handles and no tensor, and is as safe among threads as the model is.

use burn::module::Module;

use super::active::Active;
use super::attach::refuse_own_values;
use super::peft_model::PeftModel;
use super::statistics::with_own_statistics;
use crate::{PeftError, Result};

impl<M: Module> PeftModel<M> {
    /// Makes the adapter `name` the active one, and trainable; all others are inactive and require no gradient.
    ///
    /// As in PEFT, an adapter that was loaded frozen trains from here on. [`activate`](Self::activate) leaves it frozen.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`].
    pub fn set_adapter(&mut self, name: &str) -> Result<()> {
        self.set_adapters(&[(name, 1.0)])
    }

    /// Makes several adapters active at once, each with a weight on its change, and trainable: `x·W + b + Σ_i w_i·Δ_i(x)`. All
    /// others are inactive and require no gradient. Weights are the changes' own and are not saved.
    ///
    /// To hold one of them frozen beside others that train, call [`set_trainable`](Self::set_trainable) afterwards. DoRA's change
    /// is the one it makes alone, whatever else is active.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`]; [`PeftError::Config`] for a weight that is not finite;
    /// [`PeftError::AdapterName`] for an adapter named twice.
    pub fn set_adapters(&mut self, adapters: &[(&str, f64)]) -> Result<()> {
        let active = self.sum_of(adapters)?;
        let names: Vec<&str> = adapters.iter().map(|(name, _)| *name).collect();
        self.set_trainable_flags(&names, true);
        self.active = active.clone();
        self.change(|state| {
            state.set_trainable(&names, true);
            state.activate(&active);
        });
        Ok(())
    }

    /// Makes these adapters the active ones, as [`set_adapters`](Self::set_adapters) does, but each stays trainable or frozen as it
    /// was.
    ///
    /// # Errors
    ///
    /// As [`set_adapters`](Self::set_adapters).
    pub fn activate(&mut self, adapters: &[(&str, f64)]) -> Result<()> {
        let active = self.sum_of(adapters)?;
        self.use_adapters(active);
        Ok(())
    }

    /// Makes an adapter trainable or frozen, whether or not it is active: PEFT's `set_requires_grad`. It trains while it is both
    /// trainable and active, so an adapter that is active and frozen can stand beside others that train.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`].
    pub fn set_trainable(&mut self, name: &str, trainable: bool) -> Result<()> {
        self.adapter(name)?;
        self.set_trainable_flags(&[name], trainable);
        self.change(|state| {
            state.set_trainable(&[name], trainable);
            state.settle_training();
        });
        Ok(())
    }

    /// Whether an adapter is trainable; it trains while it is active too.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`].
    pub fn is_trainable(&self, name: &str) -> Result<bool> {
        Ok(self.adapter(name)?.trainable)
    }

    fn set_trainable_flags(&mut self, names: &[&str], trainable: bool) {
        for adapter in &mut self.adapters {
            if names.contains(&adapter.name.as_str()) {
                adapter.trainable = trainable;
            }
        }
    }

    /// The sum of these adapters, which must be adapters of the model, each once, with finite weights.
    fn sum_of(&self, adapters: &[(&str, f64)]) -> Result<Active> {
        for (place, (name, weight)) in adapters.iter().enumerate() {
            self.config(name)?;
            if !weight.is_finite() {
                return Err(PeftError::config(
                    format!("weight of adapter `{name}`"),
                    weight,
                    "a finite number",
                ));
            }
            if adapters[..place].iter().any(|(other, _)| other == name) {
                return Err(PeftError::AdapterName {
                    name: (*name).into(),
                    reason: "it is named twice".into(),
                });
            }
        }
        let adapters = adapters.iter().map(|&(name, weight)| (name.into(), weight));
        Ok(Active::Sum(adapters.collect()))
    }

    /// A clone with these adapters active and enabled, for one call or for as long as it is kept. Each stays trainable or frozen as it
    /// was. Tensors are shared.
    ///
    /// # Errors
    ///
    /// As [`set_adapters`](Self::set_adapters).
    pub fn with_adapters(&self, adapters: &[(&str, f64)]) -> Result<Self> {
        let mut clone = self.clone();
        clone.activate(adapters)?;
        clone.enable_adapters();
        Ok(clone)
    }

    /// A clone in which row `i` of a batch, along the first axis of every adapted layer's input, has the adapter `rows[i]`,
    /// or none: answers for many users in one pass. No adapter of the clone requires a gradient. Tensors are shared.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`]; [`PeftError::Config`] for an adapter that has parameters of its own beside low-rank changes.
    ///
    /// # Panics
    ///
    /// The clone's adapted layers panic for an input with another number of rows, and where they are not called by
    /// [`forward_peft`](super::PeftForward::forward_peft): a composed weight is one for all rows.
    pub fn with_adapter_rows(&self, rows: &[Option<&str>]) -> Result<Self> {
        for name in rows.iter().flatten() {
            refuse_own_values(name, &self.changes(name)?)?;
        }
        let rows = rows.iter().map(|row| row.map(str::to_owned));
        let mut clone = self.clone();
        clone.use_adapters(Active::Rows(rows.collect()));
        clone.enable_adapters();
        Ok(clone)
    }

    /// The adapters in use, whether or not adapters are enabled.
    pub fn active(&self) -> &Active {
        &self.active
    }

    /// Name of the active adapter if it is the only one, whether or not adapters are enabled.
    pub fn active_adapter(&self) -> Option<&str> {
        match &self.active {
            Active::Sum(adapters) => match &adapters[..] {
                [(name, _)] => Some(name),
                _ => None,
            },
            Active::Rows(_) => None,
        }
    }

    /// Turns all adapters off: outputs are those of the base, to the bit.
    pub fn disable_adapters(&mut self) {
        self.enabled = false;
        self.change(|state| state.enabled = false);
    }

    /// Turns the active adapters on again.
    pub fn enable_adapters(&mut self) {
        self.enabled = true;
        self.change(|state| state.enabled = true);
    }

    /// A clone with its adapters off. Tensors are shared.
    pub fn disabled(&self) -> Self {
        let mut clone = self.clone();
        clone.disable_adapters();
        clone
    }

    /// Whether adapters are enabled.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// A frozen snapshot to train against, as the reference policy of DPO or PPO: it answers as the model does now, without
    /// dropout, whatever becomes of the model. Tensors are shared until the model's change. Running statistics are its own.
    pub fn reference(&self) -> Self {
        let mut reference = self.clone().freeze();
        reference.module = reference.module.map(with_own_statistics);
        reference
    }
}
