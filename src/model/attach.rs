//! Putting adapters on a model: fresh ones, given ones, and given ones in the place of others.
//!
//! What can fail is planned on what the model has, so that an error changes nothing.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor};

use super::active::Active;
use super::config::PeftConfig;
use super::fresh::{Copies, Weights, fresh};
use super::parameters::{biases, named_modules, target_parameters, tokens};
use super::peft_model::{Adapter, PeftModel, refuse_foreign, targets_by_module};
use super::report::AttachReport;
use super::target::{TargetModules, TargetReport};
use super::tied::{TiedPart, part_of};
use super::traverse::Site;
use super::weight::{NF4, NamedChange, PeftWeight};
use crate::adapter::{Change, Lora};
use crate::layer::{LayerKind, WeightLayout};
use crate::{PeftError, Result};

/// Longest name of an adapter, in bytes: that of a file's name on most systems.
const MAX_NAME: usize = 255;

/// Checks the name of an adapter, which becomes a part of parameters' paths and of the path of its folder. PEFT takes the same names, and
/// those with a slash, a backslash or a colon too.
///
/// # Errors
///
/// [`PeftError::AdapterName`].
pub(crate) fn check_adapter_name(name: &str) -> Result<()> {
    let forbidden = |c: &char| c.is_control() || matches!(c, '.' | '/' | '\\' | ':');
    let reason = if name.is_empty() || name.len() > MAX_NAME {
        format!("it must have 1 to {MAX_NAME} bytes")
    } else if name == NF4 {
        "it is the name of the packed base".into()
    } else if let Some(c) = name.chars().find(forbidden) {
        // A dot separates paths of parameters, the others those of files.
        format!(
            "it holds {c:?}; dots, slashes, backslashes, colons and control characters are not allowed"
        )
    } else {
        return Ok(());
    };
    Err(PeftError::AdapterName {
        name: name.into(),
        reason,
    })
}

/// How an adapter joins a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Joining {
    /// Whether it trains while it is active.
    pub trainable: bool,
    /// Whether it becomes the active adapter; `None` if and only if the model has no other.
    pub activate: Option<bool>,
    /// Whether its values were taken of the base as it is now.
    pub of_base: bool,
    /// Whether it is known that a file can describe it.
    pub described: bool,
}

impl Default for Joining {
    fn default() -> Self {
        Self {
            trainable: true,
            activate: None,
            of_base: false,
            described: false,
        }
    }
}

