//! What the tensors of a file are, by their names and shapes alone, before a value is read.

use std::collections::BTreeMap;

use super::config::AdapterConfig;
use super::file::SafetensorsFile;
use super::keys::{Factor, Role, read_key, rows_key, tensor_key};
use super::report::{LoadReport, Mismatch};
use super::shapes::{ModuleShape, count_experts};
use crate::Result;
use crate::model::{BiasMode, is_named};

/// A tensor of a file.
#[derive(Clone, Debug)]
pub(super) struct FoundTensor {
    /// Its name.
    pub key: String,
    /// Whether it is stored `[d_in, r]` or `[r, d_out]`, in place of PyTorch's layout.
    pub transposed: bool,
    /// In PyTorch's layout.
    shape: Vec<usize>,
}

/// A module that has factors.
#[derive(Debug)]
pub(super) struct FoundModule {
    pub path: String,
    pub factors: Vec<(Factor, FoundTensor)>,
    /// Whether they may be of experts.
    pub experts: bool,
}

/// All tensors of a file.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The modules that have factors, with all that they must have, in the order of [`Factor::of`].
    pub modules: Vec<FoundModule>,
    /// Whole parameters by their paths.
    pub parameters: Vec<(String, FoundTensor)>,
    /// Rows of embeddings by the paths of those.
    pub rows: Vec<(String, FoundTensor)>,
}

/// What every tensor of `file` is. One that is nothing, or that lacks its partners, is an error.
pub(super) fn find(file: &SafetensorsFile, config: &AdapterConfig) -> Result<Found> {
    let matcher = config.validate()?;
    let mut report = LoadReport::default();
    let mut modules: BTreeMap<String, BTreeMap<Factor, FoundTensor>> = BTreeMap::new();
    let mut parameters: BTreeMap<String, FoundTensor> = BTreeMap::new();
    let mut rows: BTreeMap<String, FoundTensor> = BTreeMap::new();
    for (name, shape) in file.shapes() {
        let Some(key) = read_key(name) else {
            report.unexpected.push(name.to_owned());
            continue;
        };
        let mut shape = shape.to_vec();
        if key.transposed && shape.len() != 2 {
            report.unexpected.push(name.to_owned());
            continue;
        }
        if key.transposed {
            shape.reverse();
        }
        let tensor = FoundTensor {
            key: name.to_owned(),
            transposed: key.transposed,
            shape,
        };
        // Two keys may mean one tensor: of two adapters, say. Only one of them has a place.
        let refused = match key.role {
            Role::Factor(Factor::Bias) if !config.lora_bias => Some(tensor),
            Role::Factor(Factor::Magnitude) if !config.use_dora => Some(tensor),
            Role::Factor(factor) => {
                let factors = modules.entry(key.path).or_default();
                insert_new(factors, factor, tensor)
            }
            Role::Parameter if !config.has_parameter(&key.path) => Some(tensor),
            Role::Parameter => insert_new(&mut parameters, key.path, tensor),
            Role::Repeated if config.bias != BiasMode::None => continue,
            Role::Repeated => Some(tensor),
            Role::Rows if config.trainable_token_indices.is_none() => Some(tensor),
            Role::Rows => insert_new(&mut rows, key.path, tensor),
        };
        report.unexpected.extend(refused.map(|tensor| tensor.key));
    }
    let mut found = Found::default();
    for (path, mut tensors) in modules {
        let embedding = [Factor::EmbeddingA, Factor::EmbeddingB]
            .iter()
            .any(|factor| tensors.contains_key(factor));
        let mut rank = matcher.rank_for(&path, config.r)?;
        let experts: Vec<_> = config.experts_at(&path).collect();
        if let [parameter] = &experts[..] {
            rank = matcher.rank_for(parameter, config.r)?;
        }
        let wanted = Factor::of(embedding, config.lora_bias, config.use_dora);
        let shape_of = |factor| {
            let tensor: Option<&FoundTensor> = tensors.get(factor);
            tensor.map(|tensor| tensor.shape.as_slice())
        };
        let mut shape = ModuleShape::of(shape_of(&wanted[0]), shape_of(&wanted[1]));
        if !experts.is_empty() && shape.kernel.is_none() {
            shape = shape.of_experts(count_experts(shape_of(&wanted[0]), rank));
        }
        let mut factors = Vec::with_capacity(wanted.len());
        for factor in wanted {
            let Some(tensor) = tensors.remove(&factor) else {
                report.missing.push(tensor_key(&path, factor));
                continue;
            };
            match check_shape(tensor.key.clone(), &tensor.shape, shape.shape(factor, rank)) {
                Ok(key) => report.loaded.push(key),
                Err(mismatch) => report.mismatched.push(mismatch),
            }
            factors.push((factor, tensor));
        }
        let left = tensors.into_values().map(|tensor| tensor.key);
        report.unexpected.extend(left);
        found.modules.push(FoundModule {
            experts: !experts.is_empty(),
            path,
            factors,
        });
    }
    let loaded = parameters.values().chain(rows.values());
    report
        .loaded
        .extend(loaded.map(|tensor| tensor.key.clone()));
    for name in config.token_names() {
        if !rows.keys().any(|path| is_named(path, name)) {
            report.missing.push(rows_key(name));
        }
    }
    found.parameters = parameters.into_iter().collect();
    found.rows = rows.into_iter().collect();
    report.strict().map(|_| found)
}

/// Puts a value where there is none; otherwise gives it back.
fn insert_new<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: V) -> Option<V> {
    match map.entry(key) {
        std::collections::btree_map::Entry::Occupied(_) => Some(value),
        std::collections::btree_map::Entry::Vacant(place) => {
            place.insert(value);
            None
        }
    }
}

/// Names the tensor if it has this shape.
pub(super) fn check_shape(
    tensor: String,
    found: &[usize],
    expected: Vec<usize>,
) -> std::result::Result<String, Mismatch> {
    if found == expected {
        return Ok(tensor);
    }
    Err(Mismatch {
        tensor,
        expected,
        found: found.to_vec(),
    })
}
