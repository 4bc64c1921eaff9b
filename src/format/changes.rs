//! Tensors of a file as changes of the parameters that they fit.

use std::borrow::Cow;

use burn::tensor::{FloatDType, Tensor, TensorData};

use super::adapter::LoraTensors;
use super::elements;
use super::fit::{Fit, Values};
use super::keys::{Factor, parameter_key, rows_key, tensor_key};
use crate::adapter::{Change, LoraConfig, Slices, TrainedCopy, TrainedRows, ungrown_alpha};
use crate::{PeftError, Result};

impl Fit<'_> {
    /// The values on the parameter's device, in Burn's layout, as an adapter has them.
    ///
    /// # Errors
    ///
    /// [`PeftError::DType`] for a type that the device does not have; [`PeftError::Overflow`] for a finite value that is infinite in the
    /// type that it is to get; those of [`LoraConfig::with_factors`].
    pub(super) fn change(&self, config: &LoraConfig, dtype: Option<FloatDType>) -> Result<Change> {
        match &self.values {
            Values::Lora { tensors, .. } => self.lora(tensors, config, dtype),
            Values::Copy { frozen, .. } => {
                // A base is in the type of the parameter that it stands for.
                let dtype = match frozen {
                    true => self.parameter.dtype,
                    false => dtype,
                };
                let values = self.flat(dtype)?;
                let copy = TrainedCopy::of_values(values, self.parameter.shape.clone())?;
                Ok(match frozen {
                    true => copy.into_frozen().into(),
                    false => copy.into(),
                })
            }
            Values::Rows { tensor, indices } => {
                let key = rows_key(&tensor.path);
                let dtype = self.check_dtype(&key, &tensor.data, dtype)?;
                let rows: Tensor<2> = self.tensor(&key, tensor.data.clone(), dtype)?;
                let transposed = self.parameter.is_transposed();
                let count = self.parameter.shape[usize::from(transposed)];
                let rows = TrainedRows::with_rows(rows, indices, count)?;
                Ok(match transposed {
                    true => rows.of_head().into(),
                    false => rows.into(),
                })
            }
        }
    }

    /// Whether the values for the whole parameter are these.
    pub(super) fn is_equal(&self, own: &Tensor<1>) -> bool {
        let Ok(values) = self.flat(Some(own.dtype().into())) else {
            return false;
        };
        let equal = values.equal(own.clone()).all().into_data();
        equal.iter::<bool>().all(|equal| equal)
    }

    /// The values for the whole parameter, row-major in Burn's layout.
    fn flat(&self, dtype: Option<FloatDType>) -> Result<Tensor<1>> {
        let Values::Copy { tensor, as_is, .. } = &self.values else {
            unreachable!("asked of values for a whole parameter");
        };
        let key = parameter_key(&tensor.path, false);
        let dtype = self.check_dtype(&key, &tensor.data, dtype)?;
        // Before it is turned, so that an error has the place in the file.
        let data = in_dtype(&key, &tensor.data, dtype)?;
        let data = match self.parameter.is_transposed() && !as_is {
            true => elements::transposed(&data),
            false => data.into_owned(),
        };
        let count = data.num_elements();
        self.tensor(&key, elements::reshaped(data, &[count]), dtype)
    }

    fn lora(
        &self,
        tensors: &LoraTensors,
        config: &LoraConfig,
        dtype: Option<FloatDType>,
    ) -> Result<Change> {
        let Values::Lora {
            rank,
            alpha,
            turned,
            ..
        } = self.values
        else {
            unreachable!("asked of factors");
        };
        let key = |factor| tensor_key(&tensors.path, factor);
        let dtype = self.check_dtype(&key(Factor::A), &tensors.a, dtype)?;
        // Of a convolution, `[r, channels_in, k_1, …]` is `[r, d_in]`.
        let matrix = |factor, data: &TensorData| {
            let key = key(factor);
            let data = in_dtype(&key, data, dtype)?;
            if data.rank() == 2 {
                return self.tensor::<2>(&key, elements::transposed(&data), dtype);
            }
            let rows = data.shape()[0];
            let columns = data.num_elements() / rows.max(1);
            let data = elements::reshaped(data.into_owned(), &[rows, columns]);
            self.tensor::<2>(&key, elements::transposed(&data), dtype)
        };
        let vector = |factor, data: &TensorData| {
            let count = data.num_elements();
            self.tensor::<1>(
                &key(factor),
                elements::reshaped(data.clone(), &[count]),
                dtype,
            )
        };
        let mut config = config.clone().with_alpha(alpha);
        config.rank = rank;
        let mut a = matrix(Factor::A, &tensors.a)?;
        let mut b = matrix(Factor::B, &tensors.b)?;
        let shape = self.parameter.module_shape(&tensors.module_shape());
        if self.parameter.is_experts() {
            let experts = shape.experts;
            config.slices = Slices::equal(vec![true; experts]);
            // Expert by expert here. In the file `A` is so and `B` is rank by rank, and if turned each stands for the other.
            let by_expert = |factor: Tensor<2>| -> Tensor<3> {
                let [_, width] = factor.dims();
                factor.reshape([rank, experts, width])
            };
            (a, b) = match turned {
                false => (a, by_expert(b).reshape([rank, experts * shape.d_out])),
                true => {
                    // `[r·E, d_in]` rank by rank, and `[d_out, E·r]` expert by expert.
                    let of_inputs = by_expert(b).permute([2, 1, 0]);
                    let of_outputs: Tensor<3> = a.reshape([shape.d_out, experts, rank]);
                    (
                        of_inputs.reshape([shape.d_in, experts * rank]),
                        of_outputs
                            .permute([2, 1, 0])
                            .reshape([rank, experts * shape.d_out]),
                    )
                }
            };
        } else if let Some((groups @ 2.., _)) = shape.kernel {
            // Each group has its share of the features to itself, at the same scale.
            config.slices = Slices::equal(vec![true; groups]);
            config.rank = rank / groups;
            config.alpha = ungrown_alpha(alpha, config.rslora, groups);
        }
        let mut lora = config.with_factors(a, b)?;
        if let Some(bias) = &tensors.bias {
            lora = lora.with_bias(vector(Factor::Bias, bias)?)?;
        }
        if let Some(magnitude) = &tensors.magnitude {
            lora = lora.with_magnitude(vector(Factor::Magnitude, magnitude)?)?;
        }
        Ok(lora.into())
    }

    /// The dtype that the values get, if the device has it.
    fn check_dtype(
        &self,
        key: &str,
        data: &TensorData,
        dtype: Option<FloatDType>,
    ) -> Result<FloatDType> {
        let dtype = dtype.unwrap_or_else(|| data.dtype().into());
        match self.parameter.device.supports_dtype(dtype) {
            true => Ok(dtype),
            false => Err(PeftError::DType {
                tensor: key.to_owned(),
                expected: "a type the device has".into(),
                found: format!("{dtype:?}"),
            }),
        }
    }

    fn tensor<const D: usize>(
        &self,
        key: &str,
        data: TensorData,
        dtype: FloatDType,
    ) -> Result<Tensor<D>> {
        let device = &self.parameter.device;
        let data = elements::converted(key, data, dtype.into())?;
        // They live as long as the model: keep them out of the pools of transient tensors.
        Ok(device.memory_persistent_allocations(data, |data| {
            Tensor::from_data(data, (device, dtype.into()))
        }))
    }
}

/// The values in another element type.
///
/// # Errors
///
/// Those of [`elements::converted`].
fn in_dtype<'a>(key: &str, data: &'a TensorData, dtype: FloatDType) -> Result<Cow<'a, TensorData>> {
    match data.dtype() == dtype.into() {
        true => Ok(Cow::Borrowed(data)),
        false => elements::converted(key, data.clone(), dtype.into()).map(Cow::Owned),
    }
}
