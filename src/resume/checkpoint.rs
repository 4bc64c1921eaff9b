//! Where a run stands, in a file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::module::Module;
use burn::optim::ModuleOptimizer;
use burn::tensor::TensorData;

use super::Seed;
use super::container::{self, Manifest, Numbers};
use super::description::{Difference, describe, differences};
use super::optimizer::{self, State};
use super::parameters::{self, Parameter};
use crate::format::{WriteOptions, write_files};
use crate::model::PeftModel;
use crate::{PeftError, Result};

/// First parts of the names of tensors.
const ADAPTERS: &str = "adapters.";
const OPTIMIZER: &str = "optimizer.";
const STATISTICS: &str = "statistics.";

/// Where a run stands between two steps: what [`save`](Self::save) writes beside model and optimiser, and
/// [`load`](Self::load) returns. See the [module](super) for how a loop uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The seed of the run.
    pub seed: Seed,
    /// How many steps of the optimiser are done: the number of the next one, counted from 0.
    pub step: u64,
}

impl Checkpoint {
    /// Writes the adapters of `model`, active or not, the optimiser's state, the seed and the step into one file, atomically:
    /// whoever looks, also after a crash, finds the old file or the new one, whole. The file's directory is made where it
    /// is not there. Running statistics of the model (those of a `BatchNorm`), which forward passes in training change, are
    /// written too.
    ///
    /// Values are kept in their dtype, bit for bit. Takes memory for two copies of them on the host. For an
    /// [`AdaptersOnly`](crate::model::AdaptersOnly), give what it derefs to.
    ///
    /// # Errors
    ///
    /// [`PeftError::Exists`] if there is a file and `options` do not say to overwrite; [`PeftError::OptimizerState`] if
    /// anything but adapters trains, whose progress would be lost, or Burn's record cannot be made;
    /// [`PeftError::DType`] for factors that are not F32, BF16 or F16, and for a state that the optimiser would restore in another
    /// dtype: Burn's own restore F32 alone, so that bf16 factors need [`F32State`](crate::optim::F32State) around them,
    /// [`AdamW8bit`](crate::optim::AdamW8bit), or one without a state; [`PeftError::DeviceRead`]; [`PeftError::Io`].
    /// No file has changed then.
    pub fn save<M: Module>(
        &self,
        path: impl AsRef<Path>,
        model: &PeftModel<M>,
        optimizer: &ModuleOptimizer,
        options: &WriteOptions,
    ) -> Result<()> {
        let path = path.as_ref();
        if let Some(path) = parameters::trains_elsewhere(model) {
            return Err(PeftError::OptimizerState {
                reason: format!(
                    "`{path}` trains and is no adapter's: a checkpoint would not hold it"
                ),
            });
        }
        let mut tensors = BTreeMap::new();
        let mut numbers = BTreeMap::new();
        let mut states = optimizer::states(optimizer)?;
        // States of parameters that the model no longer has, of a deleted adapter for instance, stay behind.
        for (name, parameter) in parameters::parameters(model) {
            let Some(state) = states.remove(&parameter.id.val()) else {
                continue;
            };
            optimizer::check_restored(optimizer, &name, &parameter, &state)?;
            for (field, data) in state.tensors {
                tensors.insert(format!("{OPTIMIZER}{name}.{field}"), data);
            }
            let (path, kept) = (state.path, state.numbers);
            numbers.insert(
                name,
                Numbers {
                    path,
                    numbers: kept,
                },
            );
        }
        for (name, data) in parameters::values(model)? {
            tensors.insert(format!("{ADAPTERS}{name}"), data);
        }
        for (name, data) in parameters::statistics(model)? {
            tensors.insert(format!("{STATISTICS}{name}"), data);
        }
        let manifest = Manifest {
            seed: self.seed.0,
            step: self.step,
            belongs_to: describe(model)?,
            optimizer: numbers,
        };
        let bytes = container::to_bytes(&manifest, &tensors)?;
        let (Some(dir), Some(name)) = (
            path.parent(),
            path.file_name().and_then(|name| name.to_str()),
        ) else {
            return Err(PeftError::Malformed {
                path: path.to_owned(),
                reason: "not the path of a file with a name in UTF-8".into(),
            });
        };
        // The parent of a bare name is empty, which no system opens.
        let dir = match dir.as_os_str().is_empty() {
            true => Path::new("."),
            false => dir,
        };
        write_files(dir, &[(name, &bytes)], options.overwrite)
    }

