//! Clipping by the norm of all gradients together.

use std::collections::HashSet;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{FloatDType, Tensor};

use crate::adapter::cast;
use crate::model::nothing_trains;
use crate::{PeftError, Result};

/// What torch adds to the norm before it divides.
const EPSILON: f64 = 1e-6;

/// Scales all gradients of `module` by `min(1, max_norm / (norm + 10⁻⁶))` and returns `norm`, the 2-norm of all of them seen
/// as one vector, as it was before: what `torch.nn.utils.clip_grad_norm_` does.
///
/// Burn's own `GradientClipping` takes the norm of each parameter by itself, which changes the direction of a step. The
/// norm is computed in f32, whatever the dtypes of the gradients, and read from the device once; a gradient that is scaled is
/// scaled in f32 and rounded once to its dtype. With gradient accumulation, call it on the accumulated gradients.
/// An infinite `max_norm` only measures.
///
/// ```
/// # fn step<M: burn::module::Module>(
/// #     model: burn_peft::model::PeftModel<M>, loss: burn::tensor::Tensor<1>, mut optimizer: burn::optim::ModuleOptimizer,
/// # ) -> burn_peft::Result<burn_peft::model::PeftModel<M>> {
/// use burn::optim::GradientsParams;
/// use burn_peft::optim::clip_grad_norm;
///
/// let mut grads = GradientsParams::from_grads(loss.backward(), &model);
/// let norm = clip_grad_norm(&model, &mut grads, 1.0)?;
/// let model = optimizer.step(1e-4, model, grads);
/// # Ok(model)
/// # }
/// ```
///
/// # Errors
///
/// [`PeftError::Config`] unless `max_norm` is positive, and where there is no gradient because every adapter of the module is frozen
/// or inactive. [`PeftError::NotFinite`] with the parameter's path if a gradient is
/// NaN or infinite, where torch would make all of them NaN; or with all of them, if only their norm is beyond f32.
/// Nothing has changed then, so that a loop may skip the step.
pub fn clip_grad_norm<M: Module>(
    module: &M,
    grads: &mut GradientsParams,
    max_norm: f64,
) -> Result<f32> {
    if max_norm.is_nan() || max_norm <= 0.0 {
        return Err(PeftError::config("max_norm", max_norm, "a positive number"));
    }
    let norm = finite_norm(module, grads)?;
    let factor = max_norm / (f64::from(norm) + EPSILON);
    if factor < 1.0 {
        module.visit(&mut Scale {
            grads,
            seen: HashSet::new(),
            factor,
        });
    }
    Ok(norm)
}

/// The 2-norm of all gradients of `module`; 0 if there are none.
///
/// # Errors
///
/// [`PeftError::NotFinite`] with the path of the first parameter whose gradient is not finite, or with all of them if only their
/// norm is beyond f32.
pub(super) fn finite_norm<M: Module>(module: &M, grads: &GradientsParams) -> Result<f32> {
    let mut squares = Squares {
        grads,
        seen: HashSet::new(),
        sum: None,
    };
    module.visit(&mut squares);
    let Some(sum) = squares.sum else {
        return nothing_trains(module).map_or(Ok(0.0), Err);
    };
    let norm = sum.sqrt().into_scalar::<f32>();
    if norm.is_finite() {
        return Ok(norm);
    }
    let mut culprit = NotFinite {
        grads,
        path: Vec::new(),
        found: None,
    };
    module.visit(&mut culprit);
    Err(culprit.found.unwrap_or(PeftError::NotFinite {
        tensor: "norm of all gradients".into(),
        index: 0,
        value: norm,
    }))
}

struct Squares<'a> {
    grads: &'a GradientsParams,
    /// A parameter that stands in two places of a module has one gradient.
    seen: HashSet<ParamId>,
    sum: Option<Tensor<1>>,
}

impl ModuleVisitor for Squares<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(grad) = self.grads.get::<D>(param.id) else {
            return;
        };
        if !self.seen.insert(param.id) {
            return;
        }
        let squares = cast(grad, FloatDType::F32).square().sum();
        self.sum = Some(match self.sum.take() {
            None => squares,
            Some(sum) => {
                let squares = squares.to_device(&sum.device());
                sum + squares
            }
        });
    }
}

struct Scale<'a> {
    grads: &'a mut GradientsParams,
    seen: HashSet<ParamId>,
    factor: f64,
}

impl ModuleVisitor for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !self.seen.insert(param.id) {
            return;
        }
        if let Some(grad) = self.grads.remove::<D>(param.id) {
            // In f32, and rounded once: a factor in bf16 would be off by up to 1/512, for all values alike.
            let dtype = grad.dtype().into();
            let scaled = cast(grad, FloatDType::F32).mul_scalar(self.factor);
            self.grads.register(param.id, cast(scaled, dtype));
        }
    }
}

/// The first gradient that is not finite.
struct NotFinite<'a> {
    grads: &'a GradientsParams,
    path: Vec<String>,
    found: Option<PeftError>,
}

impl ModuleVisitor for NotFinite<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.found.is_some() {
            return;
        }
        let Some(grad) = self.grads.get::<D>(param.id) else {
            return;
        };
        let data = grad.into_data();
        let mut values = data.iter::<f32>().enumerate();
        if let Some((index, value)) = values.find(|(_, value)| !value.is_finite()) {
            self.found = Some(PeftError::NotFinite {
                tensor: format!("gradient of {}", self.path.join(".")),
                index,
                value,
            });
        }
    }
}