impl<M: Module> PeftModel<M> {
    /// Adds a fresh adapter. It becomes the active one if the model had none; a later one stays inactive, and without gradient,
    /// until [`set_adapter`](Self::set_adapter) chooses it, as in PEFT.
    ///
    /// An adapter may do without low-rank changes: with no name in `target_modules`, [`modules_to_save`](PeftConfig::modules_to_save),
    /// [`bias`](PeftConfig::bias) or [`trainable_tokens`](PeftConfig::trainable_tokens) alone decide what trains.
    ///
    /// # Errors
    ///
    /// [`PeftError::AdapterName`] if the name is not one or is taken; those of [`LoraConfig::init_on`] and of the
    /// targets, for instance [`PeftError::UnmatchedPatterns`] with the nearest names;
    /// [`PeftError::ForeignReparameterization`]. The model has not changed then.
    ///
    /// [`LoraConfig::init_on`]: crate::adapter::LoraConfig::init_on
    pub fn add_adapter(&mut self, name: &str, config: &PeftConfig) -> Result<AttachReport> {
        self.check_new_name(name)?;
        let all = self.sites_with_head()?;
        let saved = named_modules("modules_to_save", &all, &config.modules_to_save)?;
        let saved_paths: HashSet<&str> = saved.iter().map(|site| site.path.as_str()).collect();
        let all_linear = config.targets.target_modules == TargetModules::AllLinear;
        let sites = all
            .iter()
            .filter(|site| site.is_target() && (site.is_linear() || !all_linear));
        let by_module = targets_by_module(sites.clone());
        let matcher = config.targets.compile(self.head_of(&all))?;
        let candidates: Vec<_> = sites
            .filter(|site| !saved_paths.contains(site.path.as_str()))
            .map(|site| site.module().to_owned())
            .collect();
        let mut matched = target_parameters(&all, &config.target_parameters)?;
        let unnamed = matches!(&config.targets.target_modules, TargetModules::List(names) if names.is_empty());
        let otherwise = !matched.is_empty() || config.has_more_than_targets();
        let targets = match unnamed && otherwise {
            true => TargetReport::default(),
            false => matcher.resolve(&candidates)?,
        };
        let mut taken: HashSet<&str> = matched.iter().map(|site| site.path.as_str()).collect();
        for target in &targets.matched {
            let site = by_module[target.path.as_str()];
            if taken.insert(&site.path) {
                matched.push(site);
            }
        }
        let needing = matched.iter().filter(|_| config.lora.needs_weight());
        let mut dense = Weights::of(needing.copied());
        self.walk_with_head(&mut dense);
        let dense = dense.found;
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
            if !saved_paths.contains(site.path.as_str()) {
                copied.push(site);
            }
        }
        let rows = tokens(&all, config.trainable_tokens.as_ref())?;
        let mut seen = Copies::new(&copied, &rows, config.lora.dtype);
        self.walk_with_head(&mut seen);
        changes.extend(seen.changes?);
        if changes.is_empty() {
            return Err(PeftError::NoTargets {
                candidates: candidates.len(),
                excluded: targets.excluded.len(),
            });
        }
        let joining = Joining {
            of_base: config.lora.needs_weight() && !matched.is_empty(),
            ..Joining::default()
        };
        self.join(name, config, changes, joining)?;
        Ok(AttachReport {
            targets,
            model: self.report(),
            notes: self.tied_notes(name),
        })
    }

    /// Adds an adapter of given factors, by the path of their module. It becomes the active one if the model had none.
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

    /// Adds an adapter of given changes, by the path of their parameter. It becomes the active one if the model had none.
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
        self.join(name, config, changes, Joining::default())
    }

    /// Adds an adapter of given changes, by the path of their parameter.
    ///
    /// # Errors
    ///
    /// As [`insert_adapter`](Self::insert_adapter).
    pub(crate) fn join(
        &mut self,
        name: &str,
        config: &PeftConfig,
        changes: Vec<(String, Change)>,
        joining: Joining,
    ) -> Result<()> {
        self.check_new_name(name)?;
        let activate = joining.activate.unwrap_or(self.adapters.is_empty());
        let sites = self.sites();
        let mut states = self.attached(&sites, name, config, changes.clone(), joining.trainable)?;
        if !joining.described {
            self.describe(&sites, config, &changes)?;
        }
        if activate {
            self.active = Active::one(name);
            for site in sites {
                if let (Some(state), false) = (site.state, states.contains_key(&site.path)) {
                    states.insert(site.path, state);
                }
            }
        }
        for state in states.values_mut() {
            state.activate(&self.active);
        }
        self.adapters.push(Adapter {
            name: name.into(),
            config: config.clone(),
            trainable: joining.trainable,
            of_base: joining.of_base,
        });
        self.update(states);
        Ok(())
    }

    /// Gives an adapter other factors, and another configuration, in place: whether it is active, with which weight, and whether
    /// it trains stay, and so do the ids of parameters whose module had the adapter before. Modules that have no new factors lose
    /// their old ones.
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
    /// As [`swap_adapter`](Self::swap_adapter); [`PeftError::Config`] for values of a whole parameter, or of rows, while rows of a
    /// batch use the adapter: they can have low-rank changes only.
    pub fn swap_changes(
        &mut self,
        name: &str,
        config: &PeftConfig,
        changes: Vec<(String, Change)>,
    ) -> Result<()> {
        self.swap(name, config, changes, false)
    }

    /// See [`swap_changes`](Self::swap_changes); `described`: it is known that a file can describe the adapter.
    pub(crate) fn swap(
        &mut self,
        name: &str,
        config: &PeftConfig,
        changes: Vec<(String, Change)>,
        described: bool,
    ) -> Result<()> {
        let trainable = self.adapter(name)?.trainable;
        if matches!(&self.active, Active::Rows(_)) && self.active.uses(name) {
            refuse_own_values(name, &changes)?;
        }
        let sites = self.sites();
        let mut states = self.attached(&sites, name, config, changes.clone(), trainable)?;
        if !described {
            self.describe(&sites, config, &changes)?;
        }
        for site in sites {
            let Some(mut state) = site.state else {
                continue;
            };
            if state.changes(name).next().is_some() && !states.contains_key(&site.path) {
                state.adapters.retain(|adapter| adapter.name != name);
                states.insert(site.path, state);
            }
        }
        for state in states.values_mut() {
            state.activate(&self.active);
        }
        for adapter in &mut self.adapters {
            if adapter.name == name {
                adapter.config = config.clone();
                adapter.of_base = false;
            }
        }
        self.update(states);
        Ok(())
    }

    /// These factors by the paths of their parameters: that of a module's weight, or of a tensor of experts.
    pub(super) fn of_weights(&self, factors: Vec<(String, Lora)>) -> Vec<(String, Change)> {
        let sites = self.sites();
        let paths: HashSet<&str> = sites.iter().map(|site| site.path.as_str()).collect();
        factors
            .into_iter()
            .map(|(path, lora)| match paths.contains(path.as_str()) {
                true => (path, lora.into()),
                false => (format!("{path}.weight"), lora.into()),
            })
            .collect()
    }

    /// The states of the parameters that get these changes, by their paths, each with the adapter in its old place or the last.
    fn attached(
        &self,
        sites: &[Site],
        name: &str,
        config: &PeftConfig,
        changes: Vec<(String, Change)>,
        trainable: bool,
    ) -> Result<HashMap<String, PeftWeight>> {
        let head = self.head_site(sites)?;
        let rows_of_head = head.as_ref().is_some_and(|head| {
            let mut changes = changes.iter();
            changes.any(|(path, change)| *path == head.path && matches!(change, Change::Rows(_)))
        });
        let by_path: HashMap<&str, &Site> = sites
            .iter()
            .map(|site| (site.path.as_str(), site))
            .collect();
        let mut states: HashMap<String, PeftWeight> = HashMap::with_capacity(changes.len());
        for (path, change) in changes {
            let mut site = by_path.get(path.as_str()).copied();
            let (mut path, mut part) = (path, TiedPart::Both);
            if let (None, Some(head)) = (site, head.as_ref().filter(|head| head.path == path)) {
                check_fit(name, config, head, &change)?;
                part = TiedPart::Head;
                path = self.embedding_of_head(&head.path, sites).unwrap_or(path);
                site = by_path.get(path.as_str()).copied();
            }
            let site = site.ok_or_else(|| PeftError::UnknownModule { path: path.clone() })?;
            refuse_foreign(site)?;
            if part == TiedPart::Both {
                check_fit(name, config, site, &change)?;
                part = part_of(site, &change, config.ensure_weight_tying, rows_of_head);
            }
            self.check_part(site, &change, part, config)?;
            let old = site.state_or_new();
            let state = states.entry(path).or_insert_with(|| {
                let mut state = old.clone();
                state.layout = site.layout();
                state.head = self.head_read(site);
                state.looks_up = site.layer == Some(LayerKind::Embedding);
                state.enabled = self.enabled;
                state.compose = self.compose;
                // What has nothing new is gone, but the place among the adapters stays.
                state.adapters.retain(|adapter| adapter.name != name);
                state
            });
            let is_like = |other: &NamedChange| {
                other.name == name && other.part == part && other.change.is_like(&change)
            };
            if state.adapters.iter().any(is_like) {
                return Err(PeftError::AdapterName {
                    name: name.into(),
                    reason: format!("its factors name module `{}` twice", site.module()),
                });
            }
            let change = match old.adapters.iter().find(|old| is_like(old)) {
                Some(before) => change.clone().with_ids_of(&before.change),
                None => change.clone(),
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
                    part,
                    trainable,
                },
            );
        }
        Ok(states)
    }

    pub(super) fn check_new_name(&self, name: &str) -> Result<()> {
        check_adapter_name(name)?;
        match self.adapters().any(|adapter| adapter == name) {
            false => Ok(()),
            true => Err(PeftError::AdapterName {
                name: name.into(),
                reason: "the model has an adapter of that name: take another name, `delete_adapter` the old one, or swap them by \
                         `LoadOptions::replace`"
                    .into(),
            }),
        }
    }
}

