//! Which parameters an adapter trains whole, beside its deltas: PEFT's `modules_to_save`, `bias` and
//! `trainable_token_indices`.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::config::{BiasMode, TrainableTokens};
use super::describe::Ends;
use super::statistics::is_statistic;
use super::target::{UnmatchedPattern, ends, unmatched};
use super::traverse::Site;
use super::vocabulary::{self, TokenLayer};
use crate::layer::LayerKind;
use crate::{PeftError, Result};

/// Whether the module at `path` is the one that `name` means: by its whole path, or its last segments.
pub(crate) fn is_named(path: &str, name: &str) -> bool {
    match path.strip_suffix(name) {
        Some(before) => before.is_empty() || before.ends_with('.'),
        None => false,
    }
}

/// The parameters of the modules that `names` mean, or of what is inside of them, in the model's order. As in PEFT, a name means
/// every module whose path ends with it, after a dot or not: `norm` means `input_norm` too.
///
/// # Errors
///
/// [`PeftError::UnmatchedPatterns`] with every name that means no module, and the nearest ones.
pub(super) fn named_modules<'a>(
    option: &'static str,
    sites: &'a [Site],
    names: &[String],
) -> Result<Vec<&'a Site>> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let modules: BTreeSet<&str> = sites
        .iter()
        .flat_map(|site| ancestors(&site.path))
        .collect();
    let ends = Ends::new(modules.into_iter());
    let patterns = names
        .iter()
        .filter(|name| ends.ending_with(name).next().is_none());
    let patterns: Vec<UnmatchedPattern> = patterns
        .map(|name| {
            let modules = sites.iter().flat_map(|site| ancestors(&site.path));
            unmatched(option, name, modules)
        })
        .collect();
    if !patterns.is_empty() {
        return Err(PeftError::UnmatchedPatterns { patterns });
    }
    let saved = ends.saved_by(names);
    let is_saved = |site: &&Site| {
        let module = site.path.rsplit_once('.');
        module.is_some_and(|(module, _)| saved.contains(module))
    };
    let is_parameter = |site: &&Site| !is_statistic(&site.path);
    Ok(sites.iter().filter(is_parameter).filter(is_saved).collect())
}

/// The paths of the modules around a parameter, the innermost first.
fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    path.rmatch_indices('.').map(move |(dot, _)| &path[..dot])
}

/// The tensors of experts, and weights of linear layers, that `names` mean: by their whole paths, or the ends of those.
///
/// # Errors
///
/// [`PeftError::UnmatchedPatterns`] with every name that means none, and the nearest ones.
pub(super) fn target_parameters<'a>(sites: &'a [Site], names: &[String]) -> Result<Vec<&'a Site>> {
    let is_target = |site: &&Site| site.experts().is_some() || site.is_linear();
    let known: Vec<&Site> = sites.iter().filter(is_target).collect();
    let ends_of_known: HashSet<&str> = known.iter().flat_map(|site| ends(&site.path)).collect();
    let patterns = names
        .iter()
        .filter(|name| !ends_of_known.contains(name.as_str()));
    let patterns: Vec<UnmatchedPattern> = patterns
        .map(|name| {
            let paths = known.iter().map(|site| site.path.as_str());
            unmatched("target_parameters", name, paths)
        })
        .collect();
    if !patterns.is_empty() {
        return Err(PeftError::UnmatchedPatterns { patterns });
    }
    let names: HashSet<&str> = names.iter().map(String::as_str).collect();
    let is_named = |site: &&Site| ends(&site.path).any(|end| names.contains(end));
    Ok(known.into_iter().filter(is_named).collect())
}

/// The biases that `mode` trains, beside the layers at `adapted`.
pub(super) fn biases<'a>(sites: &'a [Site], mode: BiasMode, adapted: &[&Site]) -> Vec<&'a Site> {
    let adapted: HashSet<&str> = adapted.iter().map(|layer| layer.module()).collect();
    let is_chosen = |site: &&Site| match mode {
        BiasMode::None => false,
        BiasMode::All => true,
        BiasMode::LoraOnly => {
            let layer = site.path.strip_suffix(".bias");
            layer.is_some_and(|layer| adapted.contains(layer))
        }
    };
    let biases = sites.iter().filter(|site| site.torch_name() == "bias");
    biases.filter(is_chosen).collect()
}

/// The embeddings, or heads, of which `tokens` says rows, by the paths of their parameters, with the rows. As in PEFT, a name means
/// every such module whose path ends with it, after a dot or not.
///
/// # Errors
///
/// [`PeftError::Config`] where it is not clear which embedding is the input's; [`PeftError::UnmatchedPatterns`] for a name that
/// means neither an embedding nor a linear layer.
pub(super) fn tokens<'a>(
    sites: &'a [Site],
    tokens: Option<&TrainableTokens>,
) -> Result<BTreeMap<String, (&'a Site, Vec<usize>)>> {
    const OPTION: &str = "trainable_token_indices";
    let mut chosen = BTreeMap::new();
    match tokens {
        None => {}
        Some(TrainableTokens::Input(indices)) => {
            let site = input_embedding(sites)?;
            chosen.insert(site.path.clone(), (site, indices.clone()));
        }
        Some(TrainableTokens::Named(named)) => {
            let matrices = sites.iter().filter(|site| {
                matches!(site.layer, Some(LayerKind::Embedding | LayerKind::Linear))
            });
            let matrices: Vec<&Site> = matrices.collect();
            for (name, indices) in named {
                let of_name = matrices
                    .iter()
                    .filter(|site| site.module().ends_with(name.as_str()));
                let mut any = false;
                for site in of_name {
                    any = true;
                    chosen.insert(site.path.clone(), (*site, indices.clone()));
                }
                if !any {
                    let modules = matrices.iter().map(|site| site.module());
                    return Err(PeftError::UnmatchedPatterns {
                        patterns: vec![unmatched(OPTION, name, modules)],
                    });
                }
            }
        }
    }
    Ok(chosen)
}

/// The embedding of the input.
fn input_embedding(sites: &[Site]) -> Result<&Site> {
    let layers: Vec<TokenLayer> = sites.iter().filter_map(Site::token_layer).collect();
    let module = vocabulary::input_embedding(&layers).map_err(|embeddings| {
        let found = vocabulary::found(&embeddings);
        PeftError::config(
            "trainable_token_indices",
            format!(
                "a list of tokens without the name of their embedding, in a model with {found}"
            ),
            "one embedding that is clearly the input's, or `TrainableTokens::Named` with its path",
        )
    })?;
    let mut embeddings = sites
        .iter()
        .filter(|site| site.layer == Some(LayerKind::Embedding));
    let found = embeddings.find(|site| site.module() == module.module);
    Ok(found.expect("one of these"))
}
