//! The rules that map the names of a file to a model's own.

use std::cmp::Reverse;
use std::fmt;

use super::keys::is_path;
use crate::{PeftError, Result};

/// How names in a file map to a model's own, and back.
///
/// The empty map, which is the default, leaves every path as it is: only PEFT's `base_model.model.` is stripped. Three
/// kinds of rule can be added, all on whole dotted segments:
///
/// * [`with_prefix`](Self::with_prefix) replaces the beginning of a module's path, for instance `model` by nothing. One prefix
///   is replaced at most.
/// * [`with_segments`](Self::with_segments) replaces a run of segments wherever it stands, for instance `self_attn` by
///   `attention`. These rules read the path that the prefix rule leaves, from left to right. No rule reads what another
///   rule has put in. [`with_renames`](Self::with_renames) adds many of them.
/// * [`with_parameter`](Self::with_parameter) replaces the end of a tensor's name, for instance `LayerNorm.gamma` by
///   `LayerNorm.weight`. One end is replaced at most.
///
/// Where several rules of a kind match at one place, the longest wins. If they are equally long, the one with fewer `*` wins,
/// and then the one that was added first. So the order of the rules hardly ever matters.
///
/// In a rule a segment `*` stands for any one segment, most often a number: it stands for the same on both sides, the first
/// `*` for the first, and so on.
///
/// From the model to the file, the same rules apply in the other direction. A path that does not come back as it was, because
/// two rules collide, is an error in either direction: such a map would name a module wrongly.
///
/// [`Family`](super::Family) has the maps of families of models. Printed, a map is the Rust code that makes it.
///
/// ```
/// # fn main() -> burn_peft::Result<()> {
/// use burn_peft::format::NameMap;
///
/// let names = NameMap::new()
///     .with_prefix("model", "")
///     .with_prefix("lm_head", "lm_head")
///     .with_renames([("self_attn", "attention"), ("q_proj", "query")]);
/// assert_eq!(names.to_model("model.layers.0.self_attn.q_proj")?, "layers.0.attention.query");
/// assert_eq!(names.to_file("layers.0.attention.query")?, "model.layers.0.self_attn.q_proj");
/// // Without its own rule this would be an error: the way back would give it the prefix `model`.
/// assert_eq!(names.to_file("lm_head")?, "lm_head");
///
/// // The rules do not read each other's results: two names may be exchanged, and the longer rule wins in any order.
/// let names = NameMap::new().with_renames([
///     ("norm", "final_norm"),
///     ("input_layernorm", "norm"),
///     ("attention", "mix"),
///     ("attention.output.dense", "mix.projection"),
/// ]);
/// assert_eq!(names.to_model("0.input_layernorm")?, "0.norm");
/// assert_eq!(names.to_file("0.mix.projection")?, "0.attention.output.dense");
///
/// // T5 calls two modules alike that differ by their numbers only.
/// let names = NameMap::new().with_renames([
///     ("encoder.block.*.layer.1.DenseReluDense", "encoder.blocks.*.mlp"),
///     ("decoder.block.*.layer.2.DenseReluDense", "decoder.blocks.*.mlp"),
/// ]);
/// assert_eq!(names.to_file("decoder.blocks.3.mlp.wi")?, "decoder.block.3.layer.2.DenseReluDense.wi");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameMap {
    prefixes: Vec<Rename>,
    segments: Vec<Rename>,
    parameters: Vec<Rename>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rename {
    file: Vec<String>,
    model: Vec<String>,
}

/// What a rule replaces, and what it puts there.
type Sides = for<'a> fn(&'a Rename) -> (&'a [String], &'a [String]);

/// The segment of a rule that stands for any.
const ANY: &str = "*";

impl NameMap {
    /// The map that leaves every path as it is.
    pub(super) const EMPTY: Self = Self {
        prefixes: Vec::new(),
        segments: Vec::new(),
        parameters: Vec::new(),
    };

    /// The map that leaves every path as it is.
    pub fn new() -> Self {
        Self::EMPTY
    }

