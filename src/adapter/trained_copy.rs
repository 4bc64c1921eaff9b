//! A parameter that an adapter trains whole: `P' = V`, PEFT's `modules_to_save` and `bias`.
//!
//! The base keeps its own values, so that other adapters, and none, can share it: the change is `V - P`.

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Tensor};

use crate::{PeftError, Result};

/// An adapter's own values of a whole parameter.
///
/// # Memory
///
/// As many values as the parameter has, with their gradients and optimiser states.
#[derive(Module, Debug)]
pub struct TrainedCopy {
    /// The values, row-major: one axis, whatever the parameter's rank is, so that one type serves all of them.
    pub values: Param<Tensor<1>>,
    #[module(skip)]
    shape: Vec<usize>,
}

impl TrainedCopy {
    /// A copy that begins with `value`, of the same shape, in its dtype.
    pub fn new<const D: usize>(value: Tensor<D>) -> Self {
        let shape = value.dims().to_vec();
        let count = shape.iter().product::<usize>();
        Self {
            values: Param::from_tensor(value.detach().reshape([count])),
            shape,
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
            }),
            false => Err(PeftError::Shape {
                tensor: "trained copy".into(),
                expected: shape,
                found: values.dims().into(),
            }),
        }
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
