//! A model of any kind with adapters, as PEFT's `PeftModel` in Python.

use std::collections::HashMap;

use burn::module::{Module, ParamGroup};
use burn::tensor::Device;

use super::active::Active;
use super::config::PeftConfig;
use super::fresh::{dense_weights, fresh};
use super::quantize::{self, QuantizeReport};
use super::report::{AttachReport, ModelReport};
use super::target::{TargetConfig, TargetReport};
use super::traverse::{Site, collect, edit};
use super::weight::{NF4, NamedAdapter, PeftWeight};
use crate::adapter::Lora;
use crate::nf4::Nf4Config;
use crate::{PeftError, Result};

/// Name of the adapter that PEFT writes without a folder of its own.
pub const DEFAULT_ADAPTER: &str = "default";

/// Longest name of an adapter, in bytes.
const MAX_NAME: usize = 128;

/// Any Burn module with adapters on its linear weights.
///
/// It derefs to the module and is transparent as a [`Module`]: parameter paths and ids are those of the module inside,
/// with what is attached under `<weight>.peft.<adapter>.a` and `.b` (and `<weight>.peft.nf4` for a packed base). Only the
/// factors of the active adapter require a gradient; everything that was in the model when it was wrapped is frozen.
///
/// Every operation that can fail plans first and leaves the model as it was on an error. Clones are cheap (tensors are
/// shared) and independent: activating an adapter in one does not show in another.
///
/// # The two ways
///
/// * An unchanged model is right at once: Burn's `Linear::forward` composes the dense effective weight. In training that
///   costs a dense weight and a dense gradient a layer.
/// * With [`forward_peft`](super::PeftForward::forward_peft) at the call sites it runs factored and packed.
///
/// [`report`](Self::report) names the weights that a forward pass has composed.
#[derive(Clone, Debug)]
pub struct PeftModel<M> {
    /// Empty only inside an operation that takes the module by value.
    pub(super) module: Option<M>,
    pub(super) adapters: Vec<(String, PeftConfig)>,
    pub(super) active: Active,
    pub(super) enabled: bool,
    pub(super) head: String,
}

/// A linear module of a model.
pub(crate) struct LinearModule {
    /// Its path.
    pub path: String,
    /// `[d_in, d_out]`.
    pub dims: [usize; 2],
    /// Where its weight lies.
    pub device: Device,
}

impl<M: Module> PeftModel<M> {
    /// Wraps a module and freezes its every parameter; its dropout and other training behaviour stay on.
    pub fn new(module: M) -> Self {
        Self {
            module: Some(module.no_grad()),
            adapters: Vec::new(),
            active: Active::none(),
            enabled: true,
            head: "lm_head".into(),
        }
    }

    /// Names the output head, which `"all-linear"` leaves out as PEFT does: a module path, or its end. Default:
    /// `lm_head`.
    pub fn with_head(mut self, head: impl Into<String>) -> Self {
        self.head = head.into();
        self
    }

    /// The module with its adapters attached.
    pub fn module(&self) -> &M {
        self.module
            .as_ref()
            .expect("only empty inside an operation")
    }

    /// Takes the module with everything attached to it.
    pub fn into_module(self) -> M {
        self.module.expect("only empty inside an operation")
    }

    /// Packs the weights that `targets` chooses in NF4, one at a time: no second dense copy of a weight is ever held, and
    /// a weight that was not yet initialised is only while it is being packed.
    ///
    /// # Errors
    ///
    /// [`PeftError::NotFinite`] with the path of the weight; [`PeftError::AlreadyQuantized`] for one that is packed
    /// already; [`PeftError::ForeignReparameterization`]; and those of the targets. Nothing has changed then (only the
    /// initialiser of a weight not yet initialised can still fail later, by yielding what is not finite).
    pub fn quantize_nf4(
        &mut self,
        targets: &TargetConfig,
        config: &Nf4Config,
    ) -> Result<QuantizeReport> {
        let sites = self.linear_sites();
        let chosen = self.resolve(targets, &sites)?;
        let module = self.module.take().expect("only empty inside an operation");
        let (module, report) = quantize::quantize(module, sites, &chosen, config);
        self.module = Some(module);
        report
    }

