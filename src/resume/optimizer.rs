//! The state of any of Burn's optimisers, by parameter path.
//!
//! Burn's record of it is a burnpack container: tensors and numbers `ID.FIELD` for each parameter id. What an optimiser
//! accepts is found out by asking it: a step on a clone of it, with gradients of zero, leaves a state of the right
//! fields, shapes and dtypes.

use std::collections::BTreeMap;

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Bytes, Device, Tensor, TensorData};
use burn_pack::{Reader, Scalar, Writer};

use super::container::Number;
use super::parameters::Parameter;
use crate::model::{AdaptersOnly, PeftModel};
use crate::{PeftError, Result};

/// Burn's own number of a state: the rank of its parameter.
const RANK: &str = "__rank";
/// Largest integer of a state. Optimisers count steps and raise to the power of their number, in 32 bits.
const MAX_INTEGER: u64 = i32::MAX as u64;

/// What an optimiser keeps for one parameter.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    /// Path of the parameter in the module that the optimiser was given.
    pub path: Option<String>,
    pub tensors: BTreeMap<String, TensorData>,
    pub numbers: BTreeMap<String, Number>,
}

/// To the bit: a NaN is equal to itself.
impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        let bits = |state: &Self| {
            let tensors = state.tensors.iter().map(|(field, data)| {
                let shape = data.shape().as_slice().to_vec();
                (field.clone(), data.dtype(), shape, data.as_bytes().to_vec())
            });
            tensors.collect::<Vec<_>>()
        };
        self.path == other.path && self.numbers == other.numbers && bits(self) == bits(other)
    }
}

impl State {
    /// Its fields in words; equal texts fit each other.
    pub fn layout(&self) -> String {
        let tensors = self.tensors.iter().map(|(field, data)| {
            format!("{field}: {:?} {:?}", data.dtype(), data.shape().as_slice())
        });
        let numbers = self.numbers.iter().map(|(field, number)| {
            let kind = match number {
                Number::Int(_) => "int",
                Number::Uint(_) => "uint",
                Number::FloatBits(_) => "float",
                Number::Bool(_) => "bool",
            };
            format!("{field}: {kind}")
        });
        tensors.chain(numbers).collect::<Vec<_>>().join(", ")
    }

    /// A number that no run of an optimiser reaches, if there is one: its field.
    pub fn absurd(&self) -> Option<&str> {
        let mut numbers = self.numbers.iter();
        let absurd = numbers.find(|(_, number)| match number {
            Number::Int(value) => value.unsigned_abs() > MAX_INTEGER,
            Number::Uint(value) => *value > MAX_INTEGER,
            Number::FloatBits(_) | Number::Bool(_) => false,
        });
        absurd.map(|(field, _)| field.as_str())
    }
}

/// Whether `optimizer` restores this state to the bit. What Burn 0.22 derives for a state restores tensors in the default dtype of
/// the default device, whatever they were: an AdamW of bf16 factors would meet f32 moments at its next step, and panic. So the
/// optimiser is asked: it is given the state, one parameter at a time, and what it then has is compared.
///
/// # Errors
///
/// [`PeftError::DType`] for a tensor that comes back in another dtype, [`PeftError::OptimizerState`] for anything else; `name` is
/// that of the parameter.
pub(super) fn check_restored(
    optimizer: &ModuleOptimizer,
    name: &str,
    parameter: &Parameter,
    state: &State,
) -> Result<()> {
    let empty = optimizer.clone().load_record(OptimizerRecord::default());
    let loaded = with_states(&empty, vec![(parameter, state.clone())])?;
    let restored = states(&loaded)?.remove(&parameter.id.val());
    let restored = restored.unwrap_or_default();
    for (field, data) in &state.tensors {
        let Some(found) = restored.tensors.get(field) else {
            continue;
        };
        if found.dtype() != data.dtype() {
            return Err(PeftError::DType {
                tensor: format!("{field} of the optimiser for {name}"),
                expected: format!(
                    "{:?}, in which alone Burn restores this optimiser's state",
                    found.dtype()
                ),
                found: format!("{:?}", data.dtype()),
            });
        }
    }
    match restored == *state {
        true => Ok(()),
        false => Err(error(format!(
            "its state of `{name}` is not restored as it was: {} became {}",
            state.layout(),
            restored.layout(),
        ))),
    }
}

fn error(reason: impl ToString) -> PeftError {
    PeftError::OptimizerState {
        reason: reason.to_string(),
    }
}

/// The states of all parameters that have one.
///
/// # Errors
///
/// [`PeftError::OptimizerState`] if Burn's record is not as described above.
pub(super) fn states(optimizer: &ModuleOptimizer) -> Result<BTreeMap<u64, State>> {
    let reader = Reader::from_bytes(optimizer.into_bytes().map_err(error)?).map_err(error)?;
    let mut states: BTreeMap<u64, State> = BTreeMap::new();
    let split = |key: &str| {
        let (id, field) = key.split_once('.')?;
        Some((id.parse::<u64>().ok()?, field.to_owned()))
    };
    let unknown = |key: &str| error(format!("`{key}` belongs to no parameter"));
    for (key, &scalar) in reader.scalars() {
        let (id, field) = split(key).ok_or_else(|| unknown(key))?;
        let number = match scalar {
            Scalar::Int(value) => Number::Int(value),
            Scalar::UInt(value) => Number::Uint(value),
            Scalar::Float(value) => Number::FloatBits(value.to_bits()),
            Scalar::Bool(value) => Number::Bool(value),
        };
        // A state of no field at all has a rank, and counts.
        let state = states.entry(id).or_default();
        if field != RANK {
            state.numbers.insert(field, number);
        }
    }
    for (key, path) in reader.metadata() {
        let id = key.parse::<u64>().map_err(|_| unknown(key))?;
        states.entry(id).or_default().path = Some(path.clone());
    }
    for tensor in reader.into_tensors().map_err(error)? {
        let (key, dtype, shape, _, bytes) = tensor.into_parts().map_err(error)?;
        let (id, field) = split(&key).ok_or_else(|| unknown(&key))?;
        let data = TensorData::try_from_bytes_vec(bytes.to_vec(), shape, dtype).map_err(error)?;
        states.entry(id).or_default().tensors.insert(field, data);
    }
    Ok(states)
}

