//! What the tensors of a file are, by their names and shapes alone, before a value is read.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use burn::tensor::TensorData;

use super::config::{AdapterConfig, is_embedding, without_base_layers};
use super::elements::{by_rank, reshaped, transposed};
use super::file::SafetensorsFile;
use super::keys::{Factor, ReadKey, Role, read_key, rows_key, tensor_key};
use super::ranks::Ranks;
use super::report::{LoadReport, Mismatch};
use super::shapes::{ModuleShape, count_experts};
use crate::Result;
use crate::model::is_named;

/// How a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    /// In PyTorch's layout, as PEFT does.
    AsIs,
    /// `[d_in, r]` or `[r, d_out]`.
    Transposed,
    /// A factor `A` of experts apart, `[E, r, d_in]`.
    ExpertsA,
    /// A factor `B` of experts apart, `[E, d_out, r]`.
    ExpertsB,
}

/// A tensor of a file.
#[derive(Clone, Debug)]
pub(super) struct FoundTensor {
    /// Its name.
    pub key: String,
    stored: Stored,
    /// In PEFT's layout.
    shape: Vec<usize>,
}

impl FoundTensor {
    /// These values of the file in PEFT's layout.
    pub fn in_place(&self, data: TensorData) -> TensorData {
        match self.stored {
            Stored::AsIs => data,
            Stored::Transposed => transposed(&data),
            // `[E·r, d_in]`, expert by expert, as they lie.
            Stored::ExpertsA => reshaped(data, &self.shape),
            // `[d_out, r·E]`, rank by rank.
            Stored::ExpertsB => by_rank(&data),
        }
    }
}

/// A module that has factors.
#[derive(Debug)]
pub(super) struct FoundModule {
    pub path: String,
    pub factors: Vec<(Factor, FoundTensor)>,
    /// Whether they are of experts.
    pub experts: bool,
}

/// All tensors of a file.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The modules that have factors, with all that they must have, in the order of [`Factor::of`].
    pub modules: Vec<FoundModule>,
    /// Whole parameters that train, by their paths.
    pub parameters: Vec<(String, FoundTensor)>,
    /// Rows of embeddings by the paths of those.
    pub rows: Vec<(String, FoundTensor)>,
    /// What may be base values, by their paths.
    pub bases: Vec<(String, FoundTensor)>,
    /// The names of those that are base values only if the model has an embedding or a head of that path.
    pub doubtful: Vec<String>,
    /// What became of every tensor.
    pub report: LoadReport,
}

/// What every tensor of `file` is. One that is nothing, lacks its partners or has another shape is left out and reported.
///
/// Ranks and alphas that an older PEFT meant otherwise are written into `config` as PEFT 0.21 means them.
///
/// # Errors
///
/// Those of [`AdapterConfig::validate`] and [`Ranks`].
pub(super) fn find(file: &SafetensorsFile, config: &mut AdapterConfig) -> Result<Found> {
    let mut sorter = Sorter::new(file, config);
    for (name, shape) in file.shapes() {
        sorter.add(name, shape);
    }
    let Sorter {
        modules,
        parameters,
        rows,
        bases,
        doubtful,
        mut report,
        ..
    } = sorter;
    let sizes = modules.iter().map(|(path, tensors)| {
        let a = tensors.get(&Factor::A).or(tensors.get(&Factor::EmbeddingA));
        (path.as_str(), a.and_then(|a| a.shape.first().copied()))
    });
    config.take_old_patterns(&sizes.collect::<Vec<_>>())?;
    let ranks = Ranks::new(config)?;
    let mut found = Found::default();
    for (path, tensors) in modules {
        let module = check_module(path, tensors, config, &ranks, &mut report)?;
        found.modules.extend(module);
    }
    let loaded = parameters
        .values()
        .chain(rows.values())
        .chain(bases.values());
    let loaded = loaded.map(|tensor| tensor.key.clone());
    report.loaded.extend(loaded);
    for name in config.token_names() {
        if !rows.keys().any(|path| is_named(path, name)) && !config.shares_tokens(name) {
            report.missing.push(rows_key(name));
        }
    }
    report.unexpected.sort();
    found.parameters = parameters.into_iter().collect();
    found.rows = rows.into_iter().collect();
    found.bases = bases.into_iter().collect();
    found.doubtful = doubtful;
    found.report = report;
    Ok(found)
}

/// Puts tensors where their names say that they belong.
struct Sorter<'a> {
    config: &'a AdapterConfig,
    /// Names of adapters that keys of the file have.
    adapters: BTreeSet<String>,
    /// Modules that have factors.
    adapted: HashSet<String>,
    /// Modules that have a magnitude of PEFT's name.
    with_magnitude: HashSet<String>,
    /// Paths of plain parameters in the file.
    plain: HashSet<String>,
    /// Modules that have a factor `B` of mlx-lm's of experts apart.
    switches: HashSet<String>,
    modules: BTreeMap<String, BTreeMap<Factor, FoundTensor>>,
    parameters: BTreeMap<String, FoundTensor>,
    rows: BTreeMap<String, FoundTensor>,
    bases: BTreeMap<String, FoundTensor>,
    doubtful: Vec<String>,
    report: LoadReport,
}