    /// Replaces the leading segments `file` of a path in the file by `model`. Either may be empty or dotted.
    pub fn with_prefix(mut self, file: &str, model: &str) -> Self {
        self.prefixes.push(Rename::new(file, model));
        self
    }

    /// Replaces the run of segments `file` by `model` wherever it stands. Either may be dotted; a rule with an empty
    /// side, or with another number of `*` on the other side, could not be undone and makes every path that it touches an
    /// error.
    pub fn with_segments(mut self, file: &str, model: &str) -> Self {
        self.segments.push(Rename::new(file, model));
        self
    }

    /// Adds a rule of [`with_segments`](Self::with_segments) for each pair `(file, model)`.
    pub fn with_renames<F: AsRef<str>, N: AsRef<str>>(
        mut self,
        renames: impl IntoIterator<Item = (F, N)>,
    ) -> Self {
        for (file, model) in renames {
            self = self.with_segments(file.as_ref(), model.as_ref());
        }
        self
    }

    /// Replaces the end `file` of a tensor's name by `model`, which is a name as the other rules and PyTorch have it: the
    /// path of the module in the file, and `weight` or `bias`, or the name of the field that holds a bare parameter.
    ///
    /// ```
    /// # fn main() -> burn_peft::Result<()> {
    /// # use burn_peft::format::NameMap;
    /// let names = NameMap::new()
    ///     .with_parameter("LayerNorm.gamma", "LayerNorm.weight")
    ///     .with_parameter("vit.embeddings.cls_token", "class_token");
    /// assert_eq!(names.tensor_to_file("bert.embeddings.LayerNorm", "weight")?, "bert.embeddings.LayerNorm.gamma");
    /// // A parameter of the model itself, in no module.
    /// assert_eq!(names.tensor_to_file("", "class_token")?, "vit.embeddings.cls_token");
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_parameter(mut self, file: &str, model: &str) -> Self {
        self.parameters.push(Rename::new(file, model));
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

    /// The name in the file of the parameter that PyTorch would call `parameter`, of the module that the model calls
    /// `module`; the empty path is the model itself.
    ///
    /// # Errors
    ///
    /// As [`to_file`](Self::to_file).
    pub fn tensor_to_file(&self, module: &str, parameter: &str) -> Result<String> {
        let module = match module {
            "" => String::new(),
            module => self.to_file(module)?,
        };
        self.tensor_of_file_module(&module, parameter)
    }

    /// As [`tensor_to_file`](Self::tensor_to_file), of a module by its path in the file.
    pub(super) fn tensor_of_file_module(&self, module: &str, parameter: &str) -> Result<String> {
        let name = match module {
            "" => parameter.to_owned(),
            module => format!("{module}.{parameter}"),
        };
        if self.parameters.is_empty() {
            return Ok(name);
        }
        let file = self.rename_end(&name, Rename::backwards);
        let back = self.rename_end(&file, Rename::forwards);
        check_round_trip(&name, &file, &back)
    }

    /// Whether there is no rule.
    pub fn is_empty(&self) -> bool {
        self.prefixes.is_empty() && self.segments.is_empty() && self.parameters.is_empty()
    }

    fn rename(&self, path: &str) -> String {
        let mut path: Vec<&str> = path.split('.').collect();
        replace_prefix(&mut path, &self.prefixes, Rename::forwards);
        replace_runs(&path, &self.segments, Rename::forwards).join(".")
    }

    fn rename_back(&self, path: &str) -> String {
        let path: Vec<&str> = path.split('.').collect();
        let mut path = replace_runs(&path, &self.segments, Rename::backwards);
        replace_prefix(&mut path, &self.prefixes, Rename::backwards);
        path.join(".")
    }

    /// Replaces the end of a name that the winning rule has.
    fn rename_end<'a>(&'a self, name: &'a str, sides: Sides) -> String {
        let mut name: Vec<&str> = name.split('.').collect();
        let rules = self.parameters.iter().map(sides).filter_map(|(from, to)| {
            let start = name.len().checked_sub(from.len())?;
            Some((from, filled(&name[start..], from, to)?))
        });
        if let Some((from, end)) = winner(rules) {
            name.splice(name.len() - from.len().., end);
        }
        name.join(".")
    }
}

