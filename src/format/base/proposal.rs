//! Rules under which the names of a checkpoint would fit a model, found from names and shapes that agree.
//!
//! A guess for a person to read: where several modules have the same shape, as `q_proj` and `o_proj` have, only the likeness of
//! their names tells them apart.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use super::checkpoint::BaseCheckpoint;
use crate::format::NameMap;
use crate::model::BaseParameter;

/// In the place of a number.
const ANY: &str = "*";
/// Most kinds of names on each side that are compared.
const MOST_KINDS: usize = 400;

/// A map of names under which more tensors would fit.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Proposal {
    /// The map, in place of the one that was given.
    pub names: NameMap,
    /// Linear layers whose weights the files would have transposed.
    pub conv1d: Vec<String>,
    /// How many parameters would have a tensor of their shape then.
    pub fitting: usize,
    /// How many parameters there are.
    pub parameters: usize,
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self {
            names,
            conv1d,
            fitting,
            parameters,
        } = self;
        write!(
            f,
            "by names and shapes {fitting} of {parameters} parameters would fit with `.with_names({names})"
        )?;
        if !conv1d.is_empty() {
            write!(f, ".with_conv1d({conv1d:?})")?;
        }
        f.write_str("`, a guess to be checked")
    }
}

/// Names that differ in their numbers only.
struct Kind {
    /// The path of the module, with `*` for each number, and the name of the parameter.
    module: Vec<String>,
    parameter: String,
    /// Whether it is the weight of a linear layer.
    is_linear: bool,
    /// The shape for each of the numbers.
    shapes: BTreeMap<Vec<u64>, Vec<usize>>,
}

impl Kind {
    fn segments(&self) -> impl Iterator<Item = &str> {
        self.module.iter().map(String::as_str)
    }
}

/// Rules under which more than `fitting` parameters would have a tensor, if there are any.
pub(super) fn of(
    checkpoint: &BaseCheckpoint,
    parameters: &BTreeMap<String, BaseParameter>,
    fitting: usize,
) -> Option<Proposal> {
    let mut wanted: HashMap<(Vec<String>, String), Kind> = HashMap::new();
    for parameter in parameters.values() {
        let (module, numbers) = skeleton(parameter.module(), usize::MAX);
        let mut shape = parameter.shape.clone();
        if parameter.is_linear() {
            shape.reverse();
        }
        let key = (module, parameter.torch_name.clone());
        let kind = wanted.entry(key).or_insert_with_key(|(module, name)| Kind {
            module: module.clone(),
            parameter: name.clone(),
            is_linear: parameter.is_linear(),
            shapes: BTreeMap::new(),
        });
        kind.shapes.insert(numbers, shape);
    }
    let mut wanted: Vec<Kind> = wanted.into_values().collect();
    wanted.sort_by(|a, b| (&a.module, &a.parameter).cmp(&(&b.module, &b.parameter)));
    // A name of the files may have more numbers than the model's; then the last ones are part of the name.
    let arities: BTreeSet<usize> = wanted
        .iter()
        .map(|kind| kind.segments().filter(|segment| *segment == ANY).count())
        .collect();
    let mut found: BTreeMap<(usize, Vec<String>, String), Kind> = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        let (module, parameter) = tensor.name.rsplit_once('.').unwrap_or(("", tensor.name));
        for &arity in &arities {
            let (module, numbers) = skeleton(module, arity);
            if numbers.len() < arity {
                continue;
            }
            let key = (arity, module, parameter.to_owned());
            let kind = found
                .entry(key)
                .or_insert_with_key(|(_, module, name)| Kind {
                    module: module.clone(),
                    parameter: name.clone(),
                    is_linear: false,
                    shapes: BTreeMap::new(),
                });
            kind.shapes.insert(numbers, tensor.shape.to_vec());
        }
        if found.len() > MOST_KINDS * arities.len().max(1) {
            return None;
        }
    }
    if wanted.len() > MOST_KINDS {
        return None;
    }
    let found: Vec<(usize, Kind)> = found
        .into_iter()
        .map(|((arity, ..), kind)| (arity, kind))
        .collect();
    let pairs = pair(&wanted, &found);
    let names = rules(&pairs)?;
    let mut conv1d: Vec<String> = pairs
        .iter()
        .filter(|pair| pair.transposed)
        .map(|pair| last_segments(&pair.file.module))
        .collect();
    conv1d.sort();
    conv1d.dedup();
    // What the rules are worth, one name of each kind standing for all. A name that does not come back is an error of loading.
    let mut proposed = 0;
    for kind in &wanted {
        let Some((numbers, shape)) = kind.shapes.first_key_value() else {
            continue;
        };
        let name = names.tensor_to_file(&path(&kind.module, numbers), &kind.parameter);
        let tensor = checkpoint.tensor(&name.ok()?);
        let fits = tensor.and_then(|tensor| fits(shape, tensor.shape, kind.is_linear));
        proposed += fits.map_or(0, |_| kind.shapes.len());
    }
    (proposed > fitting).then_some(Proposal {
        names,
        conv1d,
        fitting: proposed,
        parameters: parameters.len(),
    })
}