/// Rows of a batch can have low-rank changes of their own only.
pub(super) fn refuse_own_values(name: &str, changes: &[(String, Change)]) -> Result<()> {
    let own = changes.iter().find(|(_, change)| change.lora().is_none());
    match own {
        None => Ok(()),
        Some((path, _)) => Err(PeftError::config(
            format!("rows of adapter `{name}`"),
            format!("its own values of `{path}`"),
            "low-rank changes only, of which every row can have its own",
        )),
    }
}

/// Refuses a dtype that no file of an adapter holds, so that saving does not fail on it at the end.
fn check_dtype(name: &str, site: &Site, change: &Change) -> Result<()> {
    struct Seen(Option<DType>);
    impl ModuleVisitor for Seen {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let dtype = param.val().dtype();
            if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
                self.0 = Some(dtype);
            }
        }
    }
    let mut seen = Seen(None);
    change.visit(&mut seen);
    match seen.0 {
        None => Ok(()),
        Some(dtype) => Err(PeftError::DType {
            tensor: format!("{} (adapter `{name}`)", site.module()),
            expected: "F32, BF16 or F16, which files hold: `LoraConfig::with_dtype` chooses it"
                .into(),
            found: format!("{dtype:?}"),
        }),
    }
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
    check_dtype(name, site, change)?;
    match change {
        Change::Lora(_) if site.layer.is_none() => Err(PeftError::UnknownModule {
            path: site.module().into(),
        }),
        Change::Lora(_) if !site.path.contains('.') => Err(PeftError::config(
            "the model",
            "one layer, without a name of its own",
            "a module that holds the layer in a field: PEFT names what it adapts by the path of that field",
        )),
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
                return Err(PeftError::config(
                    format!("the change of `{}`", site.path),
                    format!("{:?}", lora.config()),
                    format!("plain factors for each of {experts} experts: equal slices"),
                ));
            }
            let own = lora.config();
            for (what, found, expected) in [
                ("DoRA", own.dora.to_string(), config.lora.dora.to_string()),
                (
                    "bias of B",
                    own.bias.to_string(),
                    config.lora.bias.to_string(),
                ),
                (
                    "rsLoRA",
                    own.rslora.to_string(),
                    config.lora.rslora.to_string(),
                ),
                (
                    "dropout",
                    own.dropout.to_string(),
                    config.lora.dropout.to_string(),
                ),
            ] {
                // PEFT gives an embedding no bias of B.
                let none = what == "bias of B" && site.layer == Some(LayerKind::Embedding);
                if found != expected && !none {
                    return Err(PeftError::config(
                        format!("{what} of `{}`", site.module()),
                        found,
                        format!("{expected}, as in the configuration of the whole adapter"),
                    ));
                }
            }
            Ok(())
        }
        Change::Copy(copy) => shape(site.shape.clone(), copy.shape().to_vec()),
        Change::Rows(rows) => {
            let mut dense = site.shape.clone();
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