/// The Rust code that makes the map.
impl fmt::Display for NameMap {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("NameMap::new()")?;
        for (method, rules) in [
            ("with_prefix", &self.prefixes),
            ("with_segments", &self.segments),
            ("with_parameter", &self.parameters),
        ] {
            for Rename { file, model } in rules {
                let (file, model) = (file.join("."), model.join("."));
                write!(f, ".{method}({file:?}, {model:?})")?;
            }
        }
        Ok(())
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

    /// From the file to the model.
    fn forwards(&self) -> (&[String], &[String]) {
        (&self.file, &self.model)
    }

    /// From the model to the file.
    fn backwards(&self) -> (&[String], &[String]) {
        (&self.model, &self.file)
    }
}

/// The rule that is applied, of all that match at one place: the longest, then the one with fewer `*`, then the first.
fn winner<'a, T>(matching: impl Iterator<Item = (&'a [String], T)>) -> Option<(&'a [String], T)> {
    matching.min_by_key(|(from, _)| {
        let any = from.iter().filter(|segment| *segment == ANY).count();
        (Reverse(from.len()), any)
    })
}

/// What stands in the place of the beginning of `path` that `from` matches: `to`, with what each `*` stands for.
fn filled<'a>(path: &[&'a str], from: &[String], to: &'a [String]) -> Option<Vec<&'a str>> {
    let matches = |(segment, rule): (&&str, &String)| rule == ANY || segment == rule;
    if path.len() < from.len() || !path.iter().zip(from).all(matches) {
        return None;
    }
    let mut any = path
        .iter()
        .zip(from)
        .filter_map(|(segment, rule)| (rule == ANY).then_some(*segment));
    let fill = |segment: &'a String| match segment.as_str() {
        // One more than there are stays as it is, and so does not come back.
        ANY => any.next().unwrap_or(ANY),
        segment => segment,
    };
    Some(to.iter().map(fill).collect())
}

/// Replaces the beginning of `path` that the winning rule has.
fn replace_prefix<'a>(path: &mut Vec<&'a str>, rules: &'a [Rename], sides: Sides) {
    let rules = rules.iter().map(sides).filter_map(|(from, to)| {
        let beginning = filled(path, from, to)?;
        Some((from, beginning))
    });
    if let Some((from, beginning)) = winner(rules) {
        path.splice(..from.len(), beginning);
    }
}

