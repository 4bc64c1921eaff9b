//! A whole parameter of which an adapter has its own values: `P' = V`.
//!
//! The values train for PEFT's `modules_to_save` and `bias`. They are frozen for the base values that PEFT stores beside an adapter,
//! for instance a resized embedding. The base keeps its own values, so that other adapters, and none, can share it.

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Tensor};

use crate::{PeftError, Result};

/// An adapter's own values of a whole parameter, trained or [frozen](Self::into_frozen).
///
/// # Memory
///
/// As many values as the parameter has. Values that train have gradients and optimiser states too.
#[derive(Module, Debug)]
pub struct TrainedCopy {
    /// The values, row-major: one axis, whatever the parameter's rank is, so that one type serves all of them.
    pub values: Param<Tensor<1>>,
    #[module(skip)]
    shape: Vec<usize>,
    frozen: bool,
}

impl TrainedCopy {
    /// A copy that begins with `value`, of the same shape, in its dtype.
    pub fn new<const D: usize>(value: Tensor<D>) -> Self {
        let shape = value.dims().to_vec();
        let count = shape.iter().product::<usize>();
        Self {
            values: Param::from_tensor(value.detach().reshape([count])),
            shape,
            frozen: false,
        }
    }

    /// Given values `[n]`, row-major, of a parameter of `shape`.
    ///
    /// # Errors
    ///
    /// [`PeftError::Shape`] unless the shape has `n` values.
    pub fn of_values(values: Tensor<1>, shape: Vec<usize>) -> Result<Self> {
        let count = shape.iter().product::<usize>();
        match values.dims() == [count] {
            true => Ok(Self {
                values: Param::from_tensor(values.detach()),
                shape,
                frozen: false,
            }),
            false => Err(PeftError::Shape {
                tensor: "trained copy".into(),
                expected: shape,
                found: values.dims().into(),
            }),
        }
    }

    /// The same values as a frozen base: the adapter's other changes of the parameter start from them, and they never train. Without
    /// them, the adapter would start from the model's own base.
    pub fn into_frozen(self) -> Self {
        Self {
            values: self.values.set_require_grad(false),
            frozen: true,
            ..self
        }
    }

    /// Frozen as `other` is.
    pub(crate) fn with_frozen_of(self, other: &Self) -> Self {
        Self {
            frozen: other.frozen,
            ..self
        }
    }

    /// Whether the values are a base that never trains.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// The parameter's shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The values in the parameter's shape.
    ///
    /// # Panics
    ///
    /// Panics if the parameter has another number of axes.
    pub fn value<const D: usize>(&self) -> Tensor<D> {
        let dims: [usize; D] = self.shape[..]
            .try_into()
            .expect("the parameter's number of axes");
        self.values.val().reshape(dims)
    }

    /// Dtype of the values.
    pub fn dtype(&self) -> FloatDType {
        self.values.val().dtype().into()
    }
}