impl<'a> Sorter<'a> {
    fn new(file: &SafetensorsFile, config: &'a AdapterConfig) -> Self {
        let mut sorter = Self {
            config,
            adapters: BTreeSet::new(),
            adapted: HashSet::new(),
            with_magnitude: HashSet::new(),
            plain: HashSet::new(),
            switches: HashSet::new(),
            modules: BTreeMap::new(),
            parameters: BTreeMap::new(),
            rows: BTreeMap::new(),
            bases: BTreeMap::new(),
            doubtful: Vec::new(),
            report: LoadReport::default(),
        };
        let keys = file
            .shapes()
            .filter_map(|(name, shape)| Some((read_key(name)?, shape)));
        for (key, shape) in keys {
            sorter.adapters.extend(key.adapter);
            match key.role {
                Role::Factor(Factor::B) if key.transposed && shape.len() == 3 => {
                    sorter.switches.insert(key.path.clone());
                    sorter.adapted.insert(key.path);
                }
                Role::Factor(Factor::Magnitude) => {
                    sorter.with_magnitude.insert(key.path);
                }
                Role::Factor(_) => {
                    sorter.adapted.insert(key.path);
                }
                Role::Parameter => {
                    sorter.plain.insert(key.path);
                }
                _ => {}
            }
        }
        sorter
    }

    fn add(&mut self, name: &str, shape: &[usize]) {
        let placed = read_key(name).and_then(|key| {
            let tensor = in_peft_layout(name, &key, shape, self.switches.contains(&key.path))?;
            self.place(key, tensor)
        });
        if placed.is_none() {
            self.report.unexpected.push(name.to_owned());
        }
    }

    /// Gives the tensor its place; `None` where it has none.
    fn place(&mut self, key: ReadKey, tensor: FoundTensor) -> Option<()> {
        let config = self.config;
        match key.role {
            Role::Factor(factor) => self.factor(key.path, factor, tensor),
            // As torchtune and mlx-lm name it; otherwise it is a parameter of that name.
            Role::Magnitude(_)
                if config.use_dora
                    && self.adapted.contains(&key.path)
                    && !self.with_magnitude.contains(&key.path) =>
            {
                self.factor(key.path, Factor::Magnitude, tensor)
            }
            Role::Magnitude(name) => self.parameter(format!("{}.{name}", key.path), tensor),
            Role::Rows if config.trainable_token_indices.is_none() => None,
            Role::Rows => insert_new(&mut self.rows, key.path, tensor),
            Role::Parameter => self.parameter(key.path, tensor),
            Role::Wrapped if config.is_trained_bias(&key.path) => {
                insert_new(&mut self.parameters, key.path, tensor)
            }
            Role::Wrapped => insert_new(&mut self.bases, key.path, tensor),
            // A bias of the base that PEFT stores because it has `bias` in its name.
            Role::Original if config.is_trained_bias(&key.path) => Some(()),
            Role::Original => insert_new(&mut self.bases, key.path, tensor),
            Role::Saved(rest) => {
                let (first, inner) = rest.split_first()?;
                let named = self.adapters.contains(first) || first == "default";
                let repeated = format!("{}.{}", key.path, rest.join("."));
                match inner {
                    // The state of a model: the adapter's name, and the parameter's path in the module.
                    [_, ..] if named || !self.plain.contains(&repeated) => {
                        let path = format!("{}.{}", key.path, inner.join("."));
                        match config.trains_whole(&path) {
                            true => insert_new(&mut self.parameters, path, tensor),
                            false => None,
                        }
                    }
                    // What PEFT writes a second time, and passes over on loading.
                    _ => Some(()),
                }
            }
        }
    }

    fn factor(&mut self, path: String, factor: Factor, tensor: FoundTensor) -> Option<()> {
        match factor {
            Factor::Bias if !self.config.lora_bias => None,
            Factor::Magnitude if !self.config.use_dora => None,
            // Two keys may mean one tensor: of two adapters, say. Only one of them has a place.
            _ => insert_new(self.modules.entry(path).or_default(), factor, tensor),
        }
    }

    fn parameter(&mut self, path: String, tensor: FoundTensor) -> Option<()> {
        if self.config.trains_whole(&path) {
            return insert_new(&mut self.parameters, path, tensor);
        }
        // Only a model tells whether it is a part of its base.
        let module = path.rsplit_once('.').map(|(module, _)| module)?;
        let key = tensor.key.clone();
        let is_usual = is_embedding(module);
        insert_new(&mut self.bases, path, tensor)?;
        self.doubtful.extend((!is_usual).then_some(key));
        Some(())
    }
}

