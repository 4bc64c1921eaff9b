//! A model of any kind with adapters, as PEFT's `PeftModel` in Python.

use std::collections::HashMap;

use burn::module::{Module, ParamGroup, list_param_ids};
use burn::tensor::Device;

use super::active::Active;
use super::config::PeftConfig;
use super::fresh::{copies, dense_weights, fresh};
use super::parameters::{biases, named_modules, target_parameters, tokens};
use super::quantize::{self, QuantizeReport};
use super::report::{AttachReport, ModelReport};
use super::target::{TargetConfig, TargetModules, TargetReport};
use super::traverse::{Site, collect, edit};
use super::weight::{NF4, NamedChange, PeftWeight};
use crate::adapter::{Change, Lora};
use crate::layer::{ExpertLayout, LayerKind, WeightLayout};
use crate::nf4::Nf4Config;
use crate::{PeftError, Result};

/// Name of the adapter that PEFT writes without a folder of its own.
pub const DEFAULT_ADAPTER: &str = "default";

/// Longest name of an adapter, in bytes.
const MAX_NAME: usize = 128;

/// Any Burn module with adapters on its weights: low-rank changes of linear layers, embeddings and convolutions, and copies of
/// whole parameters.
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
    pub(super) experts: ExpertLayout,
}

/// A float parameter of a model, as files need to know it.
#[derive(Clone)]
pub(crate) struct Parameter {
    /// Its path.
    pub path: String,
    /// Its name in its module, as PyTorch has it.
    pub torch_name: String,
    /// Its shape as a dense one.
    pub shape: Vec<usize>,
    /// What layer it is the weight of, if it is that of one an adapter can change.
    pub layer: Option<LayerKind>,
    /// How many groups a convolution has, where that was seen; else 1.
    pub groups: usize,
    /// Where it lies.
    pub device: Device,
}

