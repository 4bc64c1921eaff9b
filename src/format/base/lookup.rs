//! Under which name the files have a parameter's tensor: its own, one of another form of the files, or that of a tensor which
//! it is tied to.

use std::collections::BTreeMap;

use super::checkpoint::{BaseCheckpoint, BaseTensor};
use super::model_config;
use super::options::BaseOptions;
use crate::Result;
use crate::model::{BaseParameter, is_named};

/// Whether `pattern` means `name`: the whole of it, or the end of it after a dot, or, with `.*` at its end, the beginning.
pub(super) fn means(name: &str, pattern: &str) -> bool {
    match pattern.strip_suffix(".*") {
        Some(beginning) => name
            .strip_prefix(beginning)
            .is_some_and(|rest| rest.starts_with('.')),
        None => is_named(name, pattern),
    }
}

/// Finds the tensors of parameters.
pub(super) struct Lookup<'a> {
    checkpoint: &'a BaseCheckpoint,
    options: &'a BaseOptions,
    /// The parameters by their names in the files.
    parameters: &'a BTreeMap<String, BaseParameter>,
    /// Names of tensors that are one, the first of each group being what the others are copies of.
    ties: Vec<Vec<&'a str>>,
}

impl<'a> Lookup<'a> {
    /// # Errors
    ///
    /// Those of reading a `config.json`, where it decides what is tied.
    pub fn new(
        checkpoint: &'a BaseCheckpoint,
        options: &'a BaseOptions,
        parameters: &'a BTreeMap<String, BaseParameter>,
    ) -> Result<Self> {
        let mut ties: Vec<Vec<&str>> = Vec::new();
        let mut by_config = None;
        for tie in &options.tied {
            if let Some(default) = tie.by_config {
                let said = match by_config {
                    Some(said) => said,
                    None => *by_config.insert(model_config::tied(checkpoint, default, options)?),
                };
                if !said {
                    continue;
                }
            }
            let names = [tie.source.as_str(), tie.copy.as_str()];
            match ties
                .iter_mut()
                .find(|group| names.iter().any(|name| group.contains(name)))
            {
                None => ties.push(names.to_vec()),
                Some(group) => {
                    let new = names.into_iter().filter(|name| !group.contains(name));
                    let new: Vec<_> = new.collect();
                    group.extend(new);
                }
            }
        }
        Ok(Self {
            checkpoint,
            options,
            parameters,
            ties,
        })
    }

    /// The tensor that the options know by this name.
    pub fn find(&self, name: &str) -> Option<BaseTensor<'a>> {
        let is_skipped = |name: &str| {
            let mut skipped = self.options.skipped.iter();
            skipped.any(|skipped| means(name, skipped))
        };
        if is_skipped(name) {
            return None;
        }
        self.checkpoint.tensor(name).or_else(|| {
            let mut others = self.other_names(name).into_iter();
            others.find_map(|other| {
                // What is a parameter's own tensor is no other's.
                let is_free = !self.parameters.contains_key(&other) && !is_skipped(&other);
                self.checkpoint.tensor(&other).filter(|_| is_free)
            })
        })
    }

    /// The names under which files of other forms have the tensor of this name.
    fn other_names(&self, name: &str) -> Vec<String> {
        let mut ends = vec![name.to_owned()];
        for (end, alias) in &self.options.aliases {
            if let Some(start) = name.strip_suffix(end.as_str())
                && (start.is_empty() || start.ends_with('.'))
            {
                ends.push(format!("{start}{alias}"));
            }
        }
        let mut names = ends[1..].to_vec();
        for (prefix, other) in &self.options.prefixes {
            for name in &ends {
                let rest = match prefix.as_str() {
                    "" => Some(name.as_str()),
                    prefix => name
                        .strip_prefix(prefix)
                        .and_then(|rest| rest.strip_prefix('.')),
                };
                names.extend(rest.map(|rest| match other.as_str() {
                    "" => rest.to_owned(),
                    other => format!("{other}.{rest}"),
                }));
            }
        }
        names
    }

    /// The other names of the tensor of this name.
    pub fn tied_to<'b>(&'b self, name: &'b str) -> impl Iterator<Item = &'a str> + 'b {
        let groups = self.ties.iter().filter(move |group| group.contains(&name));
        groups
            .flatten()
            .copied()
            .filter(move |other| *other != name)
    }

    /// A tensor that is tied to the one of this name.
    pub fn find_tied(&self, name: &str) -> Option<BaseTensor<'a>> {
        self.tied_to(name).find_map(|other| self.find(other))
    }

    /// The tensor that the tensor `name` of the files, which no parameter has, is tied to.
    pub fn tied_to_tensor(&self, name: &str) -> Option<BaseTensor<'a>> {
        let known = self.ties.iter().flatten().find(|known| {
            let tensor = self.find(known);
            tensor.is_some_and(|tensor| tensor.name == name)
        })?;
        let mut others = self.tied_to(known).filter_map(|other| self.find(other));
        others.find(|other| other.name != name)
    }
}
