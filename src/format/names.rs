//! The rule that maps the module paths of a file to a model's own.

use super::keys::is_path;
use crate::{PeftError, Result};

/// How module paths in a file map to a model's own paths, and back.
///
/// The empty map, which is the default, leaves every path as it is: only PEFT's `base_model.model.` is stripped. Two
/// kinds of rule can be added, both on whole dotted segments:
///
/// * [`with_prefix`](Self::with_prefix) replaces the beginning of a path, for instance `model` by nothing; only the
///   longest prefix that matches is replaced;
/// * [`with_segments`](Self::with_segments) replaces a run of segments wherever it stands, for instance `self_attn` by
///   `attention`; all of these rules are applied, in the order given, after the prefix.
///
/// Going from the model to the file applies the same rules backwards, last to first. A path that does not come back
/// as it was, because two rules collide, is an error in either direction: such a map would name a module wrongly.
///
/// ```
/// # fn main() -> burn_peft::Result<()> {
/// use burn_peft::format::NameMap;
///
/// let names = NameMap::new()
///     .with_prefix("model", "")
///     .with_prefix("lm_head", "lm_head")
///     .with_segments("self_attn", "attention");
/// assert_eq!(names.to_model("model.layers.0.self_attn.q_proj")?, "layers.0.attention.q_proj");
/// assert_eq!(names.to_file("layers.0.attention.q_proj")?, "model.layers.0.self_attn.q_proj");
/// // Without its own rule this would be an error: the way back would give it the prefix `model`.
/// assert_eq!(names.to_file("lm_head")?, "lm_head");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameMap {
    prefixes: Vec<Rename>,
    segments: Vec<Rename>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rename {
    file: Vec<String>,
    model: Vec<String>,
}

impl NameMap {
    /// The map that leaves every path as it is.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces the leading segments `file` of a path in the file by `model`. Either may be empty or dotted.
    pub fn with_prefix(mut self, file: &str, model: &str) -> Self {
        self.prefixes.push(Rename::new(file, model));
        self
    }

    /// Replaces the run of segments `file` by `model` wherever it stands. Either may be dotted; a rule with an empty
    /// side could not be undone and makes every path that it touches an error.
    pub fn with_segments(mut self, file: &str, model: &str) -> Self {
        self.segments.push(Rename::new(file, model));
        self
    }

    /// The model's path of the module that the file calls `path`.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] where the result is empty or does not map back to `path`.
    pub fn to_model(&self, path: &str) -> Result<String> {
        let model = self.rename(path);
        check_round_trip(path, &model, &self.rename_back(&model))
    }

    /// The file's path of the module that the model calls `path`.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] where the result is empty or does not map back to `path`.
    pub fn to_file(&self, path: &str) -> Result<String> {
        let file = self.rename_back(path);
        check_round_trip(path, &file, &self.rename(&file))
    }

    /// Whether there is no rule.
    pub fn is_empty(&self) -> bool {
        self.prefixes.is_empty() && self.segments.is_empty()
    }

    fn rename(&self, path: &str) -> String {
        let mut path: Vec<&str> = path.split('.').collect();
        let matching = self
            .prefixes
            .iter()
            .filter(|rule| starts_with(&path, &rule.file));
        if let Some(rule) = matching.max_by_key(|rule| rule.file.len()) {
            path.splice(..rule.file.len(), rule.model.iter().map(String::as_str));
        }
        for rule in &self.segments {
            path = replace_runs(path, &rule.file, &rule.model);
        }
        path.join(".")
    }

    fn rename_back(&self, path: &str) -> String {
        let mut path: Vec<&str> = path.split('.').collect();
        for rule in self.segments.iter().rev() {
            path = replace_runs(path, &rule.model, &rule.file);
        }
        let matching = self
            .prefixes
            .iter()
            .filter(|rule| starts_with(&path, &rule.model));
        if let Some(rule) = matching.max_by_key(|rule| rule.model.len()) {
            path.splice(..rule.model.len(), rule.file.iter().map(String::as_str));
        }
        path.join(".")
    }
}