/// A path with `*` for its first numbers, at most so many, and these.
fn skeleton(path: &str, most: usize) -> (Vec<String>, Vec<u64>) {
    if path.is_empty() {
        return (Vec::new(), Vec::new());
    }
    let mut numbers = Vec::new();
    let segments = path.split('.').map(|segment| match segment.parse() {
        Ok(number) if numbers.len() < most => {
            numbers.push(number);
            ANY.to_owned()
        }
        _ => segment.to_owned(),
    });
    let segments = segments.collect();
    (segments, numbers)
}

/// The path of these numbers.
fn path(skeleton: &[String], numbers: &[u64]) -> String {
    let mut numbers = numbers.iter();
    let segments = skeleton.iter().map(|segment| match segment.as_str() {
        ANY => numbers.next().map_or(String::new(), u64::to_string),
        segment => segment.to_owned(),
    });
    segments.collect::<Vec<_>>().join(".")
}

/// Whether a tensor has the shape that is wanted; `Some(true)` if it has the transposed one.
fn fits(wanted: &[usize], found: &[usize], is_linear: bool) -> Option<bool> {
    if wanted == found {
        return Some(false);
    }
    let transposed = is_linear && matches!((wanted, found), ([a, b], [c, d]) if a == d && b == c);
    transposed.then_some(true)
}

/// The last segments of a module, by which the options name it.
fn last_segments(module: &[String]) -> String {
    let start = module.len().saturating_sub(2);
    let last = module[start..].iter().filter(|segment| *segment != ANY);
    last.cloned().collect::<Vec<_>>().join(".")
}

/// Names of the files and of the model that may be one.
struct Pair<'a> {
    file: &'a Kind,
    model: &'a Kind,
    transposed: bool,
}

/// Pairs kinds of names, each at most once, the likeliest first.
fn pair<'a>(wanted: &'a [Kind], found: &'a [(usize, Kind)]) -> Vec<Pair<'a>> {
    let mut likely: Vec<(f64, usize, usize, bool)> = Vec::new();
    for (model_place, model) in wanted.iter().enumerate() {
        let numbers = model.segments().filter(|segment| *segment == ANY).count();
        for (file_place, (arity, file)) in found.iter().enumerate() {
            if *arity != numbers {
                continue;
            }
            let usual = ["weight", "bias"];
            let parameter = &model.parameter;
            if usual.contains(&parameter.as_str()) && parameter != &file.parameter {
                continue;
            }
            let shapes = model.shapes.iter().map(|(numbers, shape)| {
                let found = file.shapes.get(numbers)?;
                fits(shape, found, model.is_linear)
            });
            let shapes: Option<Vec<bool>> = shapes.collect();
            let Some(shapes) = shapes else { continue };
            let transposed = shapes.contains(&true);
            let mut likeness = likeness(file, model);
            if transposed {
                likeness -= 0.05;
            }
            likely.push((likeness, model_place, file_place, transposed));
        }
    }
    likely.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let (mut models, mut files) = (BTreeSet::new(), BTreeSet::new());
    let mut pairs = Vec::new();
    for (_, model, file, transposed) in likely {
        // One name of the files has a kind for each number of numbers.
        let kind = &found[file].1;
        let numbers = kind.shapes.first_key_value().map(|(numbers, _)| numbers);
        let name = numbers.map(|numbers| (path(&kind.module, numbers), &kind.parameter));
        if models.contains(&model) || files.contains(&name) {
            continue;
        }
        models.insert(model);
        files.insert(name);
        pairs.push(Pair {
            file: kind,
            model: &wanted[model],
            transposed,
        });
    }
    pairs
}

/// How alike two names are, from 0 to 1, the parameter's own name counting too.
fn likeness(file: &Kind, model: &Kind) -> f64 {
    let file: Vec<String> = file.segments().filter(|s| *s != ANY).map(meaning).collect();
    let model: Vec<String> = model
        .segments()
        .filter(|s| *s != ANY)
        .map(meaning)
        .collect();
    let best = |segment: &String, others: &[String], last: bool| -> f64 {
        let scores = others.iter().enumerate().map(|(place, other)| {
            // The last segments mean most, and the same place is likelier than another.
            let same_end = last && place + 1 == others.len();
            let alike = match segment == other {
                true => 1.0,
                false => 0.6 * strsim::jaro_winkler(segment, other),
            };
            alike + if same_end { 0.1 } else { 0.0 }
        });
        scores.fold(0.0, f64::max)
    };
    let total = |from: &[String], to: &[String]| -> f64 {
        if from.is_empty() {
            return if to.is_empty() { 1.0 } else { 0.0 };
        }
        let (mut sum, mut weights) = (0.0, 0.0);
        for (place, segment) in from.iter().enumerate() {
            let last = place + 1 == from.len();
            let weight = if last { 3.0 } else { 1.0 };
            sum += weight * best(segment, to, last);
            weights += weight;
        }
        sum / weights
    };
    (total(&model, &file) + total(&file, &model)) / 2.2
}

