//! What an adapter does to one parameter: a low-rank change, values of its own, or rows of its own.

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor};
use burn::tensor::{DType, Device};

use super::{Lora, TrainedCopy, TrainedRows};

/// One adapter's change of one parameter.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // Nearly every change there is is the largest variant.
pub enum Change {
    /// A low-rank change of a weight.
    Lora(Lora),
    /// Values of its own for the whole parameter, trained or frozen.
    Copy(TrainedCopy),
    /// Rows of its own in an embedding.
    Rows(TrainedRows),
}

impl From<Lora> for Change {
    fn from(lora: Lora) -> Self {
        Self::Lora(lora)
    }
}

impl From<TrainedCopy> for Change {
    fn from(copy: TrainedCopy) -> Self {
        Self::Copy(copy)
    }
}

impl From<TrainedRows> for Change {
    fn from(rows: TrainedRows) -> Self {
        Self::Rows(rows)
    }
}

/// The same for whatever the change is.
macro_rules! each {
    ($change:expr, $inner:ident => $result:expr) => {
        match $change {
            Change::Lora($inner) => $result,
            Change::Copy($inner) => $result,
            Change::Rows($inner) => $result,
        }
    };
}

impl Change {
    /// The low-rank change, if it is one.
    pub fn lora(&self) -> Option<&Lora> {
        match self {
            Self::Lora(lora) => Some(lora),
            _ => None,
        }
    }

    /// Whether the two are of one kind: of one parameter an adapter has each kind once at most.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
            && self.is_base() == other.is_base()
    }

    /// Whether it is a frozen base for the adapter's other changes, and nothing that trains.
    pub(crate) fn is_base(&self) -> bool {
        matches!(self, Self::Copy(copy) if copy.is_frozen())
    }

    /// Makes it trainable or not.
    pub(crate) fn set_trainable(self, trainable: bool) -> Self {
        match self {
            Self::Lora(lora) => lora.set_trainable(trainable).into(),
            Self::Copy(copy) => {
                let trainable = trainable && !copy.is_frozen();
                copy.set_require_grad(trainable).into()
            }
            Self::Rows(rows) => rows.set_require_grad(trainable).into(),
        }
    }

    /// How many values train while it is in use.
    pub(crate) fn trainable_params(&self) -> usize {
        match self {
            Self::Lora(lora) => lora.trainable_params(),
            base if base.is_base() => 0,
            other => other.num_params(),
        }
    }

    /// Dtype of its values.
    pub(crate) fn dtype(&self) -> DType {
        match self {
            Self::Lora(lora) => lora.a.val().dtype(),
            Self::Copy(copy) => copy.values.val().dtype(),
            Self::Rows(rows) => rows.rows.val().dtype(),
        }
    }

    /// These values as new values of `other`'s parameters, where they have its shapes.
    pub(crate) fn with_ids_of(self, other: &Self) -> Self {
        match (self, other) {
            (Self::Lora(lora), Self::Lora(other)) => lora.with_ids_of(other).into(),
            (Self::Copy(mut copy), Self::Copy(other)) => {
                super::lora::take_id(&mut copy.values, &other.values);
                copy.into()
            }
            (Self::Rows(mut rows), Self::Rows(other)) => {
                super::lora::take_id(&mut rows.rows, &other.rows);
                rows.into()
            }
            (change, _) => change,
        }
    }
}

/// Transparent: parameter paths are those of the change inside.
impl Module for Change {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        each!(self, inner => inner.visit(visitor));
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        each!(self, inner => inner.map(mapper).into())
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        each!(self, inner => inner.collect_devices(devices))
    }

    fn to_device(self, device: &Device) -> Self {
        each!(self, inner => inner.to_device(device).into())
    }

    fn fork(self, device: &Device) -> Self {
        each!(self, inner => inner.fork(device).into())
    }

    fn valid(&self) -> Self {
        each!(self, inner => inner.valid().into())
    }

    fn train(self) -> Self {
        each!(self, inner => inner.train().into())
    }

    fn materialize(self) -> Self {
        self
    }
}
