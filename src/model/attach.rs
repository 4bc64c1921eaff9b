//! Putting adapters on a model: fresh ones, given ones, and given ones in the place of others.
//!
//! What can fail is planned on what the model has, so that an error changes nothing.

use std::collections::HashMap;

use burn::module::Module;

use super::active::Active;
use super::config::PeftConfig;
use super::fresh::{Copies, Weights, fresh};
use super::parameters::{biases, named_modules, target_parameters, tokens};
use super::peft_model::{PeftModel, find, refuse_foreign};
use super::report::AttachReport;
use super::target::{TargetModules, TargetReport};
use super::tied::{TiedPart, part_of};
use super::traverse::Site;
use super::weight::{NF4, NamedChange, PeftWeight};
use crate::adapter::{Change, Lora};
use crate::layer::WeightLayout;
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

impl<M: Module> PeftModel<M> {
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
        let all = self.sites_with_head()?;
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
            if !copied.iter().any(|saved| saved.path == site.path) {
                copied.push(site);
            }
        }
        let rows = tokens(&all, config.trainable_tokens.as_ref())?;
        let mut seen = Copies::new(&copied, &rows, config.lora.dtype);
        self.walk_with_head(&mut seen);
        changes.extend(seen.changes?);
        self.insert_changes(name, config, changes)?;
        Ok(AttachReport {
            targets,
            model: self.report(),
            notes: self.tied_notes(name),
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
        let head = self.head_site(&sites)?;
        let rows_of_head = head.as_ref().is_some_and(|head| {
            let mut changes = changes.iter();
            changes.any(|(path, change)| *path == head.path && matches!(change, Change::Rows(_)))
        });
        let mut states: HashMap<String, PeftWeight> = HashMap::new();
        for (path, change) in changes {
            let mut site = sites.iter().find(|site| site.path == path);
            let (mut path, mut part) = (path, TiedPart::Both);
            if let (None, Some(head)) = (site, head.as_ref().filter(|head| head.path == path)) {
                check_fit(name, config, head, &change)?;
                part = TiedPart::Head;
                path = self.embedding_of_head(&head.path, &sites).unwrap_or(path);
                site = sites.iter().find(|site| site.path == path);
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
                reason: "the model has an adapter of that name".into(),
            }),
        }
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
            for (what, found, expected) in [
                ("dora", lora.magnitude.is_some(), config.lora.dora),
                ("bias of B", lora.bias.is_some(), config.lora.bias),
            ] {
                if found != expected {
                    return Err(PeftError::config(
                        format!("{what} of `{}`", site.module()),
                        found,
                        format!("the adapter's own: {expected}"),
                    ));
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