impl Parameter {
    /// Path of its module.
    pub fn module(&self) -> &str {
        self.path.rsplit_once('.').map_or("", |(module, _)| module)
    }
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
            experts: ExpertLayout::default(),
        }
    }

    /// Names the output head, which `"all-linear"` leaves out as PEFT does: a module path, or its end. Default:
    /// `lm_head`.
    pub fn with_head(mut self, head: impl Into<String>) -> Self {
        self.head = head.into();
        self
    }

    /// Says how tensors of experts lie, which [`target_parameters`](PeftConfig::target_parameters) name.
    pub fn with_expert_layout(mut self, layout: ExpertLayout) -> Self {
        self.experts = layout;
        self
    }

    /// Name of the output head.
    pub(crate) fn head(&self) -> &str {
        &self.head
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
    /// [`PeftError::ForeignReparameterization`]. The model has not changed then.
    ///
    /// [`LoraConfig::init_on`]: crate::adapter::LoraConfig::init_on
    pub fn add_adapter(&mut self, name: &str, config: &PeftConfig) -> Result<AttachReport> {
        let all = self.sites();
        let saved = named_modules("modules_to_save", &all, &config.modules_to_save)?;
        let is_saved = |site: &Site| saved.iter().any(|saved| saved.path == site.path);
        let mut sites: Vec<&Site> = all.iter().filter(|site| site.is_target()).collect();
        if config.targets.target_modules == TargetModules::AllLinear {
            sites.retain(|site| site.is_linear());
        }
        let matcher = config.targets.compile(self.head_of(&all))?;
        let candidates = sites.iter().filter(|site| !is_saved(site));
        let candidates: Vec<_> = candidates.map(|site| site.module().to_owned()).collect();
        let mut matched = target_parameters(&all, &config.target_parameters)?;
        let named = !matches!(&config.targets.target_modules, TargetModules::List(names) if names.is_empty());
        let targets = match named || matched.is_empty() {
            true => matcher.resolve(&candidates)?,
            false => TargetReport::default(),
        };
        for target in &targets.matched {
            let site = *find(&sites, &target.path)?;
            if !matched.iter().any(|matched| matched.path == site.path) {
                matched.push(site);
            }
        }
        let needing = matched.iter().filter(|_| config.lora.needs_weight());
        let dense = dense_weights(self.module(), needing.copied());
        let mut changes: Vec<(String, Change)> = Vec::with_capacity(matched.len());
        for site in &matched {
            let mut lora = config.lora.clone();
            lora.rank = matcher.rank_for(site.target_path(), lora.rank)?;
            lora.alpha = matcher.alpha_for(site.target_path(), lora.alpha)?;
            let lora = fresh(&lora, site, &self.device_of(site), &dense)?;
            changes.push((site.path.clone(), lora.into()));
        }
        let mut copied = saved;
        for site in biases(&all, config.bias, &matched) {
            if !copied.iter().any(|saved| saved.path == site.path) {
                copied.push(site);
            }
        }
        let rows = tokens(&all, config.trainable_tokens.as_ref())?;
        let (copied, rows) = copies(self.module(), &copied, &rows, config.lora.dtype)?;
        changes.extend(copied.into_iter().map(|(path, copy)| (path, copy.into())));
        changes.extend(rows.into_iter().map(|(path, rows)| (path, rows.into())));
        self.insert_changes(name, config, changes)?;
        Ok(AttachReport {
            targets,
            model: self.report(),
        })
    }

    /// Adds an adapter of given factors, by the path of their module, and makes it the active one.
    ///
    /// # Errors
    ///
    /// [`PeftError::AdapterName`]; [`PeftError::UnknownModule`] for a path that is no module of the model which an adapter can
    /// change; [`PeftError::Shape`] for factors that do not fit it; [`PeftError::Config`] for factors that have DoRA's magnitude
    /// where `config` says otherwise, or the reverse; [`PeftError::ForeignReparameterization`].
    pub fn insert_adapter(
        &mut self,
        name: &str,
        config: &PeftConfig,
        factors: Vec<(String, Lora)>,
    ) -> Result<()> {
        self.insert_changes(name, config, self.of_weights(factors))
    }

    /// Adds an adapter of given changes, by the path of their parameter, and makes it the active one.
    ///
    /// # Errors
    ///
    /// As [`insert_adapter`](Self::insert_adapter).
    pub fn insert_changes(
        &mut self,
        name: &str,
        config: &PeftConfig,
        changes: Vec<(String, Change)>,
    ) -> Result<()> {
        self.check_new_name(name)?;
        let states = self.attached(name, config, changes)?;
        self.adapters.push((name.into(), config.clone()));
        self.update(states);
        self.use_adapters(Active::one(name));
        Ok(())
    }

    /// Gives an adapter other factors, and another configuration, in place: whether it is active, and with which weight, stays,
    /// and so do the ids of parameters whose module had the adapter before. Whatever has nothing new loses what it had.
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
        self.swap_changes(name, config, self.of_weights(factors))
    }

    /// As [`swap_adapter`](Self::swap_adapter), of changes by the path of their parameter.
    ///
    /// # Errors
    ///
    /// As [`swap_adapter`](Self::swap_adapter).
    pub fn swap_changes(
        &mut self,
        name: &str,
        config: &PeftConfig,
        changes: Vec<(String, Change)>,
    ) -> Result<()> {
        self.config(name)?;
        let states = self.attached(name, config, changes)?;
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

    /// These factors by the paths of their parameters: that of a module's weight, or of a tensor of experts.
    fn of_weights(&self, factors: Vec<(String, Lora)>) -> Vec<(String, Change)> {
        let sites = self.sites();
        let factors = factors.into_iter();
        factors
            .map(
                |(path, lora)| match sites.iter().any(|site| site.path == path) {
                    true => (path, lora.into()),
                    false => (format!("{path}.weight"), lora.into()),
                },
            )
            .collect()
    }

    /// The states of the parameters that get these changes, by their paths, each with the adapter in its old place or the last.
    fn attached(
        &self,
        name: &str,
        config: &PeftConfig,
        changes: Vec<(String, Change)>,
    ) -> Result<HashMap<String, PeftWeight>> {
        let sites = self.sites();
        let mut states: HashMap<String, PeftWeight> = HashMap::new();
        for (path, change) in changes {
            let site = sites.iter().find(|site| site.path == path);
            let site = site.ok_or_else(|| PeftError::UnknownModule { path: path.clone() })?;
            refuse_foreign(site)?;
            check_fit(name, config, site, &change)?;
            let old = site.state_or_new();
            let state = states.entry(path).or_insert_with(|| {
                let mut state = old.clone();
                state.layout = site.layout();
                // What has nothing new is gone, but the place among the adapters stays.
                state.adapters.retain(|adapter| adapter.name != name);
                state
            });
            if state.changes(name).any(|other| other.is_like(&change)) {
                return Err(PeftError::AdapterName {
                    name: name.into(),
                    reason: format!("its factors name module `{}` twice", site.module()),
                });
            }
            let before = old.changes(name).find(|old| old.is_like(&change));
            let change = match before {
                Some(before) => change.with_ids_of(before),
                None => change,
            };
            let first = old.adapters.iter().position(|adapter| adapter.name == name);
            let place = first.map_or(state.adapters.len(), |first| {
                first + state.changes(name).count()
            });
            state.adapters.insert(
                place,
                NamedChange {
                    name: name.into(),
                    change,
                },
            );
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
        let changes = self.changes(name)?.into_iter();
        let factors = changes.filter_map(|(path, change)| match change {
            Change::Lora(lora) => Some((module_of(&path).to_owned(), lora)),
            _ => None,
        });
        Ok(factors.collect())
    }

    /// All changes of an adapter with the paths of their parameters, in the order of the model. Tensors are shared.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`].
    pub fn changes(&self, name: &str) -> Result<Vec<(String, Change)>> {
        self.config(name)?;
        let mut found = Vec::new();
        for site in collect(self.module()) {
            let changes = site.state.iter().flat_map(|state| state.changes(name));
            found.extend(changes.map(|change| (site.path.clone(), change.clone())));
        }
        Ok(found)
    }

    /// The parameters of all adapters as a group, for instance to record them without the base:
    /// `model.into_record_group(group)`.
    pub fn adapter_params(&self) -> ParamGroup {
        let sites = collect(self.module());
        let states = sites.iter().filter_map(|site| site.state.as_ref());
        let changes = states.flat_map(|state| &state.adapters);
        ParamGroup::from_ids(
            changes
                .flat_map(|adapter| list_param_ids(&adapter.change))
                .collect(),
        )
    }

    /// What is attached where, what trains, and what it weighs.
    pub fn report(&self) -> ModelReport {
        ModelReport::new(collect(self.module()), self.active.clone(), self.enabled)
    }

    /// Every float parameter with what is attached to it, in the model's order. One of three axes that is no convolution's may be
    /// the weights of experts.
    pub(super) fn sites(&self) -> Vec<Site> {
        let mut sites = collect(self.module());
        for site in &mut sites {
            if site.layer.is_none() && site.shape.len() == 3 {
                site.layer = Some(LayerKind::Experts(self.experts));
            }
        }
        sites
    }

    /// Every float parameter, in the model's order.
    pub(crate) fn parameters(&self) -> Vec<Parameter> {
        let sites = self.sites();
        let parameters = sites.iter().map(|site| Parameter {
            path: site.path.clone(),
            torch_name: site.torch_name().to_owned(),
            shape: site.dense_shape(),
            layer: site.layer,
            groups: site.state.as_ref().map_or(1, PeftWeight::groups),
            device: self.device_of(site),
        });
        parameters.collect()
    }

    /// The dense weights of the modules at these paths, `[d_in, d_out]`, shared; a packed one is an empty matrix.
    #[cfg(feature = "faer")]
    pub(crate) fn dense_weights(
        &self,
        module: impl Fn(&str) -> bool,
    ) -> HashMap<String, burn::tensor::Tensor<2>> {
        let mut sites = collect(self.module());
        sites.retain(|site| site.is_target() && module(site.module()));
        let weights = dense_weights(self.module(), &sites).into_iter();
        weights
            .map(|(path, weight)| (module_of(&path).to_owned(), weight))
            .collect()
    }

    pub(super) fn linear_sites(&self) -> Vec<Site> {
        let mut sites = collect(self.module());
        sites.retain(Site::is_linear);
        sites
    }

    fn resolve(&self, targets: &TargetConfig, sites: &[Site]) -> Result<TargetReport> {
        targets
            .compile(self.head_of(sites))?
            .resolve(&modules(sites))
    }

    /// Path of the output head.
    pub(super) fn head_of<'a>(&self, sites: &'a [Site]) -> Option<&'a str> {
        let suffix = format!(".{}", self.head);
        let linear = sites.iter().filter(|site| site.is_linear());
        let mut paths = linear.map(Site::module);
        paths.find(|path| *path == self.head || path.ends_with(&suffix))
    }

    pub(super) fn device_of(&self, site: &Site) -> Device {
        match site.nf4() {
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

/// Path of the module of a parameter called `weight`.
fn module_of(path: &str) -> &str {
    path.strip_suffix(".weight").unwrap_or(path)
}

/// The weight of the module at `path`.
pub(super) fn find<'a, S: std::borrow::Borrow<Site>>(sites: &'a [S], path: &str) -> Result<&'a S> {
    let mut sites = sites.iter();
    sites
        .find(|site| (*site).borrow().is_target() && (*site).borrow().module() == path)
        .ok_or_else(|| PeftError::UnknownModule { path: path.into() })
}