    /// Reads a checkpoint into a model that was built as the saved one was (same base, same quantisation, adapters of the
    /// same names, configurations and targets, the same one active) and an optimiser that was configured as the saved
    /// one. Parameters keep the ids they have here; the optimiser's older state, if any, is dropped.
    ///
    /// What cannot be seen is not checked: the values of the base, and what leaves no trace in an optimiser's state (Adam's
    /// and AdamW's are the same; so are those of two decays).
    ///
    /// # Errors
    ///
    /// [`PeftError::OtherRun`] with all that differs, if the checkpoint is of other adapters or of an optimiser with another
    /// state; [`PeftError::Malformed`] for a file that is damaged or none of [`save`](Self::save)'s, or larger than
    /// [`MAX_CHECKPOINT_BYTES`](super::MAX_CHECKPOINT_BYTES); [`PeftError::DType`] and [`PeftError::OptimizerState`] in
    /// [`PeftError::InFile`]; [`PeftError::Io`]. Model and optimiser are as they were then.
    pub fn load<M: Module>(
        path: impl AsRef<Path>,
        model: &mut PeftModel<M>,
        optimizer: &mut ModuleOptimizer,
    ) -> Result<Self> {
        let path = path.as_ref();
        let (manifest, tensors) = container::read(path)?;
        let checkpoint = Self {
            seed: Seed(manifest.seed),
            step: manifest.step,
        };
        let fitting =
            fit(manifest, tensors, model, optimizer).map_err(|error| error.in_file(path))?;
        *model = parameters::replace(model.clone(), fitting.values);
        parameters::replace_statistics(model, fitting.statistics);
        *optimizer = fitting.optimizer;
        Ok(checkpoint)
    }
}

/// Values of parameters, and states of the optimiser for some of them.
type Parts = (BTreeMap<String, TensorData>, BTreeMap<String, State>);

/// What a checkpoint puts in place.
struct Fitting {
    values: BTreeMap<String, TensorData>,
    statistics: BTreeMap<String, TensorData>,
    optimizer: ModuleOptimizer,
}

/// The values of the model's parameters and running statistics, and the optimiser with its states, or why they do not fit.
fn fit<M: Module>(
    manifest: Manifest,
    mut tensors: BTreeMap<String, TensorData>,
    model: &PeftModel<M>,
    optimizer: &ModuleOptimizer,
) -> Result<Fitting> {
    refuse(differences(&manifest.belongs_to, &describe(model)?))?;
    let statistics = take_statistics(&mut tensors, model)?;
    let parameters = parameters::parameters(model);
    let (values, mut states) = sort(tensors, manifest.optimizer, &parameters)?;
    let ids = states.keys().filter_map(|name| parameters.get(name));
    let ids = ids.map(|parameter| parameter.id).collect();
    // The model may be a part of what the optimiser steps.
    let place = states.iter().next().and_then(|(name, state)| {
        let path = state.path.as_deref()?;
        path.strip_suffix(name.as_str()).map(str::to_owned)
    });
    let place = place.unwrap_or_default();
    let expected = optimizer::expected(optimizer, model, ids, &place)?;

    let mut found = Vec::new();
    let mut fitting = Vec::new();
    for (name, parameter) in &parameters {
        let text = |dtype, shape: &[usize]| Some(format!("{dtype:?} {shape:?}"));
        let value = values.get(name);
        found.push(Difference {
            what: format!("`{ADAPTERS}{name}`"),
            checkpoint: value.and_then(|data| text(data.dtype(), data.shape())),
            here: text(parameter.dtype, &parameter.shape),
        });
        let Some(state) = states.remove(name) else {
            continue;
        };
        if let Some(field) = state.absurd() {
            return Err(PeftError::OptimizerState {
                reason: format!("`{field}` of `{name}` is a number that no run reaches"),
            });
        }
        let expected = expected.get(&parameter.id.val());
        found.push(Difference {
            what: format!("the optimiser's state of `{name}`"),
            checkpoint: Some(state.layout()),
            here: expected.map(State::layout),
        });
        fitting.push((name, parameter, state));
    }
    found.retain(|difference| difference.checkpoint != difference.here);
    refuse(found)?;
    for (name, parameter, state) in &fitting {
        optimizer::check_restored(optimizer, name, parameter, state)?;
    }
    let fitting = fitting.into_iter();
    let fitting = fitting
        .map(|(_, parameter, state)| (parameter, state))
        .collect();
    Ok(Fitting {
        values,
        statistics,
        optimizer: optimizer::with_states(optimizer, fitting)?,
    })
}