    /// Adds a fresh adapter and makes it the active one.
    ///
    /// # Errors
    ///
    /// [`PeftError::AdapterName`] if the name is not one or is taken; those of [`LoraConfig::init_on`] and of the
    /// targets, for instance [`PeftError::UnmatchedPatterns`] with the nearest names;
    /// [`PeftError::ForeignReparameterization`].
    ///
    /// [`LoraConfig::init_on`]: crate::adapter::LoraConfig::init_on
    pub fn add_adapter(&mut self, name: &str, config: &PeftConfig) -> Result<AttachReport> {
        let sites = self.linear_sites();
        let matcher = config.targets.compile(self.head_of(&sites))?;
        let targets = matcher.resolve(&modules(&sites))?;
        let mut factors = Vec::with_capacity(targets.matched.len());
        let chosen = |path: &str| {
            let mut matched = targets.matched.iter();
            config.lora.needs_weight()
                && matched.any(|target| path.strip_prefix(&target.path) == Some(".weight"))
        };
        let dense = dense_weights(self.module(), chosen);
        for target in &targets.matched {
            let site = find(&sites, &target.path)?;
            let mut lora = config.lora.clone();
            lora.rank = matcher.rank_for(&target.path, lora.rank)?;
            lora.alpha = matcher.alpha_for(&target.path, lora.alpha)?;
            let lora = fresh(&lora, site, &self.device_of(site), &dense)?;
            factors.push((target.path.clone(), lora));
        }
        self.insert_adapter(name, config, factors)?;
        Ok(AttachReport {
            targets,
            model: self.report(),
        })
    }

    /// Adds an adapter of given factors, by the path of their module, and makes it the active one.
    ///
    /// # Errors
    ///
    /// [`PeftError::AdapterName`]; [`PeftError::UnknownModule`] for a path that is no linear module of the model;
    /// [`PeftError::Shape`] for factors that do not fit it; [`PeftError::Config`] for factors that have DoRA's magnitude
    /// where `config` says otherwise, or the reverse; [`PeftError::ForeignReparameterization`].
    pub fn insert_adapter(
        &mut self,
        name: &str,
        config: &PeftConfig,
        factors: Vec<(String, Lora)>,
    ) -> Result<()> {
        self.check_new_name(name)?;
        let states = self.attached(name, config, factors)?;
        self.adapters.push((name.into(), config.clone()));
        self.update(states);
        self.use_adapters(Active::one(name));
        Ok(())
    }

    /// Gives an adapter other factors, and another configuration, in place: whether it is active, and with which weight, stays,
    /// and so do the ids of parameters whose module had the adapter before. Modules without new factors lose theirs.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`], and those of [`insert_adapter`](Self::insert_adapter) for the factors. The model has not
    /// changed then.
    pub fn swap_adapter(
        &mut self,
        name: &str,
        config: &PeftConfig,
        factors: Vec<(String, Lora)>,
    ) -> Result<()> {
        self.config(name)?;
        let states = self.attached(name, config, factors)?;
        self.change(|state| state.adapters.retain(|adapter| adapter.name != name));
        for (adapter, known) in &mut self.adapters {
            if adapter == name {
                *known = config.clone();
            }
        }
        self.update(states);
        self.use_adapters(self.active.clone());
        Ok(())
    }

