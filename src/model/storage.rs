//! How many bytes a model's parameters take, by what they are stored as.

use std::fmt;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, DType, Int, Tensor};

use super::weight::{CONTAINER, NF4};

/// What parameters are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stored {
    /// Codes and scales of weights packed in NF4.
    Nf4,
    /// A dense tensor, or one in a quantisation of Burn's, of which the values are counted and not the scales.
    Dense(DType),
    /// Not initialised: what they will be stored as is not known, so their bytes are those of f32.
    Uninitialized,
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Self::Nf4 => "nf4",
            Self::Dense(dtype) => dtype.name(),
            Self::Uninitialized => "uninitialised",
        })
    }
}

/// What is stored in one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// How many tensors, a packed weight counting as those it is made of.
    pub tensors: usize,
    /// Their values; of packed weights, their words.
    pub values: usize,
    /// Their bytes.
    pub bytes: usize,
}

/// How many bytes the parameters of a module take, by what they are stored as, with all that is attached to them.
///
/// Taken before and after a model is wrapped, packed or adapted it shows what these did: nothing of the base changes its
/// dtype but what was packed, and adapters are f32 unless made otherwise. Two parameters that share a tensor count
/// twice.
///
/// ```
/// # use burn::{nn::LinearConfig, tensor::Device};
/// # use burn_peft::{adapter::LoraConfig, model::{PeftConfig, PeftModel, Storage, TargetConfig}};
/// # let linear = LinearConfig::new(64, 64).init(&Device::default());
/// let before = Storage::of(&linear);
/// let mut model = PeftModel::new(linear);
/// println!("{}", before.beside(&Storage::of(&model)));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Storage {
    /// Amounts, in the order in which the module's parameters come.
    pub kinds: Vec<(Stored, Amount)>,
}

impl Storage {
    /// Looks at every parameter of `module`, and initialises none.
    pub fn of<M: Module>(module: &M) -> Self {
        let mut visitor = Visitor::default();
        module.visit(&mut visitor);
        visitor.storage
    }

    /// All bytes.
    pub fn bytes(&self) -> usize {
        self.kinds.iter().map(|(_, amount)| amount.bytes).sum()
    }

    /// The bytes that are stored in one way.
    pub fn bytes_of(&self, stored: Stored) -> usize {
        let found = self.kinds.iter().find(|(kind, _)| *kind == stored);
        found.map_or(0, |(_, amount)| amount.bytes)
    }

    /// A table of this storage and that of `after`, side by side.
    pub fn beside(&self, after: &Self) -> impl fmt::Display {
        Beside([self.clone(), after.clone()])
    }
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (stored, amount) in &self.kinds {
            let Amount { tensors, bytes, .. } = amount;
            writeln!(f, "{stored:<14} {bytes:>16} bytes in {tensors} tensors")?;
        }
        write!(f, "{:<14} {:>16} bytes", "all", self.bytes())
    }
}

struct Beside([Storage; 2]);

impl fmt::Display for Beside {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [before, after] = &self.0;
        writeln!(f, "{:<14} {:>16} {:>16}", "bytes", "before", "after")?;
        let gone = before.kinds.iter().map(|(stored, _)| *stored);
        let gone = gone.filter(|stored| after.bytes_of(*stored) == 0);
        for stored in gone.chain(after.kinds.iter().map(|(stored, _)| *stored)) {
            let [before, after] = [before, after].map(|storage| storage.bytes_of(stored));
            writeln!(f, "{stored:<14} {before:>16} {after:>16}")?;
        }
        let [before, after] = [before.bytes(), after.bytes()];
        write!(f, "{:<14} {before:>16} {after:>16}", "all")
    }
}

/// The bytes of so many values; of a dtype that is not known, what they will take in f32.
pub(super) fn bytes(dtype: Option<DType>, values: usize) -> usize {
    match dtype {
        None => 4 * values,
        // Of a packed dtype Burn's size is that of what values are packed into.
        Some(DType::QFloat(scheme)) => (values * scheme.size_bits_value()).div_ceil(8),
        Some(dtype) => values * dtype.size(),
    }
}

#[derive(Default)]
struct Visitor {
    /// What the fields on the way are of.
    containers: Vec<String>,
    /// The float parameter seen last: what its packed form stands for is not stored.
    last: Option<(Stored, Amount)>,
    storage: Storage,
}

impl Visitor {
    fn add(&mut self, dtype: Option<DType>, values: usize) {
        let container = self.containers.last();
        let stored = match dtype {
            _ if container.is_some_and(|name| name == "Struct:Nf4Weight") => Stored::Nf4,
            Some(dtype) => Stored::Dense(dtype),
            None => Stored::Uninitialized,
        };
        let bytes = bytes(dtype, values);
        let added = Amount {
            tensors: 1,
            values,
            bytes,
        };
        self.last = Some((stored, added));
        let kinds = &mut self.storage.kinds;
        let at = kinds.iter().position(|(kind, _)| *kind == stored);
        let at = at.unwrap_or_else(|| {
            kinds.push((stored, Amount::default()));
            kinds.len() - 1
        });
        let amount = &mut kinds[at].1;
        amount.tensors += 1;
        amount.values += values;
        amount.bytes += bytes;
    }

    /// Takes back what was added last.
    fn take_back(&mut self) {
        let Some((stored, last)) = self.last.take() else {
            return;
        };
        let kinds = &mut self.storage.kinds;
        if let Some((_, amount)) = kinds.iter_mut().find(|(kind, _)| *kind == stored) {
            amount.tensors -= last.tensors;
            amount.values -= last.values;
            amount.bytes -= last.bytes;
        }
        kinds.retain(|(_, amount)| amount.tensors > 0);
    }
}

impl ModuleVisitor for Visitor {
    fn enter_module(&mut self, name: &str, container: &str) {
        if name == NF4 && container == CONTAINER {
            self.take_back();
        }
        self.containers.push(container.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.containers.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let dtype = param.is_initialized().then(|| param.base().dtype());
        self.add(dtype, param.lazy_shape().num_elements());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let dtype = param.is_initialized().then(|| param.val().dtype());
        self.add(dtype, param.lazy_shape().num_elements());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        let dtype = param.is_initialized().then(|| param.val().dtype());
        self.add(dtype, param.lazy_shape().num_elements());
    }
}
