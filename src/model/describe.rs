//! What a file has to say of an adapter so that PEFT puts its tensors where they belong, or the reason why it cannot be said.
//!
//! A file names modules by patterns, and PEFT applies them to every module of its model. An adapter is described when it joins a
//! model, so that one which no file can describe is refused there, and again when it is saved, in the naming of the file.
//!
//! * `target_modules`: names that match a path by equality or as its end after a dot. Where they match a module too many,
//!   `exclude_modules` takes it out again.
//! * `modules_to_save` and `trainable_token_indices`: names that a path *ends with*, after a dot or not: `norm` means `input_norm`
//!   too. Nothing takes a module out again.
//! * `rank_pattern`, `alpha_pattern`: one plain key for each module that differs from the default.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use burn::module::Module;

use super::config::{BiasMode, PeftConfig};
use super::peft_model::{Parameter, PeftModel};
use super::statistics::is_statistic;
use super::target::{Adapted, ModuleNames, TargetConfig, TargetModules, condensed, ends};
use super::traverse::Site;
use crate::adapter::{Change, Lora, converted_alpha};
use crate::layer::{LayerKind, WeightLayout};
use crate::{PeftError, Result};

/// PEFT's word for no target at all: a string that no module is called.
const NO_TARGETS: &str = "dummy-target-modules";

/// What a file says of where an adapter is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Description {
    /// Targets that match exactly the adapted modules, with their ranks and alphas.
    pub targets: TargetConfig,
    /// Tensors of experts that have factors, by their own paths.
    pub target_parameters: Vec<String>,
    /// The modules of which every parameter is saved.
    pub modules_to_save: Vec<String>,
    /// The rank of modules without a key of their own.
    pub rank: usize,
    /// The alpha of modules without a key of their own.
    pub alpha: f64,
}

/// How a file calls the modules of a model, and what they have.
pub(crate) struct Naming<'a> {
    /// Every module that has parameters, with the names of these.
    leaves: BTreeMap<String, Vec<&'a str>>,
    /// Every module, also those that only hold others.
    modules: BTreeSet<String>,
    /// Every tensor of experts.
    experts: Vec<String>,
    /// Modules that have running statistics beside their parameters.
    statistics: HashSet<String>,
    /// Whether modules are called as in the model, so that the adapter's own patterns mean what they meant there.
    own: bool,
}

impl<'a> Naming<'a> {
    /// `name` gives the file's path of a module, or `None` for a module that the file cannot name: no pattern can mean that.
    pub fn new(
        parameters: &'a [Parameter],
        own: bool,
        name: impl Fn(&str) -> Option<String>,
    ) -> Self {
        let mut naming = Self {
            leaves: BTreeMap::new(),
            modules: BTreeSet::new(),
            experts: Vec::new(),
            statistics: HashSet::new(),
            own,
        };
        for parameter in parameters {
            let module = match parameter.module() {
                "" => Some(String::new()),
                module => name(module),
            };
            let Some(module) = module else {
                continue;
            };
            if let Some(LayerKind::Experts(_)) = parameter.layer {
                naming.experts.push(join(&module, &parameter.torch_name));
            }
            if is_statistic(&parameter.path) {
                naming.statistics.insert(module);
                continue;
            }
            let known = naming.leaves.entry(module).or_default();
            known.push(&parameter.torch_name);
        }
        for module in naming.leaves.keys() {
            for (dot, _) in module.match_indices('.') {
                if !naming.modules.contains(&module[..dot]) {
                    naming.modules.insert(module[..dot].to_owned());
                }
            }
            naming.modules.insert(module.clone());
        }
        naming
    }
}

/// The path of a parameter.
fn join(module: &str, name: &str) -> String {
    match module {
        "" => name.to_owned(),
        module => format!("{module}.{name}"),
    }
}

/// What an adapter has, in a file's naming.
#[derive(Default)]
pub(crate) struct Content {
    /// Modules with factors.
    adapted: Vec<Adapted>,
    /// Tensors of experts with factors, by their own paths.
    experts: Vec<Adapted>,
    /// Parameters that the adapter has copies of, by module.
    copies: BTreeMap<String, Vec<String>>,
    /// Modules of which some rows train.
    rows: BTreeSet<String>,
    /// An embedding with DoRA.
    dora_embedding: Option<String>,
}