/// Whether a change fits the parameter and is what the configuration says.
fn check_fit(name: &str, config: &PeftConfig, site: &Site, change: &Change) -> Result<()> {
    let shape = |expected: Vec<usize>, found: Vec<usize>| match expected == found {
        true => Ok(()),
        false => Err(PeftError::Shape {
            tensor: format!("{} (adapter `{name}`)", site.module()),
            expected,
            found,
        }),
    };
    match change {
        Change::Lora(_) if site.layer.is_none() => Err(PeftError::UnknownModule {
            path: site.module().into(),
        }),
        Change::Lora(lora) => {
            let (dims, found) = (site.dims(), lora.dims());
            let slices = lora.config().slices.all_equal();
            // PEFT's factor `A` of a convolution sees the channels of all groups, of which the weight has one's.
            let of_all_groups = site.layout() == WeightLayout::Kernel
                && lora.magnitude.is_none()
                && slices.is_some_and(|groups| found == [groups.saturating_mul(dims[0]), dims[1]]);
            if !of_all_groups {
                shape(dims.into(), found.into())?;
            }
            if let Some(experts) = site.experts()
                && (slices != Some(experts) || lora.magnitude.is_some() || lora.bias.is_some())
            {
                return Err(PeftError::Config {
                    name: format!("the change of `{}`", site.path),
                    value: format!("{:?}", lora.config()),
                    expected: format!("plain factors for each of {experts} experts: equal slices"),
                });
            }
            for (what, found, expected) in [
                ("dora", lora.magnitude.is_some(), config.lora.dora),
                ("bias of B", lora.bias.is_some(), config.lora.bias),
            ] {
                if found != expected {
                    return Err(PeftError::Config {
                        name: format!("{what} of `{}`", site.module()),
                        value: found.to_string(),
                        expected: format!("the adapter's own: {expected}"),
                    });
                }
            }
            Ok(())
        }
        Change::Copy(copy) => shape(site.dense_shape(), copy.shape().to_vec()),
        Change::Rows(rows) => {
            let mut dense = site.dense_shape();
            if rows.is_of_head() {
                dense.reverse();
            }
            let [count, features] = dense[..] else {
                return shape(dense, rows.rows.lazy_shape().to_vec());
            };
            let most = rows.indices().iter().map(|&index| index + 1).max();
            let found = [most.unwrap_or(0).max(count), rows.rows.lazy_shape()[1]];
            shape([count, features].into(), found.into())
        }
    }
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