/// Takes the running statistics out of a file's content: all that the model has, and no others.
fn take_statistics<M: Module>(
    tensors: &mut BTreeMap<String, TensorData>,
    model: &PeftModel<M>,
) -> Result<BTreeMap<String, TensorData>> {
    let here = parameters::statistics(model)?;
    let mut found = BTreeMap::new();
    for key in tensors.keys().cloned().collect::<Vec<_>>() {
        if let Some(name) = key.strip_prefix(STATISTICS)
            && let Some(data) = tensors.remove(&key)
        {
            found.insert(name.to_owned(), data);
        }
    }
    let names: BTreeSet<&String> = here.keys().chain(found.keys()).collect();
    let text = |data: &TensorData| format!("{:?} {:?}", data.dtype(), data.shape());
    let differences = names.into_iter().map(|name| Difference {
        what: format!("`{STATISTICS}{name}`"),
        checkpoint: found.get(name).map(text),
        here: here.get(name).map(text),
    });
    refuse(
        differences
            .filter(|difference| difference.checkpoint != difference.here)
            .collect(),
    )?;
    Ok(found)
}

/// Sorts the content of a file by parameter. What belongs to none is an error.
fn sort(
    tensors: BTreeMap<String, TensorData>,
    numbers: BTreeMap<String, Numbers>,
    parameters: &BTreeMap<String, Parameter>,
) -> Result<Parts> {
    let mut values = BTreeMap::new();
    let mut strays = Vec::new();
    let mut states = BTreeMap::new();
    let stray = |what: String| Difference {
        what,
        checkpoint: Some("there".into()),
        here: None,
    };
    for (name, Numbers { path, numbers }) in numbers {
        match parameters.contains_key(&name) {
            true => {
                let tensors = BTreeMap::new();
                states.insert(
                    name,
                    State {
                        path,
                        tensors,
                        numbers,
                    },
                );
            }
            false => strays.push(stray(format!("the optimiser's state of `{name}`"))),
        }
    }
    for (key, data) in tensors {
        let adapters = key.strip_prefix(ADAPTERS);
        if let Some(name) = adapters.filter(|name| parameters.contains_key(*name)) {
            values.insert(name.to_owned(), data);
            continue;
        }
        // Fields have dots as paths have; no parameter's path begins with another's.
        let state = key.strip_prefix(OPTIMIZER).and_then(|rest| {
            let mut dots = rest.match_indices('.').map(|(dot, _)| rest.split_at(dot));
            let (name, field) = dots.find(|(name, _)| states.contains_key(*name))?;
            Some((name.to_owned(), field[1..].to_owned()))
        });
        match state.and_then(|(name, field)| Some((states.get_mut(&name)?, field))) {
            Some((state, field)) => {
                state.tensors.insert(field, data);
            }
            None => strays.push(stray(format!("`{key}`"))),
        }
    }
    refuse(strays)?;
    Ok((values, states))
}