/// The common meaning of a segment that models call differently, or itself.
fn meaning(segment: &str) -> String {
    const MEANINGS: [(&str, &[&str]); 19] = [
        ("query", &["q_proj", "wq", "q", "c_q", "q_lin", "query"]),
        ("key", &["k_proj", "wk", "k", "c_k", "k_lin", "key"]),
        ("value", &["v_proj", "wv", "v", "c_v", "v_lin", "value"]),
        (
            "output",
            &["o_proj", "out_proj", "wo", "c_o", "o", "output", "out_lin"],
        ),
        ("gate", &["gate_proj", "w1", "gate"]),
        ("up", &["up_proj", "w3", "up"]),
        ("down", &["down_proj", "w2", "down"]),
        (
            "inner",
            &[
                "fc1",
                "c_fc",
                "wi",
                "intermediate",
                "lin1",
                "linear_inner",
                "inner",
                "fc_in",
            ],
        ),
        ("outer", &["fc2", "lin2", "linear_outer", "outer", "fc_out"]),
        (
            "attention",
            &[
                "self_attn",
                "attn",
                "attention",
                "selfattention",
                "self_attention",
                "mha",
            ],
        ),
        (
            "cross",
            &[
                "encoder_attn",
                "encdecattention",
                "cross_attention",
                "cross_attn",
            ],
        ),
        (
            "mlp",
            &[
                "mlp",
                "ffn",
                "feed_forward",
                "densereludense",
                "pwff",
                "feedforward",
            ],
        ),
        (
            "embedding",
            &[
                "embed_tokens",
                "wte",
                "tok_embeddings",
                "word_embeddings",
                "token_embedding",
                "shared",
                "embedding",
                "embeddings",
                "embed",
            ],
        ),
        (
            "positions",
            &[
                "wpe",
                "embed_positions",
                "position_embeddings",
                "position_embedding",
                "positions",
            ],
        ),
        (
            "norm1",
            &[
                "input_layernorm",
                "attention_norm",
                "ln_1",
                "norm1",
                "norm_1",
                "layernorm_before",
            ],
        ),
        (
            "norm2",
            &[
                "post_attention_layernorm",
                "ffn_norm",
                "ln_2",
                "norm2",
                "norm_2",
                "mlp_norm",
                "layernorm_after",
            ],
        ),
        (
            "norm",
            &[
                "norm",
                "ln_f",
                "final_layer_norm",
                "final_norm",
                "layernorm",
                "layer_norm",
            ],
        ),
        ("layers", &["layers", "h", "blocks", "block", "layer"]),
        ("head", &["lm_head", "head", "embed_out", "proj_out"]),
    ];
    let lower = segment.to_ascii_lowercase();
    let known = MEANINGS
        .iter()
        .find(|(_, words)| words.contains(&lower.as_str()));
    known.map_or(lower, |(meaning, _)| (*meaning).to_owned())
}