/// `optimizer` with these states and no others. Each belongs to a parameter and fits the optimiser.
///
/// # Errors
///
/// [`PeftError::OptimizerState`] if Burn does not take them.
pub(super) fn with_states(
    optimizer: &ModuleOptimizer,
    states: Vec<(&Parameter, State)>,
) -> Result<ModuleOptimizer> {
    let mut tensors = Vec::new();
    let mut scalars = Vec::new();
    let mut paths = Vec::new();
    for (parameter, state) in states {
        let id = parameter.id.val();
        for (field, data) in state.tensors {
            let (bytes, shape, dtype) = data.into_parts();
            let name = format!("{id}.{field}");
            tensors.push(burn_pack::Tensor::new(name, dtype, shape, Some(id), bytes));
        }
        scalars.push((format!("{id}.{RANK}"), Scalar::from(parameter.shape.len())));
        for (field, number) in state.numbers {
            let scalar = match number {
                Number::Int(value) => Scalar::Int(value),
                Number::Uint(value) => Scalar::UInt(value),
                Number::FloatBits(bits) => Scalar::Float(f64::from_bits(bits)),
                Number::Bool(value) => Scalar::Bool(value),
            };
            scalars.push((format!("{id}.{field}"), scalar));
        }
        paths.extend(state.path.map(|path| (id.to_string(), path)));
    }
    let mut writer = Writer::new(tensors);
    for (key, scalar) in scalars {
        writer = writer.with_scalar(&key, scalar);
    }
    for (key, path) in paths {
        writer = writer.with_metadata(&key, &path);
    }
    let bytes: Bytes = writer.into_bytes().map_err(error)?;
    let record = OptimizerRecord::from_bytes(bytes).map_err(error)?;
    Ok(optimizer.clone().load_record(record))
}

/// The states that `optimizer` makes for the parameters `ids` of `model`, as far as their fields go. The model stands at the
/// path `at` of the module that the optimiser is given, by which parameter groups may choose.
///
/// # Errors
///
/// As [`states`].
pub(super) fn expected<M: Module>(
    optimizer: &ModuleOptimizer,
    model: &PeftModel<M>,
    ids: Vec<ParamId>,
    at: &str,
) -> Result<BTreeMap<u64, State>> {
    let mut optimizer = optimizer.clone().load_record(OptimizerRecord::default());
    let model = Placed {
        at: at
            .split('.')
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect(),
        model: model.clone().adapters_only(),
    };
    let grads = GradientsParams::new();
    let mut zeros = Zeros { ids, grads };
    model.visit(&mut zeros);
    // The rate is not zero, which a configuration may refuse; the stepped clone is dropped.
    optimizer.step(1e-3, model, zeros.grads);
    states(&optimizer)
}

/// A model inside of modules of these names.
#[derive(Clone, Debug)]
struct Placed<M> {
    at: Vec<String>,
    model: AdaptersOnly<M>,
}

impl<M: Module> Placed<M> {
    fn each(self, f: impl FnOnce(AdaptersOnly<M>) -> AdaptersOnly<M>) -> Self {
        let (at, model) = (self.at, f(self.model));
        Self { at, model }
    }
}

impl<M: Module> Module for Placed<M> {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.at
            .iter()
            .for_each(|name| visitor.enter_module(name, ""));
        self.model.visit(visitor);
        self.at
            .iter()
            .rev()
            .for_each(|name| visitor.exit_module(name, ""));
    }

    fn map<F: ModuleMapper>(self, mapper: &mut F) -> Self {
        self.at
            .iter()
            .for_each(|name| mapper.enter_module(name, ""));
        let placed = self.each(|model| model.map(mapper));
        placed
            .at
            .iter()
            .rev()
            .for_each(|name| mapper.exit_module(name, ""));
        placed
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        self.model.collect_devices(devices)
    }

    fn to_device(self, device: &Device) -> Self {
        self.each(|model| model.to_device(device))
    }

    fn fork(self, device: &Device) -> Self {
        self.each(|model| model.fork(device))
    }

    fn valid(&self) -> Self {
        self.clone().each(|model| model.valid())
    }

    fn train(self) -> Self {
        self.each(Module::train)
    }

    fn materialize(self) -> Self {
        self.each(Module::materialize)
    }
}

struct Zeros {
    ids: Vec<ParamId>,
    grads: GradientsParams,
}

impl ModuleVisitor for Zeros {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.ids.contains(&param.id) {
            let grad = param.val().inner().zeros_like();
            self.grads.register(param.id, grad);
        }
    }
}