impl Rename {
    fn new(file: &str, model: &str) -> Self {
        let segments = |text: &str| {
            let parts = text.split('.').filter(|part| !part.is_empty());
            parts.map(str::to_owned).collect()
        };
        Self {
            file: segments(file),
            model: segments(model),
        }
    }
}

fn starts_with(path: &[&str], prefix: &[String]) -> bool {
    path.len() >= prefix.len() && path.iter().zip(prefix).all(|(a, b)| a == b)
}

/// Replaces each run `from` in `path`, left to right, without looking again at what it put in.
fn replace_runs<'a>(path: Vec<&'a str>, from: &[String], to: &'a [String]) -> Vec<&'a str> {
    if from.is_empty() {
        return path;
    }
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path.as_slice();
    while let Some((first, tail)) = rest.split_first() {
        if starts_with(rest, from) {
            out.extend(to.iter().map(String::as_str));
            rest = &rest[from.len()..];
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

fn check_round_trip(path: &str, mapped: &str, back: &str) -> Result<String> {
    if !is_path(mapped) || back != path {
        return Err(PeftError::config(
            "name map",
            format!("`{path}` becomes `{mapped}`, which becomes `{back}`"),
            "rules that lead back to the same path",
        ));
    }
    Ok(mapped.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const Q: &str = "model.layers.0.self_attn.q_proj";

    #[test]
    fn the_default_map_changes_nothing() {
        let names = NameMap::new();
        assert_eq!(names.to_model(Q).unwrap(), Q);
        assert_eq!(names.to_file(Q).unwrap(), Q);
    }

    #[test]
    fn the_longest_prefix_that_matches_is_replaced_and_only_whole_segments() {
        let names = NameMap::new()
            .with_prefix("model", "backbone.llama")
            .with_prefix("model.norm", "norm")
            .with_prefix("lm_head", "output");
        for (file, model) in [
            (Q, "backbone.llama.layers.0.self_attn.q_proj"),
            ("model.norm.scale", "norm.scale"),
            ("lm_head", "output"),
            ("models.layers", "models.layers"),
        ] {
            assert_eq!(names.to_model(file).unwrap(), model);
            assert_eq!(names.to_file(model).unwrap(), file);
        }
    }

    #[test]
    fn segments_are_replaced_wherever_they_stand() {
        let names = NameMap::new()
            .with_segments("mlp.gate_proj", "gate")
            .with_segments("layers", "blocks");
        let (file, model) = ("layers.3.mlp.gate_proj", "blocks.3.gate");
        assert_eq!(names.to_model(file).unwrap(), model);
        assert_eq!(names.to_file(model).unwrap(), file);
    }

    #[test]
    fn a_map_that_cannot_be_undone_is_an_error() {
        // `b` could come from `a` or from `b`.
        let names = NameMap::new().with_segments("a", "b");
        assert!(names.to_model("x.a").is_ok());
        let error = names.to_model("x.b").unwrap_err().to_string();
        assert!(
            error.contains("`x.b` becomes `x.b`, which becomes `x.a`"),
            "{error}"
        );
        // The whole path is stripped.
        assert!(
            NameMap::new()
                .with_prefix("model", "")
                .to_model("model")
                .is_err()
        );
        assert!(
            NameMap::new()
                .with_segments("model", "")
                .to_model(Q)
                .is_err()
        );
        // An empty model prefix claims every path on the way back, also one that never had the prefix; a longer one
        // takes it back.
        let names = NameMap::new().with_prefix("model", "");
        assert!(names.to_model("lm_head").is_err());
        let names = names.with_prefix("lm_head", "lm_head");
        assert_eq!(names.to_model("lm_head").unwrap(), "lm_head");
    }
}