    /// The states of the weights that get these factors, by their paths, each with the adapter in its old place or the last.
    fn attached(
        &self,
        name: &str,
        config: &PeftConfig,
        factors: Vec<(String, Lora)>,
    ) -> Result<HashMap<String, PeftWeight>> {
        let sites = self.linear_sites();
        let mut states: HashMap<String, PeftWeight> = HashMap::new();
        for (path, lora) in factors {
            let site = find(&sites, &path)?;
            refuse_foreign(site)?;
            if lora.dims() != site.dims() {
                return Err(PeftError::Shape {
                    tensor: format!("{path} (adapter `{name}`)"),
                    expected: site.dims().into(),
                    found: lora.dims().into(),
                });
            }
            let (found, expected) = (lora.magnitude.is_some(), config.lora.dora);
            if found != expected {
                return Err(PeftError::Config {
                    name: format!("dora of `{path}`"),
                    value: found.to_string(),
                    expected: format!("the adapter's own: {expected}"),
                });
            }
            let mut state = site.state.clone().unwrap_or_else(PeftWeight::new);
            match state
                .adapters
                .iter_mut()
                .find(|adapter| adapter.name == name)
            {
                Some(adapter) => adapter.lora = lora.with_ids_of(&adapter.lora),
                None => state.adapters.push(NamedAdapter {
                    name: name.into(),
                    lora,
                }),
            }
            if states.insert(site.path.clone(), state).is_some() {
                return Err(PeftError::AdapterName {
                    name: name.into(),
                    reason: format!("its factors name module `{path}` twice"),
                });
            }
        }
        Ok(states)
    }

    /// Removes an adapter, and takes it out of use.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`].
    pub fn delete_adapter(&mut self, name: &str) -> Result<()> {
        self.config(name)?;
        self.change(|state| state.adapters.retain(|adapter| adapter.name != name));
        self.adapters.retain(|(adapter, _)| adapter != name);
        let mut active = self.active.clone();
        active.retain(|adapter| adapter != name);
        self.use_adapters(active);
        Ok(())
    }

    /// Names of all adapters, in the order they were added.
    pub fn adapters(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().map(|(name, _)| name.as_str())
    }

    /// The configuration of an adapter.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`].
    pub fn config(&self, name: &str) -> Result<&PeftConfig> {
        let found = self.adapters.iter().find(|(adapter, _)| adapter == name);
        found
            .map(|(_, config)| config)
            .ok_or_else(|| PeftError::UnknownAdapter {
                name: name.into(),
                adapters: self.adapters().map(str::to_owned).collect(),
            })
    }

    /// The factors of an adapter with the paths of their modules, in the order of the model. Tensors are shared.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`].
    pub fn factors(&self, name: &str) -> Result<Vec<(String, Lora)>> {
        self.config(name)?;
        let sites = collect(self.module());
        let factors = sites.iter().filter_map(|site| {
            let lora = site.state.as_ref()?.adapter(name)?;
            Some((site.module().to_owned(), lora.clone()))
        });
        Ok(factors.collect())
    }

    /// The parameters of all adapters as a group, for instance to record them without the base:
    /// `model.into_record_group(group)`.
    pub fn adapter_params(&self) -> ParamGroup {
        let sites = collect(self.module());
        let adapters = sites
            .iter()
            .filter_map(|site| site.state.as_ref())
            .flat_map(|state| &state.adapters);
        ParamGroup::from_ids(
            adapters
                .flat_map(|NamedAdapter { lora, .. }| {
                    let magnitude = lora.magnitude.as_ref().map(|magnitude| magnitude.id);
                    let initial = lora.initial.iter();
                    let initial = initial.flat_map(|initial| [initial.a.id, initial.b.id]);
                    let factors = [lora.a.id, lora.b.id].into_iter();
                    factors.chain(magnitude).chain(initial)
                })
                .collect(),
        )
    }

    /// What is attached where, what trains, and what it weighs.
    pub fn report(&self) -> ModelReport {
        ModelReport::new(collect(self.module()), self.active.clone(), self.enabled)
    }

    /// Every linear module, in the model's order.
    pub(crate) fn linear_modules(&self) -> Vec<LinearModule> {
        let sites = self.linear_sites();
        let module = |site: &Site| LinearModule {
            path: site.module().to_owned(),
            dims: site.dims(),
            device: self.device_of(site),
        };
        sites.iter().map(module).collect()
    }

