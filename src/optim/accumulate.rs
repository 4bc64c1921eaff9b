//! Gradients in f32, to be accumulated.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{FloatDType, Tensor};

use crate::adapter::cast;

/// Casts all gradients of `module` to f32, exactly, for Burn's accumulator.
///
/// [`GradientsAccumulator`](burn::optim::GradientsAccumulator) adds in the dtype of the gradients. In bf16 each addition rounds to
/// eight bits, and a micro-batch whose gradient is below 1/512 of the sum so far is lost. In f32 the sum of `k` is within
/// `k·2⁻²⁴` of exact, relative to the sum of magnitudes; what the backward pass rounded stays rounded.
///
/// The optimiser must take gradients in f32 of parameters in bf16: [`F32State`](super::F32State) and
/// [`AdamW8bit`](super::AdamW8bit) do, Burn's own do not. Gradients in f32 are left as they are.
///
/// ```
/// # fn step<M: burn::module::Module>(
/// #     model: burn_peft::model::PeftModel<M>, losses: Vec<burn::tensor::Tensor<1>>, mut optimizer: burn::optim::ModuleOptimizer,
/// # ) -> burn_peft::Result<burn_peft::model::PeftModel<M>> {
/// use burn::optim::{GradientsAccumulator, GradientsParams};
/// use burn_peft::optim::{clip_grad_norm, grads_to_f32};
///
/// let mut accumulator = GradientsAccumulator::new();
/// for loss in losses {
///     let mut grads = GradientsParams::from_grads(loss.backward(), &model);
///     grads_to_f32(&model, &mut grads);
///     accumulator.accumulate(&model, grads);
/// }
/// let mut grads = accumulator.grads();
/// clip_grad_norm(&model, &mut grads, 1.0)?;
/// let model = optimizer.step(1e-4, model, grads);
/// # Ok(model)
/// # }
/// ```
pub fn grads_to_f32<M: Module>(module: &M, grads: &mut GradientsParams) {
    module.visit(&mut Widen { grads });
}

struct Widen<'a> {
    grads: &'a mut GradientsParams,
}

impl ModuleVisitor for Widen<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.remove::<D>(param.id) {
            self.grads.register(param.id, cast(grad, FloatDType::F32));
        }
    }
}
