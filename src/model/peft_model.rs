//! A model of any kind with adapters, as PEFT's `PeftModel` in Python.

use std::collections::{BTreeMap, HashMap, HashSet};

use burn::module::{Module, Param, ParamGroup, list_param_ids};
use burn::tensor::{DType, Device, FloatDType, Tensor};

use super::active::Active;
use super::compose::ComposeOptions;
use super::config::PeftConfig;
#[cfg(feature = "faer")]
use super::fresh::dense_weights;
use super::parameters::is_named;
use super::quantize::{self, QuantizeReport};
use super::report::ModelReport;
use super::shown_groups::shown_groups;
use super::target::{TargetConfig, TargetReport};
use super::tied::{SharedHead, TiedPart};
use super::traverse::{See, Site, collect, edit, walk};
use super::vocabulary::{DEFAULT_HEAD, TokenLayer, output_head};
use super::weight::{NamedChange, PeftWeight};
use crate::adapter::{Change, Lora};
use crate::layer::{ExpertLayout, LayerKind};
use crate::nf4::Nf4Config;
use crate::{PeftError, Result};

/// Name of the adapter that PEFT writes without a folder of its own.
pub const DEFAULT_ADAPTER: &str = "default";

/// Any Burn module with adapters on its weights: low-rank changes of linear layers, embeddings and convolutions, and copies of
/// whole parameters.
///
/// It derefs to the module and is transparent as a [`Module`]: parameter paths and ids are those of the module inside,
/// with what is attached under `<weight>.peft.<adapter>.a` and `.b` (and `<weight>.peft.nf4` for a packed base). Only the
/// factors of the active adapter require a gradient; everything that was in the model when it was wrapped is frozen.
///
/// # Names
///
/// Modules and parameters are named by their fields, as in PyTorch: `layers.0.norm`. A module that is an enum, such as Burn's
/// [`Normalization`](burn::nn::norm::Normalization), is named without its variant; only Burn's records have it, as in
/// `layers.0.norm.Rms.gamma`.
///
/// # Errors and clones
///
/// Every operation that can fail plans first and leaves the model as it was on an error. Clones are cheap (tensors are
/// shared) and independent: activating an adapter in one does not show in another. Running statistics are the exception: as with any
/// module of Burn, clones share those of a `BatchNorm`, and a forward pass in training by one changes them for all. A
/// [`reference`](Self::reference) and a [`merged`](Self::merged) module have their own.
///
/// The methods of `PeftModel` hide those of the model inside that have the same name, such as `config`, `report`, `status`, `head` or
/// `merge`. [`module`](Self::module) and [`module_mut`](Self::module_mut) give the model itself: `model.module().config()`.
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
    pub(super) adapters: Vec<Adapter>,
    pub(super) active: Active,
    pub(super) enabled: bool,
    pub(super) compose: ComposeOptions,
    /// Name of the output head, if the user has given one.
    pub(super) head: Option<String>,
    pub(super) experts: ExpertLayout,
    /// How many groups convolutions have, by their paths or the ends of those.
    pub(super) groups: BTreeMap<String, usize>,
    /// The embedding whose weight the output head shares, where that is known.
    pub(super) shared_head: Option<SharedHead>,
    /// The linear layers whose weights PyTorch holds as `[d_in, d_out]`, by their paths or the ends of those, where that is known.
    pub(super) conv1d: Option<Vec<String>>,
}

