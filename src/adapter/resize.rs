//! Changes of a table of tokens that gains or loses rows: of an embedding `[tokens, features]`, or of a head `[features, tokens]`.
//!
//! A change of new rows is zero: they are what the base has there.

use burn::module::Param;
use burn::tensor::Tensor;

use super::slices::Slices;
use super::{Lora, TrainedCopy, cast};

impl Lora {
    /// Why the table that this changes cannot have another number of rows, if it cannot.
    pub(crate) fn fixed_rows(&self, is_head: bool) -> Option<&'static str> {
        match () {
            () if self.slices != Slices::Whole => Some("LoRA on slices, whose widths are fixed"),
            () if self.magnitude.is_some() && !is_head => {
                Some("DoRA on an embedding, whose magnitudes are norms over all tokens")
            }
            () => None,
        }
    }

    /// The same for `rows` rows of a table; `norms` are those of the new rows of the base, if there are any. Ids stay.
    ///
    /// # Panics
    ///
    /// Panics where [`fixed_rows`](Self::fixed_rows) says that this cannot be.
    pub(crate) fn with_table_rows(
        mut self,
        rows: usize,
        is_head: bool,
        norms: Option<Tensor<1>>,
    ) -> Self {
        assert!(self.fixed_rows(is_head).is_none(), "asked before");
        match is_head {
            false => {
                self.a = changed(self.a, |a| with_length(a, 0, rows));
                if let Some(initial) = &mut self.initial {
                    initial.a = changed(initial.a.clone(), |a| with_length(a, 0, rows));
                }
            }
            true => {
                self.b = changed(self.b, |b| with_length(b, 1, rows));
                if let Some(initial) = &mut self.initial {
                    initial.b = changed(initial.b.clone(), |b| with_length(b, 1, rows));
                }
                self.bias = self
                    .bias
                    .map(|bias| changed(bias, |bias| with_length(bias, 0, rows)));
                self.magnitude = self.magnitude.map(|magnitude| {
                    changed(magnitude, |m| match norms {
                        // The norm of the base's own row, by which it is divided too.
                        Some(norms) => {
                            let norms = cast(norms.to_device(&m.device()), m.dtype().into());
                            Tensor::cat(vec![m, norms], 0)
                        }
                        None => m.narrow(0, 0, rows),
                    })
                });
            }
        }
        self
    }
}

impl TrainedCopy {
    /// The same with the values `value`, of another shape. The id stays.
    pub(crate) fn with_value<const D: usize>(&self, value: Tensor<D>) -> Self {
        let mut copy = Self::new(value);
        let trains = self.values.is_require_grad();
        copy.values =
            Param::initialized(self.values.id, copy.values.val()).set_require_grad(trains);
        copy
    }
}

/// A parameter with another value, its id and whether it trains.
fn changed<const D: usize>(
    param: Param<Tensor<D>>,
    change: impl FnOnce(Tensor<D>) -> Tensor<D>,
) -> Param<Tensor<D>> {
    let trains = param.is_require_grad();
    let value = change(param.val().detach()).detach();
    Param::initialized(param.id, value).set_require_grad(trains)
}

/// The tensor with so many entries along an axis: the first of it, or zeros after it.
fn with_length<const D: usize>(tensor: Tensor<D>, axis: usize, length: usize) -> Tensor<D> {
    let mut dims = tensor.dims();
    if length <= dims[axis] {
        return tensor.narrow(axis, 0, length);
    }
    dims[axis] = length - dims[axis];
    let zeros = Tensor::zeros(dims, (&tensor.device(), tensor.dtype()));
    Tensor::cat(vec![tensor, zeros], axis)
}