impl Content {
    /// Adds a change of `parameter`, whose module the file calls `module`.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for a change that PEFT's files do not have.
    pub fn add(&mut self, parameter: &Parameter, module: &str, change: &Change) -> Result<()> {
        match change {
            Change::Lora(lora) => {
                let (rank, alpha) = stored_rank(lora, parameter, module)?;
                let experts = matches!(parameter.layer, Some(LayerKind::Experts(_)));
                let path = match experts {
                    true => join(module, &parameter.torch_name),
                    false => module.to_owned(),
                };
                if parameter.layer == Some(LayerKind::Embedding) && lora.magnitude.is_some() {
                    self.dora_embedding.get_or_insert(path.clone());
                }
                let adapted = Adapted { path, rank, alpha };
                match experts {
                    true => self.experts.push(adapted),
                    false => self.adapted.push(adapted),
                }
            }
            Change::Copy(_) => {
                let names = self.copies.entry(module.to_owned()).or_default();
                names.push(parameter.torch_name.clone());
            }
            Change::Rows(_) => {
                self.rows.insert(module.to_owned());
            }
        }
        Ok(())
    }

    /// Describes it.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for what no file of PEFT's can say, with the module at fault and the way out.
    pub fn describe(&self, config: &PeftConfig, naming: &Naming) -> Result<Description> {
        let adapted: HashSet<&str> = self.adapted.iter().map(|own| own.path.as_str()).collect();
        self.check_combinations(config, &adapted)?;
        let modules_to_save = self.saved_modules(config, naming, &adapted)?;
        self.check_rows(naming)?;
        let mut targets = config.targets.clone();
        let (mut rank, mut alpha) = (config.lora.rank, config.lora.alpha);
        let times = config.lora.growth();
        if times > 1 {
            let grown = |alpha| converted_alpha(alpha, config.lora.rslora, times);
            (rank, alpha) = (times * rank, grown(alpha));
            let ranks = targets.rank_pattern.iter();
            targets.rank_pattern = ranks.map(|(key, &rank)| (key, times * rank)).collect();
            let alphas = targets.alpha_pattern.iter();
            targets.alpha_pattern = alphas.map(|(key, &alpha)| (key, grown(alpha))).collect();
        }
        let preferred = naming.own.then_some(&targets);
        let mut targets = self.targets(preferred, naming, &modules_to_save)?;
        self.set_patterns(&mut targets, preferred, rank, alpha)?;
        let target_parameters: Vec<String> =
            self.experts.iter().map(|own| own.path.clone()).collect();
        self.check_experts(&target_parameters, naming)?;
        Ok(Description {
            targets,
            target_parameters,
            modules_to_save,
            rank,
            alpha,
        })
    }

    fn check_combinations(&self, config: &PeftConfig, adapted: &HashSet<&str>) -> Result<()> {
        if let Some(path) = self
            .rows
            .iter()
            .find(|path| adapted.contains(path.as_str()))
        {
            return Err(PeftError::config(
                "trainable_token_indices",
                format!("tokens of `{path}`, which has factors too"),
                "one of the two, as in PEFT: exclude the module by `exclude_modules`, or train the tokens in another adapter",
            ));
        }
        if let Some(path) = self
            .rows
            .iter()
            .find(|path| self.copies.contains_key(*path))
        {
            return Err(PeftError::config(
                "trainable_token_indices",
                format!("tokens of `{path}`, which is saved whole too"),
                "one of the two: leave the module out of `modules_to_save`, or train no tokens",
            ));
        }
        if let (true, Some(path)) = (config.ensure_weight_tying, &self.dora_embedding) {
            return Err(PeftError::config(
                "ensure_weight_tying",
                "true",
                format!(
                    "false with DoRA on `{path}`, as PEFT gives a tied head a magnitude of its own; or LoRA on the embedding"
                ),
            ));
        }
        Ok(())
    }