fn refuse(differences: Vec<Difference>) -> Result<()> {
    match differences.is_empty() {
        true => Ok(()),
        false => Err(PeftError::OtherRun { differences }),
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::{AdamWConfig, GradientsParams};
    use burn::tensor::{Device, Tensor};

    use super::super::container::Number;
    use super::*;
    use crate::adapter::LoraConfig;
    use crate::model::{PeftConfig, PeftForward, TargetConfig};

    #[derive(Module, Debug)]
    struct Net {
        linear: Linear,
    }

    const A: &str = "linear.weight.peft.x.a";

    /// A model after one step, with its optimiser.
    fn trained() -> (PeftModel<Net>, ModuleOptimizer) {
        let device = Device::default().autodiff();
        let linear = LinearConfig::new(4, 3).init(&device);
        let mut model = PeftModel::new(Net { linear });
        let config = PeftConfig::new(LoraConfig::new(2), TargetConfig::all_linear());
        model.add_adapter("x", &config).unwrap();
        let mut optimizer = AdamWConfig::new().init();
        let y = model
            .linear
            .forward_peft(Tensor::<2>::ones([1, 4], &device));
        let grads = GradientsParams::from_grads(y.sum().backward(), &model);
        let model = optimizer.step(0.1, model, grads);
        (model, optimizer)
    }

    /// All that an optimiser keeps, sorted: Burn's record has it in the order of a hash map.
    fn content(optimizer: &ModuleOptimizer) -> Vec<String> {
        let states = optimizer::states(optimizer).unwrap();
        let text = |(id, state): (u64, State)| {
            let values = state.tensors.values().map(TensorData::as_bytes);
            let values: Vec<_> = values.collect();
            let (path, numbers) = (&state.path, &state.numbers);
            format!("{id} {path:?} {} {numbers:?} {values:?}", state.layout())
        };
        states.into_iter().map(text).collect()
    }

    type Change = fn(&mut Manifest, &mut BTreeMap<String, TensorData>);

    /// Files with a right digest, so that only what they say speaks against them.
    #[test]
    fn a_file_that_says_too_much_too_little_or_nonsense_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checkpoint");
        let (mut model, mut optimizer) = trained();
        let checkpoint = Checkpoint {
            seed: Seed(1),
            step: 1,
        };
        let keep = WriteOptions::default();
        checkpoint.save(&path, &model, &optimizer, &keep).unwrap();
        let before = content(&optimizer);
        let changes: [(&str, Change); 9] = [
            (
                "adapters.linear.weight.peft.x.a`: `F32 [1, 2]` in the checkpoint",
                |_, tensors| {
                    tensors.insert(format!("{ADAPTERS}{A}"), TensorData::from([[1f32, 2.0]]));
                },
            ),
            ("nothing in the checkpoint", |_, tensors| {
                tensors.remove(&format!("{ADAPTERS}{A}"));
            }),
            ("`adapters.other`", |_, tensors| {
                tensors.insert(format!("{ADAPTERS}other"), TensorData::from([1f32]));
            }),
            ("moment_1", |_, tensors| {
                // Of another rank, at which Burn itself would panic.
                let name = format!("{OPTIMIZER}{A}.momentum.moment_1");
                assert!(tensors.insert(name, TensorData::from([1f32])).is_some());
            }),
            ("moment_2", |_, tensors| {
                let name = format!("{OPTIMIZER}{A}.momentum.moment_2");
                tensors.remove(&name).unwrap();
            }),
            ("moment_1", |manifest, _| {
                manifest.optimizer.remove(A).unwrap();
            }),
            ("`other`", |manifest, _| {
                let state = manifest.optimizer.remove(A).unwrap();
                manifest.optimizer.insert("other".into(), state);
            }),
            ("no run reaches", |manifest, _| {
                let state = manifest.optimizer.get_mut(A).unwrap();
                state
                    .numbers
                    .insert("momentum.time".into(), Number::Uint(1 << 31))
                    .unwrap();
            }),
            ("momentum.time: bool", |manifest, _| {
                let state = manifest.optimizer.get_mut(A).unwrap();
                state
                    .numbers
                    .insert("momentum.time".into(), Number::Bool(true))
                    .unwrap();
            }),
        ];
        for (expected, change) in changes {
            let (mut manifest, mut tensors) = container::read(&path).unwrap();
            change(&mut manifest, &mut tensors);
            let changed = dir.path().join("changed");
            std::fs::write(&changed, container::to_bytes(&manifest, &tensors).unwrap()).unwrap();
            let error = Checkpoint::load(&changed, &mut model, &mut optimizer).unwrap_err();
            assert!(error.to_string().contains(expected), "{expected}: {error}");
            assert!(matches!(error, PeftError::InFile { .. }), "{error:?}");
            assert_eq!(content(&optimizer), before);
        }
        assert_eq!(
            Checkpoint::load(&path, &mut model, &mut optimizer).unwrap(),
            checkpoint
        );
        assert_eq!(content(&optimizer), before);
    }
}