    /// The weights `[d_in, d_out]` of the modules at these paths, shared; a packed one is an empty matrix.
    #[cfg(feature = "faer")]
    pub(crate) fn dense_weights(
        &self,
        module: impl Fn(&str) -> bool,
    ) -> HashMap<String, burn::tensor::Tensor<2>> {
        let path = |path: &str| path.strip_suffix(".weight").map(str::to_owned);
        let weights = dense_weights(self.module(), |weight| {
            path(weight).is_some_and(|path| module(&path))
        });
        let weights = weights.into_iter();
        weights
            .filter_map(|(weight, tensor)| Some((path(&weight)?, tensor)))
            .collect()
    }

    pub(super) fn linear_sites(&self) -> Vec<Site> {
        let mut sites = collect(self.module());
        sites.retain(|site| site.linear);
        sites
    }

    fn resolve(&self, targets: &TargetConfig, sites: &[Site]) -> Result<TargetReport> {
        targets
            .compile(self.head_of(sites))?
            .resolve(&modules(sites))
    }

    /// Path of the output head.
    fn head_of<'a>(&self, sites: &'a [Site]) -> Option<&'a str> {
        let suffix = format!(".{}", self.head);
        let mut paths = sites.iter().map(Site::module);
        paths.find(|path| *path == self.head || path.ends_with(&suffix))
    }

    pub(super) fn device_of(&self, site: &Site) -> Device {
        match site.state.as_ref().and_then(|state| state.nf4.as_ref()) {
            Some(nf4) => nf4.device(),
            None => site.device.clone(),
        }
    }

    pub(super) fn check_new_name(&self, name: &str) -> Result<()> {
        let reason = if name.is_empty() || name.len() > MAX_NAME {
            format!("it must have 1 to {MAX_NAME} bytes")
        } else if name == NF4 {
            "it is the name of the packed base".into()
        } else if let Some(c) = name
            .chars()
            .find(|c| !(c.is_alphanumeric() || "_-".contains(*c)))
        {
            // A dot separates paths of parameters, a slash those of files.
            format!("it holds {c:?}; only letters, digits, `_` and `-` are allowed")
        } else if self.adapters().any(|adapter| adapter == name) {
            "the model has an adapter of that name".into()
        } else {
            return Ok(());
        };
        Err(PeftError::AdapterName {
            name: name.into(),
            reason,
        })
    }

    pub(super) fn use_adapters(&mut self, active: Active) {
        let enabled = self.enabled;
        self.change(|state| {
            state.activate(&active);
            state.enabled = enabled;
        });
        self.active = active;
    }

    /// Changes the state of every weight that has one.
    pub(super) fn change(&mut self, mut f: impl FnMut(&mut PeftWeight)) {
        let states = collect(self.module()).into_iter().filter_map(|site| {
            let mut state = site.state?;
            f(&mut state);
            Some((site.path, state))
        });
        let states = states.collect();
        self.update(states);
    }

    pub(super) fn update(&mut self, states: HashMap<String, PeftWeight>) {
        self.module = self.module.take().map(|module| edit(module, states));
    }
}

fn modules(sites: &[Site]) -> Vec<String> {
    sites.iter().map(|site| site.module().to_owned()).collect()
}

pub(super) fn find<'a>(sites: &'a [Site], path: &str) -> Result<&'a Site> {
    sites
        .iter()
        .find(|site| site.module() == path)
        .ok_or_else(|| PeftError::UnknownModule { path: path.into() })
}

/// Burn puts an attached reparameterization back whatever is attached in its place.
pub(super) fn refuse_foreign(site: &Site) -> Result<()> {
    match &site.foreign {
        Some(name) => Err(PeftError::ForeignReparameterization {
            path: site.path.clone(),
            name: name.clone(),
        }),
        None => Ok(()),
    }
}