    /// Targets that match the adapted modules and no other module.
    fn targets(
        &self,
        preferred: Option<&TargetConfig>,
        naming: &Naming,
        saved: &[String],
    ) -> Result<TargetConfig> {
        let paths = || self.adapted.iter().map(|own| own.path.as_str());
        if self.adapted.is_empty() {
            return Ok(match self.experts.is_empty() {
                // PEFT demands a target unless it is told by this word that there is none.
                true => TargetConfig::regex(NO_TARGETS),
                false => TargetConfig::list::<String>([]),
            });
        }
        let adapted: HashSet<&str> = paths().collect();
        // PEFT leaves out what is inside of a saved module before it looks at the targets.
        let names: HashSet<&str> = saved.iter().map(String::as_str).collect();
        let is_saved = |path: &str| is_inside(path, &names);
        if let Some(path) = paths().find(|path| is_saved(path)) {
            return Err(PeftError::config(
                "modules_to_save",
                format!("{saved:?}, in which `{path}` has factors"),
                "no factors inside of a saved module: leave one of the two out",
            ));
        }
        let others = || {
            let others = naming.modules.iter().map(String::as_str);
            others.filter(|path| !adapted.contains(path) && !is_saved(path))
        };
        let is_true = |targets: &TargetConfig| -> Result<bool> {
            let matcher = targets.compile(None)?;
            for path in paths() {
                if !matcher.matches(path)? {
                    return Ok(false);
                }
            }
            for path in others() {
                if matcher.matches(path)? {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        if let Some(preferred) = preferred
            && let TargetModules::List(_) = preferred.target_modules
        {
            let mut preferred = preferred.clone();
            preferred.rank_pattern = Default::default();
            preferred.alpha_pattern = Default::default();
            if is_true(&preferred)? {
                return Ok(preferred);
            }
        }
        let mut targets = TargetConfig::list(condensed(paths(), others()));
        let matcher = targets.compile(None)?;
        let mut wrong = Vec::new();
        for path in others() {
            if matcher.matches(path)? {
                wrong.push(path.to_owned());
            }
        }
        if !wrong.is_empty() {
            targets.exclude_modules = Some(ModuleNames::List(wrong.clone()));
            if !is_true(&targets)? {
                // A list also excludes paths that end like one of its own.
                let whole: Vec<String> = wrong.iter().map(|path| regex::escape(path)).collect();
                targets.exclude_modules = Some(ModuleNames::Regex(whole.join("|")));
                if !is_true(&targets)? {
                    return Err(PeftError::config(
                        "target_modules",
                        format!("the adapted modules but not {wrong:?}, whose paths end alike"),
                        "paths that can be told apart",
                    ));
                }
            }
        }
        Ok(targets)
    }

    /// Keys for the modules whose rank or alpha is not the default.
    fn set_patterns(
        &self,
        targets: &mut TargetConfig,
        preferred: Option<&TargetConfig>,
        rank: usize,
        alpha: f64,
    ) -> Result<()> {
        let own = || self.adapted.iter().chain(&self.experts);
        let is_true = |targets: &TargetConfig| -> Result<bool> {
            let matcher = targets.compile(None)?;
            for module in own() {
                if matcher.rank_for(&module.path, rank)? != module.rank
                    || matcher.alpha_for(&module.path, alpha)? != module.alpha
                {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        if let Some(preferred) = preferred {
            targets.rank_pattern = preferred.rank_pattern.clone();
            targets.alpha_pattern = preferred.alpha_pattern.clone();
            if is_true(targets)? {
                return Ok(());
            }
        }
        let plain = |path: &str| path.to_owned();
        // The whole path, letter by letter.
        let exact = |path: &str| format!("^{}", regex::escape(path));
        for key in [&plain as &dyn Fn(&str) -> String, &exact] {
            let ranks = own().filter(|module| module.rank != rank);
            targets.rank_pattern = ranks.map(|own| (key(&own.path), own.rank)).collect();
            let alphas = own().filter(|module| module.alpha != alpha);
            targets.alpha_pattern = alphas.map(|own| (key(&own.path), own.alpha)).collect();
            if is_true(targets)? {
                return Ok(());
            }
        }
        Err(PeftError::config(
            "rank_pattern, alpha_pattern",
            "those of modules that have the same path in the file",
            "a path for each module",
        ))
    }

    /// The `modules_to_save` that PEFT needs to be told of: all but biases that `bias` tells of, and weights of adapted
    /// embeddings.
    fn saved_modules(
        &self,
        config: &PeftConfig,
        naming: &Naming,
        adapted: &HashSet<&str>,
    ) -> Result<Vec<String>> {
        let told = |module: &str, found: &[String]| match found {
            [only] if only == "bias" => match config.bias {
                BiasMode::None => false,
                BiasMode::All => true,
                BiasMode::LoraOnly => adapted.contains(module),
            },
            // PEFT has the base's own weight beside the factors of an embedding.
            [only] if only == "weight" => adapted.contains(module) && is_input_or_output(module),
            _ => false,
        };
        let saved: BTreeMap<&str, &Vec<String>> = self
            .copies
            .iter()
            .filter(|(module, found)| !told(module, found))
            .map(|(module, found)| (module.as_str(), found))
            .collect();
        for (module, found) in &saved {
            let all = naming.leaves.get(*module).map_or(&[][..], Vec::as_slice);
            if module.is_empty() || all.len() != found.len() {
                return Err(PeftError::config(
                    "modules_to_save",
                    format!("{found:?} of `{module}`"),
                    format!("a module's every parameter: {all:?}"),
                ));
            }
            if naming.statistics.contains(*module) {
                return Err(PeftError::config(
                    "modules_to_save",
                    format!("`{module}`, which has running statistics"),
                    "modules without: Burn has the statistics once for the whole model, not once per adapter; train the layer's bias \
                     by `bias`, train the layer as a part of the model, or load what fits of a file by `LoadOptions::strict` = false",
                ));
            }
            if adapted.contains(module) {
                return Err(PeftError::config(
                    "modules_to_save",
                    format!("`{module}`, which has factors too"),
                    "one of the two: exclude the module by `exclude_modules`, or leave it out of `modules_to_save`",
                ));
            }
        }
        if saved.is_empty() {
            return Ok(Vec::new());
        }
        let ends = Ends::new(naming.modules.iter().map(String::as_str));
        let own = &config.modules_to_save;
        if naming.own {
            let meant = ends.saved_by(own);
            let leaves = naming.leaves.keys().map(String::as_str);
            if leaves
                .filter(|leaf| meant.contains(leaf))
                .eq(saved.keys().copied())
            {
                return Ok(own.clone());
            }
        }
        for module in saved.keys() {
            let other = ends
                .ending_with(module)
                .find(|other| !saved.contains_key(*other));
            if let Some(other) = other {
                return Err(PeftError::config(
                    "modules_to_save",
                    format!("`{module}` without `{other}`"),
                    format!(
                        "both, or another name for one of the modules: PEFT saves every module whose path ends with `{module}`"
                    ),
                ));
            }
        }
        Ok(saved.keys().map(|module| (*module).to_owned()).collect())
    }

    fn check_rows(&self, naming: &Naming) -> Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let ends = Ends::new(naming.modules.iter().map(String::as_str));
        for module in &self.rows {
            if let Some(other) = ends
                .ending_with(module)
                .find(|other| !self.rows.contains(*other))
            {
                return Err(PeftError::config(
                    "trainable_token_indices",
                    format!("tokens of `{module}` without `{other}`"),
                    format!(
                        "both, or another name for one of the modules: PEFT takes every module whose path ends with `{module}`"
                    ),
                ));
            }
        }
        Ok(())
    }

    fn check_experts(&self, own: &[String], naming: &Naming) -> Result<()> {
        let owned: HashSet<&str> = own.iter().map(String::as_str).collect();
        let wrong = naming.experts.iter().find(|path| {
            let mut ends = ends(path).skip(1);
            !owned.contains(path.as_str()) && ends.any(|end| owned.contains(end))
        });
        match wrong {
            None => Ok(()),
            Some(path) => Err(PeftError::config(
                "target_parameters",
                format!("{own:?} without `{path}`"),
                "tensors whose paths can be told apart: one of these is the end of that one",
            )),
        }
    }
}

/// Rank and alpha of these factors as PEFT's file has them. What begins with a part of the weight and slices become plain factors of
/// a larger rank, and those of a convolution of several groups have an `A` of all channels.
///
/// # Errors
///
/// [`PeftError::Config`] for DoRA on a convolution of several groups.
fn stored_rank(lora: &Lora, parameter: &Parameter, module: &str) -> Result<(usize, f64)> {
    let config = lora.config();
    let times = match parameter.layer.map(LayerKind::layout) {
        Some(WeightLayout::Experts(_)) => 1,
        Some(layout @ WeightLayout::Kernel) => {
            let mixes = lora.dims()[0] != layout.dims(&parameter.shape)[0];
            let groups = match config.slices.all_equal() {
                Some(groups) if mixes => groups,
                _ => parameter.groups,
            };
            if groups > 1 && lora.magnitude.is_some() {
                return Err(PeftError::config(
                    format!("dora of `{module}`"),
                    "true",
                    format!(
                        "false on a convolution of {groups} groups, which PEFT has no DoRA for: exclude it by `exclude_modules`, or \
                         use LoRA"
                    ),
                ));
            }
            if mixes {
                groups
            } else {
                groups * lora.growth()
            }
        }
        _ => lora.growth(),
    };
    let alpha = converted_alpha(config.alpha, config.rslora, times);
    Ok((config.rank * times, alpha))
}

/// Whether PEFT takes the module for an embedding whose own weight it stores beside its factors.
fn is_input_or_output(module: &str) -> bool {
    let last = module.rsplit('.').next().unwrap_or(module);
    matches!(last, "embed_tokens" | "lm_head")
}

/// Whether PEFT takes the module for one inside of a module that one of `names` means: `re.match(r"(^|.*\.)NAME($|\..*)")`.
fn is_inside(path: &str, names: &HashSet<&str>) -> bool {
    let around = path.match_indices('.').map(|(dot, _)| &path[..dot]);
    let mut modules = around.chain([path]);
    !names.is_empty() && modules.any(|module| ends(module).any(|end| names.contains(end)))
}

/// Paths of modules by their ends, to find those that end with a text.
pub(super) struct Ends<'a> {
    /// The paths, each read backwards, sorted.
    backwards: Vec<(String, &'a str)>,
}

impl<'a> Ends<'a> {
    pub fn new(paths: impl Iterator<Item = &'a str>) -> Self {
        let mut backwards: Vec<(String, &str)> = paths
            .map(|path| (path.chars().rev().collect(), path))
            .collect();
        backwards.sort_unstable();
        Self { backwards }
    }

    /// The paths that end with `end`, after a dot or not; itself is among them.
    pub fn ending_with(&self, end: &str) -> impl Iterator<Item = &'a str> {
        let begin: String = end.chars().rev().collect();
        let first = self.backwards.partition_point(|(path, _)| *path < begin);
        let rest = self.backwards[first..].iter();
        rest.take_while(move |(path, _)| path.starts_with(&begin))
            .map(|(_, path)| *path)
    }

    /// The modules that PEFT saves for these names: those that end with one of them, and all inside of these.
    pub fn saved_by(&self, names: &[String]) -> HashSet<&'a str> {
        let named = names.iter().flat_map(|name| self.ending_with(name));
        let named: HashSet<&str> = named.collect();
        let all = self.backwards.iter().map(|(_, path)| *path);
        all.filter(|path| {
            let around = path.match_indices('.').map(|(dot, _)| &path[..dot]);
            let mut modules = around.chain([*path]);
            modules.any(|module| named.contains(module))
        })
        .collect()
    }
}

/// The parameters of a model by their paths.
pub(crate) fn by_path(parameters: &[Parameter]) -> HashMap<&str, &Parameter> {
    parameters
        .iter()
        .map(|parameter| (parameter.path.as_str(), parameter))
        .collect()
}

impl<M: Module> PeftModel<M> {
    /// Describes an adapter of these changes, by the paths of their parameters, as a file does that calls the modules as the model
    /// does.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] where no file can describe it.
    pub(super) fn describe(
        &self,
        sites: &[Site],
        config: &PeftConfig,
        changes: &[(String, Change)],
    ) -> Result<Description> {
        let parameters = self.parameters_of(sites);
        let known = by_path(&parameters);
        let mut content = Content::default();
        for (path, change) in changes {
            if let Some(parameter) = known.get(path.as_str()) {
                content.add(parameter, parameter.module(), change)?;
            }
        }
        let naming = Naming::new(&parameters, true, |module| Some(module.to_owned()));
        content.describe(config, &naming)
    }
}