/// A tensor as PEFT would store it; `None` for a shape that its writer cannot mean.
fn in_peft_layout(
    name: &str,
    key: &ReadKey,
    shape: &[usize],
    of_switch: bool,
) -> Option<FoundTensor> {
    let is_a = key.role == Role::Factor(Factor::A);
    let (stored, shape) = match (key.transposed, shape) {
        (false, shape) => (Stored::AsIs, shape.to_vec()),
        // Before mlx-lm kept experts apart in `A` too.
        (true, shape @ &[_, _]) if of_switch && is_a => (Stored::AsIs, shape.to_vec()),
        (true, &[rows, columns]) => (Stored::Transposed, vec![columns, rows]),
        // Of mlx-lm's `SwitchLinear`: experts apart, each in PyTorch's layout.
        (true, &[experts, rank, d_in]) if is_a => {
            (Stored::ExpertsA, vec![experts.checked_mul(rank)?, d_in])
        }
        (true, &[experts, d_out, rank]) if key.role == Role::Factor(Factor::B) => {
            (Stored::ExpertsB, vec![d_out, rank.checked_mul(experts)?])
        }
        _ => return None,
    };
    Some(FoundTensor {
        key: name.to_owned(),
        stored,
        shape,
    })
}

/// The module of these tensors, if it has all that it must have, in the shapes of its rank; all else is reported.
fn check_module(
    path: String,
    mut tensors: BTreeMap<Factor, FoundTensor>,
    config: &AdapterConfig,
    ranks: &Ranks,
    report: &mut LoadReport,
) -> Result<Option<FoundModule>> {
    let embedding = [Factor::EmbeddingA, Factor::EmbeddingB]
        .iter()
        .any(|factor| tensors.contains_key(factor));
    let wanted = Factor::of(embedding, config.lora_bias, config.use_dora);
    let shape_of = |factor| {
        let tensor: Option<&FoundTensor> = tensors.get(factor);
        tensor.map(|tensor| tensor.shape.as_slice())
    };
    let a = shape_of(&wanted[0]);
    let mut shape = ModuleShape::of(a, shape_of(&wanted[1]));
    let rows = a.and_then(|a| a.first().copied());
    let place = ranks.place(&path, rows)?;
    let experts = place.experts && shape.kernel.is_none();
    if experts {
        shape = shape.of_experts(count_experts(a, place.rank));
    }
    // Magnitudes and biases are of linear layers; PEFT has none of experts.
    let wanted = match experts {
        true => wanted[..2].to_vec(),
        false => wanted,
    };
    let mut factors = Vec::with_capacity(wanted.len());
    let (mut fits, mut loaded) = (true, Vec::new());
    for factor in wanted {
        let Some(tensor) = tensors.remove(&factor) else {
            report.missing.push(tensor_key(&path, factor));
            // What PEFT begins with in its place.
            let note = match factor {
                Factor::Bias => {
                    "\"lora_bias\" among `ReadOptions::ignored_keys` takes the factors without biases: PEFT would take zeros for them"
                }
                Factor::Magnitude => {
                    "\"use_dora\" among `ReadOptions::ignored_keys` takes the factors without magnitudes, as LoRA: PEFT would take the norms of \
                     its base for them"
                }
                _ => "",
            };
            if !note.is_empty() && !report.notes.iter().any(|known| known == note) {
                report.notes.push(note.into());
            }
            fits = false;
            continue;
        };
        let expected = shape.shape(factor, place.rank);
        match check_shape(tensor.key.clone(), &tensor.shape, expected) {
            Ok(key) => loaded.push(key),
            Err(mismatch) => {
                report.mismatched.push(mismatch);
                fits = false;
            }
        }
        factors.push((factor, tensor));
    }
    let left = tensors.into_values().map(|tensor| tensor.key);
    report.unexpected.extend(left);
    // Some factors without the others are not put anywhere.
    match fits {
        true => report.loaded.extend(loaded),
        false => report.left_out.extend(loaded),
    }
    Ok(fits.then_some(FoundModule {
        path,
        factors,
        experts,
    }))
}

impl AdapterConfig {
    /// Whether PEFT stores no rows under this name, as another name means the same rows: of a head that shares the embedding's weight.
    pub(super) fn shares_tokens(&self, name: &str) -> bool {
        use crate::model::TrainableTokens::Named;

        let Some(Named(named)) = &self.trainable_token_indices else {
            return false;
        };
        let own = named.get(name);
        let mut others = named.iter().filter(|(other, _)| *other != name);
        others.any(|(_, indices)| Some(indices) == own)
    }

    /// The tensors of experts, by their paths, that factors under this module path may be of.
    pub(super) fn experts_of(&self, path: &str) -> Vec<String> {
        self.experts_at(without_base_layers(path).0).collect()
    }
}

/// Puts a value where there is none; otherwise there is no place for it.
fn insert_new<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: V) -> Option<()> {
    match map.entry(key) {
        std::collections::btree_map::Entry::Occupied(_) => None,
        std::collections::btree_map::Entry::Vacant(place) => {
            place.insert(value);
            Some(())
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