/// An adapter of a model, beside what is attached to the parameters.
#[derive(Clone, Debug)]
pub(super) struct Adapter {
    pub name: String,
    pub config: PeftConfig,
    /// Whether it trains while it is in use.
    pub trainable: bool,
    /// Whether its values were taken of the base as it was when the adapter was added: DoRA's magnitude, the factors of PiSSA.
    pub of_base: bool,
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
    /// Dtype of its dense value; unknown while it is not initialised.
    pub dtype: Option<FloatDType>,
    /// Whether it is no parameter of the model, but the weight that an output head shares with an embedding.
    pub tied_head: bool,
    /// Whether PyTorch holds it as `[d_in, d_out]`, as transformers' `Conv1D` does; unknown unless the model was told.
    pub conv1d: Option<bool>,
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
            compose: ComposeOptions::default(),
            head: None,
            experts: ExpertLayout::default(),
            groups: BTreeMap::new(),
            shared_head: None,
            conv1d: None,
        }
    }

    /// Names the output head, which `"all-linear"` leaves out as PEFT does: a module path, or its end. Default: `lm_head`; in
    /// a model without one, the only linear layer with another usual name (`embed_out`, `proj_out`, `output`, `head`, ...) that has
    /// an output for each token of the input embedding.
    pub fn with_head(mut self, head: impl Into<String>) -> Self {
        self.head = Some(head.into());
        self
    }

    /// Says how tensors of experts lie, which [`target_parameters`](PeftConfig::target_parameters) name.
    pub fn with_expert_layout(mut self, layout: ExpertLayout) -> Self {
        self.experts = layout;
        self
    }

    /// Says how many groups the convolution of this path, or of a path that ends so, has. PEFT's files of adapters on such a
    /// convolution have shapes that follow from it, and Burn does not show it to code that walks a model.
    ///
    /// It is needed for a model that does not derive `Debug` only: the groups are read from that, and from the first pass by
    /// [`forward_peft`](super::PeftForward::forward_peft).
    pub fn with_conv_groups(mut self, path: impl Into<String>, groups: usize) -> Self {
        self.groups.insert(path.into(), groups);
        self
    }

    /// Says which linear layers are transformers' `Conv1D` in PyTorch, as all those of a GPT-2 block are: by their paths, or the ends of
    /// those. Files hold the weights of such modules as `[d_in, d_out]`, so that copies and base values of them are read and written
    /// without a transpose. Factors of adapters do not depend on it. Default: told by the shapes, where those tell it.
    pub fn with_conv1d<S: Into<String>>(mut self, modules: impl IntoIterator<Item = S>) -> Self {
        let known = self.conv1d.get_or_insert_default();
        known.extend(modules.into_iter().map(Into::into));
        self
    }

    /// Whether the output head has a weight of its own.
    pub(crate) fn has_own_head(&self) -> bool {
        self.head_path().is_some()
    }

    /// Name of the output head, as it was given or as most models have it.
    pub(crate) fn head(&self) -> &str {
        self.head.as_deref().unwrap_or(DEFAULT_HEAD)
    }

    /// Path of the output head, if the model has one that is a layer of its own.
    pub(crate) fn head_path(&self) -> Option<String> {
        let sites = collect(self.module());
        self.head_of(&sites).map(str::to_owned)
    }

    /// The name of the output head, if the user has given one.
    pub(crate) fn named_head(&self) -> Option<&str> {
        self.head.as_deref()
    }

    /// The module with its adapters attached.
    pub fn module(&self) -> &M {
        self.module
            .as_ref()
            .expect("only empty inside an operation")
    }

    /// The module, to change its state: a key-value cache, a counter, a probability of dropout.
    ///
    /// What is attached to a parameter belongs to the parameter. Change no parameter here: one that is replaced has no adapter any more,
    /// is not packed, and trains. [`status`](Self::status) shows what every adapter has.
    pub fn module_mut(&mut self) -> &mut M {
        self.module
            .as_mut()
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
    /// already; [`PeftError::Config`] for one with an adapter whose values were taken of the dense weight (DoRA's magnitude, the
    /// factors of PiSSA and the like): pack first, then add the adapter, so that it is of the weight that it will change;
    /// [`PeftError::ForeignReparameterization`]; and those of the targets. Nothing has changed then (only the
    /// initialiser of a weight not yet initialised can still fail later, by yielding what is not finite).
    pub fn quantize_nf4(
        &mut self,
        targets: &TargetConfig,
        config: &Nf4Config,
    ) -> Result<QuantizeReport> {
        let sites = self.linear_sites();
        let chosen = self.resolve(targets, &sites)?;
        self.refuse_of_base(&sites, &chosen)?;
        let module = self.module.take().expect("only empty inside an operation");
        let (module, report) = quantize::quantize(module, sites, &chosen, config);
        self.module = Some(module);
        report
    }

    /// Packing changes a weight. An adapter that was made for the weight as it was would no longer be none at the start.
    fn refuse_of_base(&self, sites: &[Site], chosen: &TargetReport) -> Result<()> {
        let of_base = self.adapters.iter().filter(|adapter| adapter.of_base);
        let of_base: Vec<&str> = of_base.map(|adapter| adapter.name.as_str()).collect();
        if of_base.is_empty() {
            return Ok(());
        }
        let chosen = chosen.matched.iter().map(|target| target.path.as_str());
        let chosen: HashSet<&str> = chosen.collect();
        for site in sites.iter().filter(|site| chosen.contains(site.module())) {
            let adapters = site.state.iter().flat_map(|state| &state.adapters);
            let mut made = adapters.filter(|adapter| {
                adapter.change.lora().is_some() && of_base.contains(&adapter.name.as_str())
            });
            if let Some(NamedChange { name, .. }) = made.next() {
                return Err(PeftError::config(
                    format!("weight of `{}`", site.module()),
                    format!("dense, with values of adapter `{name}` that were computed from it"),
                    "no such adapter: pack the weight first and add the adapter then, or delete the adapter",
                ));
            }
        }
        Ok(())
    }

    /// Removes an adapter, and takes it out of use.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`].
    pub fn delete_adapter(&mut self, name: &str) -> Result<()> {
        self.config(name)?;
        self.adapters.retain(|adapter| adapter.name != name);
        self.active.retain(|adapter| adapter != name);
        self.change(|state| {
            state.adapters.retain(|adapter| adapter.name != name);
            state.active.retain(|adapter| adapter != name);
        });
        Ok(())
    }

    /// Gives an adapter another name. Whether it is in use, and whether it trains, stay as they are.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`]; [`PeftError::AdapterName`] if the new name is not one or is taken. The model has not changed
    /// then.
    pub fn rename_adapter(&mut self, name: &str, new_name: &str) -> Result<()> {
        self.config(name)?;
        if name == new_name {
            return Ok(());
        }
        self.check_new_name(new_name)?;
        for adapter in &mut self.adapters {
            if adapter.name == name {
                adapter.name = new_name.into();
            }
        }
        self.active.rename(name, new_name);
        self.change(|state| {
            for adapter in &mut state.adapters {
                if adapter.name == name {
                    adapter.name = new_name.into();
                }
            }
            state.active.rename(name, new_name);
        });
        Ok(())
    }

    /// Names of all adapters, in the order they were added.
    pub fn adapters(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().map(|adapter| adapter.name.as_str())
    }

    /// The configuration of an adapter.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`].
    pub fn config(&self, name: &str) -> Result<&PeftConfig> {
        self.adapter(name).map(|adapter| &adapter.config)
    }

    pub(super) fn adapter(&self, name: &str) -> Result<&Adapter> {
        let mut adapters = self.adapters.iter();
        adapters
            .find(|adapter| adapter.name == name)
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

    /// All changes of an adapter with the paths of their parameters, in the order of the model. Tensors are shared. What changes a tied
    /// output head alone has the path that the head's weight would have.
    ///
    /// # Errors
    ///
    /// [`PeftError::UnknownAdapter`].
    pub fn changes(&self, name: &str) -> Result<Vec<(String, Change)>> {
        self.config(name)?;
        let mut found = Vec::new();
        for site in collect(self.module()) {
            let own = site.state.iter().flat_map(|state| &state.adapters);
            for own in own.filter(|own| own.name == name) {
                let path = match own.part {
                    TiedPart::Head => self.head_weight(),
                    _ => site.path.clone(),
                };
                found.push((path, own.change.clone()));
            }
        }
        Ok(found)
    }

    /// The parameters of all adapters as a group, for instance to record them without the base:
    /// `model.into_record_group(group)`.
    pub fn adapter_params(&self) -> ParamGroup {
        let sites = collect(self.module());
        let states = sites.iter().filter_map(|site| site.state.as_ref());
        let changes = states.flat_map(|state| &state.adapters);
        let changes = changes.filter(|adapter| !adapter.change.is_base());
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
    #[cfg(feature = "optim")]
    pub(crate) fn parameters(&self) -> Vec<Parameter> {
        self.parameters_of(&self.sites())
    }

    /// Every float parameter, and the weight of an output head that shares an embedding's, as a file of PEFT sees them.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for a tied head that was declared and cannot be.
    pub(crate) fn parameters_with_head(&self) -> Result<Vec<Parameter>> {
        let sites = self.sites();
        let mut parameters = self.parameters_of(&sites);
        if let Some(head) = self.head_site(&sites)? {
            let head = self.parameters_of(std::slice::from_ref(&head)).into_iter();
            parameters.extend(head.map(|head| Parameter {
                tied_head: true,
                ..head
            }));
        }
        Ok(parameters)
    }

    /// The base values of these parameters that are dense and initialised, flat, shared, by their paths.
    pub(crate) fn dense_base(&self, paths: &HashSet<String>) -> HashMap<String, Tensor<1>> {
        struct Flat {
            dense: HashSet<String>,
            found: HashMap<String, Tensor<1>>,
        }

        impl See for Flat {
            fn see<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
                if self.dense.contains(path) && param.is_initialized() {
                    let base = param.base().without_autodiff();
                    let count = base.shape().num_elements();
                    self.found.insert(path.to_owned(), base.reshape([count]));
                }
            }
        }

        if paths.is_empty() {
            return HashMap::new();
        }
        let sites = self.sites().into_iter().filter(|site| site.nf4().is_none());
        let dense = sites
            .map(|site| site.path)
            .filter(|path| paths.contains(path));
        let mut flat = Flat {
            dense: dense.collect(),
            found: HashMap::new(),
        };
        walk(self.module(), &mut flat);
        flat.found
    }

    /// The parameters at these sites, one for each: running statistics too, which walks show as parameters.
    pub(super) fn parameters_of(&self, sites: &[Site]) -> Vec<Parameter> {
        let shown = shown_groups(self.module(), sites);
        let parameters = sites.iter().map(|site| Parameter {
            path: site.path.clone(),
            torch_name: site.torch_name().to_owned(),
            shape: site.shape.clone(),
            layer: site.layer,
            groups: self.groups_of(site, &shown),
            dtype: match site.dtype {
                None | Some(DType::QFloat(_)) => None,
                Some(dtype) => Some(dtype.into()),
            },
            tied_head: false,
            conv1d: self.conv1d.as_ref().map(|names| {
                site.is_linear() && names.iter().any(|name| is_named(site.module(), name))
            }),
            device: self.device_of(site),
        });
        parameters.collect()
    }

    /// How many groups a convolution is known to have: as was said, seen by a forward pass, or shown.
    fn groups_of(&self, site: &Site, shown: &HashMap<String, usize>) -> usize {
        if site.layer != Some(LayerKind::Conv) {
            return 1;
        }
        let mut said = self.groups.iter();
        let said = said.find(|(name, _)| is_named(site.module(), name));
        let said = said.map(|(_, groups)| (*groups).max(1));
        let seen = || site.state.as_ref().and_then(PeftWeight::groups);
        let shown = || shown.get(&site.path).copied();
        said.or_else(seen).or_else(shown).unwrap_or(1)
    }

    /// The dense weights of the modules at these paths, `[d_in, d_out]`, shared. Packed weights are left out.
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
        let all = collect(self.module());
        targets
            .compile(self.head_of(&all))?
            .resolve(&modules(sites))
    }

    /// Path of the output head among all parameters.
    pub(super) fn head_of<'a>(&self, sites: &'a [Site]) -> Option<&'a str> {
        let layers: Vec<TokenLayer> = sites.iter().filter_map(Site::token_layer).collect();
        output_head(&layers, self.named_head())
    }

    pub(super) fn device_of(&self, site: &Site) -> Device {
        site.device.clone()
    }

    pub(super) fn use_adapters(&mut self, active: Active) {
        self.active = active.clone();
        self.change(|state| state.activate(&active));
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

/// The weights that targets can name, by the paths of their modules.
pub(super) fn targets_by_module<'a>(
    sites: impl Iterator<Item = &'a Site>,
) -> HashMap<&'a str, &'a Site> {
    let targets = sites.filter(|site| site.is_target());
    targets.map(|site| (site.module(), site)).collect()
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