/// Rules that lead from the names of the files to those of the model.
fn rules(pairs: &[Pair]) -> Option<NameMap> {
    let (prefix, model_prefix) = common_prefix(pairs);
    let mut names = NameMap::new();
    let joined = |segments: &[String]| segments.join(".");
    let has_prefix = !(prefix.is_empty() && model_prefix.is_empty());
    if has_prefix {
        names = names.with_prefix(&joined(&prefix), &joined(&model_prefix));
        // An empty prefix claims every path of the model, so that all others need a rule of their own.
        let others = pairs
            .iter()
            .filter(|pair| !pair.file.module.starts_with(&prefix));
        let others: BTreeSet<(&String, &String)> = others
            .filter_map(|pair| Some((pair.file.module.first()?, pair.model.module.first()?)))
            .collect();
        for (file, model) in others {
            names = names.with_prefix(file, model);
        }
    }
    // What differs, segment by segment where the lengths agree, or else as a run.
    let mut renames: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut runs: BTreeSet<(String, String)> = BTreeSet::new();
    let rest = |pair: &Pair| -> Option<(Vec<String>, Vec<String>)> {
        match pair.file.module.strip_prefix(&prefix[..]) {
            Some(file) => {
                let model = pair.model.module.strip_prefix(&model_prefix[..])?;
                Some((file.to_vec(), model.to_vec()))
            }
            None => {
                let tail = |module: &[String]| module.get(1..).unwrap_or(&[]).to_vec();
                Some((tail(&pair.file.module), tail(&pair.model.module)))
            }
        }
    };
    let rests: Vec<(Vec<String>, Vec<String>)> = pairs.iter().filter_map(rest).collect();
    let aligned = |file: &[String], model: &[String]| {
        let any = |(a, b): (&String, &String)| (a == ANY) == (b == ANY);
        file.len() == model.len() && file.iter().zip(model).all(any)
    };
    for (file, model) in &rests {
        if aligned(file, model) {
            for (file, model) in file.iter().zip(model).filter(|(file, _)| *file != ANY) {
                renames
                    .entry(file.clone())
                    .or_default()
                    .insert(model.clone());
            }
        }
    }
    let mut simple: Vec<(String, String)> = Vec::new();
    for (file, models) in &renames {
        if let [model] = models.iter().collect::<Vec<_>>()[..]
            && file != model
        {
            simple.push((file.clone(), model.clone()));
        }
    }
    let after = |segment: &String| -> String {
        let rule = simple.iter().find(|(file, _)| file == segment);
        rule.map_or(segment, |(_, model)| model).clone()
    };
    for (file, model) in &rests {
        let renamed: Vec<String> = file.iter().map(after).collect();
        if renamed == *model {
            continue;
        }
        let mut start = renamed
            .iter()
            .zip(model)
            .take_while(|(a, b)| a == b)
            .count();
        let behind = |renamed: &[String], model: &[String], start: usize| {
            let most = renamed.len().min(model.len()) - start;
            let pairs = renamed.iter().rev().zip(model.iter().rev());
            pairs.take(most).take_while(|(a, b)| a == b).count()
        };
        let mut end = behind(&renamed, model, start);
        // Neither side of a rule may be empty, and a segment before it says where the rule applies.
        if start > 0 && renamed[start - 1] != ANY {
            start -= 1;
        }
        while (renamed.len() - end <= start || model.len() - end <= start) && end > 0 {
            end -= 1;
        }
        let (from, to) = (
            &file[start..file.len() - end],
            &model[start..model.len() - end],
        );
        if !from.is_empty() && !to.is_empty() {
            runs.insert((joined(from), joined(to)));
        }
    }
    names = names.with_renames(simple).with_renames(runs);
    let parameters: BTreeSet<(&String, &String)> = pairs
        .iter()
        .filter(|pair| pair.file.parameter != pair.model.parameter)
        .map(|pair| (&pair.file.parameter, &pair.model.parameter))
        .collect();
    for (file, model) in parameters {
        names = names.with_parameter(file, model);
    }
    (!names.is_empty()).then_some(names)
}

/// The prefix of the files' names, and that of the model's, without which the most names agree in the most segments.
fn common_prefix(pairs: &[Pair]) -> (Vec<String>, Vec<String>) {
    let beginnings = |module: &[String], most: usize| -> Vec<Vec<String>> {
        let most = most.min(module.len().saturating_sub(1));
        (0..=most)
            .map(|length| module[..length].to_vec())
            .filter(|beginning| !beginning.iter().any(|segment| segment == ANY))
            .collect()
    };
    let mut candidates: BTreeSet<(Vec<String>, Vec<String>)> = BTreeSet::new();
    for pair in pairs {
        for file in beginnings(&pair.file.module, 2) {
            for model in beginnings(&pair.model.module, 1) {
                candidates.insert((file.clone(), model));
            }
        }
    }
    let agreement = |(prefix, model_prefix): &(Vec<String>, Vec<String>)| -> usize {
        let agree = |pair: &Pair| -> usize {
            let file = pair.file.module.strip_prefix(&prefix[..]);
            let model = pair.model.module.strip_prefix(&model_prefix[..]);
            let (Some(file), Some(model)) = (file, model) else {
                return 0;
            };
            if file.len() != model.len() {
                return 0;
            }
            // A name of one segment that differs agrees in its length alone.
            let same = file
                .iter()
                .zip(model)
                .filter(|(a, b)| meaning(a) == meaning(b));
            1 + 2 * same.count()
        };
        pairs.iter().map(agree).sum()
    };
    let none = (Vec::new(), Vec::new());
    let mut best = (agreement(&none), none);
    for candidate in candidates {
        let score = agreement(&candidate);
        let length = candidate.0.len() + candidate.1.len();
        let best_length = best.1.0.len() + best.1.1.len();
        if score > best.0 || (score == best.0 && length < best_length) {
            best = (score, candidate);
        }
    }
    best.1
}
