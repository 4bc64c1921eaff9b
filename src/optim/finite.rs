//! Losses and gradients that are not finite, found at the step that made them.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use super::clip;
use crate::{PeftError, Result};

/// Reads the loss of a step from its device and returns it, or an error that names the step if it is NaN or infinite.
///
/// `step` is the caller's own number, which the error repeats. The loss of several values is their sum.
///
/// # Errors
///
/// [`PeftError::Diverged`]; [`PeftError::DeviceRead`] when the device fails.
pub fn check_loss(loss: &Tensor<1>, step: u64) -> Result<f32> {
    let values = loss.clone().try_into_vec_as::<f32>();
    let values = values.map_err(|error| PeftError::DeviceRead {
        tensor: "loss".into(),
        reason: error.to_string(),
    })?;
    let loss: f32 = values.iter().sum();
    match loss.is_finite() {
        true => Ok(loss),
        false => Err(PeftError::Diverged {
            step,
            what: "the loss".into(),
            value: loss,
        }),
    }
}

/// Returns the 2-norm of all gradients of `module`, seen as one vector, or an error that names the step and the parameter if a
/// gradient holds a NaN or an infinity.
///
/// Nothing is scaled. A loop that clips calls [`clip_grad_norm`](super::clip_grad_norm) instead, which makes the same check, and adds
/// the step to its error by [`PeftError::at_step`].
///
/// # Errors
///
/// [`PeftError::Diverged`].
pub fn check_gradients<M: Module>(module: &M, grads: &GradientsParams, step: u64) -> Result<f32> {
    clip::finite_norm(module, grads).map_err(|error| error.at_step(step))
}

#[cfg(test)]
mod tests {
    use burn::module::Param;
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;

    use super::*;

    fn linear() -> Linear {
        LinearConfig::new(2, 2).init(&Device::default())
    }

    fn gradients(linear: &Linear, values: [f32; 4]) -> GradientsParams {
        let mut grads = GradientsParams::new();
        let values = Tensor::<1>::from_data(values, &Device::default());
        grads.register::<2>(linear.weight.id, values.reshape([2, 2]));
        grads
    }

    #[test]
    fn a_loss_that_is_not_finite_names_its_step() {
        let device = Device::default();
        let loss = |value: f32| Tensor::<1>::from_data([value], &device);
        assert_eq!(check_loss(&loss(1.5), 7).unwrap(), 1.5);
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = check_loss(&loss(value), 7).unwrap_err();
            let PeftError::Diverged {
                step: 7,
                value: found,
                ..
            } = error
            else {
                panic!("{error}");
            };
            assert_eq!(found.to_bits(), value.to_bits());
        }
    }

    #[test]
    fn a_gradient_that_is_not_finite_names_its_parameter_and_the_step() {
        let linear = linear();
        let norm = check_gradients(&linear, &gradients(&linear, [3.0, 0.0, 4.0, 0.0]), 3).unwrap();
        assert_eq!(norm, 5.0);
        for value in [f32::NAN, f32::INFINITY] {
            let grads = gradients(&linear, [0.0, value, 1.0, 0.0]);
            let error = check_gradients(&linear, &grads, 3).unwrap_err();
            let PeftError::Diverged { step: 3, what, .. } = &error else {
                panic!("{error}");
            };
            assert_eq!(what, "the gradient of `weight` at flat index 1");
        }
    }

    #[test]
    fn a_norm_beyond_f32_is_an_error_too() {
        let linear = linear();
        let grads = gradients(&linear, [1e30, 0.0, 0.0, 0.0]);
        let error = check_gradients(&linear, &grads, 3).unwrap_err();
        assert!(
            error.to_string().contains("norm of all gradients"),
            "{error}"
        );
    }

    #[test]
    fn without_gradients_the_norm_is_zero() {
        let linear = linear();
        assert_eq!(
            check_gradients(&linear, &GradientsParams::new(), 1).unwrap(),
            0.0
        );
        let other = Param::from_tensor(Tensor::<1>::zeros([2], &Device::default()));
        let mut grads = GradientsParams::new();
        grads.register::<1>(other.id, Tensor::full([2], f32::NAN, &Device::default()));
        assert_eq!(check_gradients(&linear, &grads, 1).unwrap(), 0.0);
    }
}