/// Replaces runs in `path`, left to right, without looking again at what it put in.
fn replace_runs<'a>(path: &[&'a str], rules: &'a [Rename], sides: Sides) -> Vec<&'a str> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, tail)) = rest.split_first() {
        let rules = rules.iter().map(sides).filter_map(|(from, to)| {
            let run = filled(rest, from, to)?;
            (!from.is_empty()).then_some((from, run))
        });
        match winner(rules) {
            Some((from, run)) => {
                out.extend(run);
                rest = &rest[from.len()..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

fn check_round_trip(path: &str, mapped: &str, back: &str) -> Result<String> {
    // One `*` more than on the other side stands for nothing.
    let has_any = |path: &str| path.split('.').any(|segment| segment == ANY);
    if !is_path(mapped) || back != path || (has_any(mapped) && !has_any(path)) {
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
    fn the_longest_rule_wins_whatever_the_order() {
        let mut rules = vec![
            ("attention", "attn"),
            ("attention.self", "attn.inner"),
            ("attention.output.dense", "attn.inner.proj"),
            ("layer.*", "stage.*"),
            ("layer.0", "stem.0"),
            ("norm", "final_norm"),
            ("input_norm", "norm"),
            // Exchanged.
            ("left", "right"),
            ("right", "left"),
        ];
        for _ in 0..rules.len() {
            rules.rotate_left(1);
            for rules in [rules.clone(), rules.iter().rev().copied().collect()] {
                let names = NameMap::new().with_renames(rules);
                for (file, model) in [
                    ("attention.output.dense", "attn.inner.proj"),
                    ("attention.self.q", "attn.inner.q"),
                    ("attention.k", "attn.k"),
                    ("layer.0.norm", "stem.0.final_norm"),
                    ("layer.1.input_norm", "stage.1.norm"),
                    ("left.right", "right.left"),
                ] {
                    assert_eq!(names.to_model(file).unwrap(), model);
                    assert_eq!(names.to_file(model).unwrap(), file);
                }
            }
        }
        // A prefix and an end likewise.
        let names = NameMap::new()
            .with_prefix("*", "other.*")
            .with_prefix("model", "net")
            .with_parameter("*.gamma", "*.scale")
            .with_parameter("norm.gamma", "norm.weight");
        assert_eq!(names.to_model("model.x").unwrap(), "net.x");
        assert_eq!(names.to_model("head.x").unwrap(), "other.head.x");
        assert_eq!(
            names.tensor_of_file_module("norm", "weight").unwrap(),
            "norm.gamma"
        );
    }

    #[test]
    fn a_star_stands_for_the_same_segment_on_both_sides() {
        let names = NameMap::new()
            .with_prefix("model.*", "towers.*.net")
            .with_renames([
                ("encoder.block.*.layer.1.mlp", "encoder.blocks.*.mlp"),
                ("decoder.block.*.layer.2.mlp", "decoder.blocks.*.mlp"),
                ("a.*.*", "*.b.*"),
            ]);
        for (file, model) in [
            (
                "encoder.block.11.layer.1.mlp.wi",
                "encoder.blocks.11.mlp.wi",
            ),
            ("decoder.block.0.layer.2.mlp.wo", "decoder.blocks.0.mlp.wo"),
            ("decoder.block.0.layer.1.mlp", "decoder.block.0.layer.1.mlp"),
            ("x.a.1.2", "x.1.b.2"),
            ("model.text.norm", "towers.text.net.norm"),
        ] {
            assert_eq!(names.to_model(file).unwrap(), model);
            assert_eq!(names.to_file(model).unwrap(), file);
        }
        // What is left out on one side does not come back.
        let lossy = NameMap::new().with_segments("layer.*.mlp", "mlp");
        assert!(lossy.to_model("layer.3.mlp").is_err());
        assert!(lossy.to_file("x.mlp").is_err());
    }

    #[test]
    fn the_end_of_a_tensor_s_name_is_replaced() {
        let names = NameMap::new()
            .with_prefix("bert", "")
            .with_parameter("gamma", "scale")
            .with_parameter("LayerNorm.gamma", "LayerNorm.weight")
            .with_parameter("cls.predictions.bias", "bert.head_bias");
        for (module, parameter, file) in [
            ("x.LayerNorm", "weight", "bert.x.LayerNorm.gamma"),
            ("x.dense", "weight", "bert.x.dense.weight"),
            ("x", "scale", "bert.x.gamma"),
        ] {
            assert_eq!(names.tensor_to_file(module, parameter).unwrap(), file);
        }
        // Two parameters of one name: neither is told from the other.
        let error = names.tensor_to_file("x.LayerNorm", "gamma").unwrap_err();
        assert!(error.to_string().contains("LayerNorm.weight"), "{error}");
        assert_eq!(
            names.tensor_of_file_module("bert", "head_bias").unwrap(),
            "cls.predictions.bias"
        );
        assert_eq!(names.tensor_to_file("", "other").unwrap(), "other");
    }

    #[test]
    fn a_map_prints_as_the_code_that_makes_it() {
        let names = NameMap::new()
            .with_parameter("a.b", "c")
            .with_segments("x.*", "*.y")
            .with_prefix("model", "");
        assert_eq!(
            names.to_string(),
            r#"NameMap::new().with_prefix("model", "").with_segments("x.*", "*.y").with_parameter("a.b", "c")"#
        );
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
