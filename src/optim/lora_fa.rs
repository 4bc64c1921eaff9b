//! LoRA-FA: `A` stays as it is drawn, and the gradient of `B` is that of the weight, projected on what `A` spans.
//!
//! With `g [r, d_out]` the gradient of `B`, `s` the scale and `A [d_in, r]`,
//!
//! ```text
//! ĝ = s⁻²·(Aᵀ·A + δ·I)⁺·g,   δ = 10⁻⁸
//! ```
//!
//! is what makes `s·A·ĝ` the nearest to the gradient of the weight, `G [d_in, d_out]`, of which the step of LoRA sees
//! `g = s·Aᵀ·G` only. `⁺` is the pseudo-inverse: singular values below `r·ε` of the largest, `ε` that of f32, count as zero.
//!
//! Sources: LoRA-FA, arXiv:2308.03303; the formula is that of `create_lorafa_optimizer` in Hugging Face PEFT 0.21.

use burn::module::{Module, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{FloatDType, Tensor};

use crate::adapter::{Lora, cast, gram_inverse};
use crate::model::PeftModel;
use crate::{PeftError, Result};

/// What is added to `Aᵀ·A`, as in PEFT.
const DELTA: f64 = 1e-8;

/// The projections of the gradients of a model's factors `B`, for adapters that keep their `A`
/// ([`LoraConfig::freeze_a`](crate::adapter::LoraConfig::freeze_a)).
///
/// They depend on `A` and the scale alone, so they are computed once, `[r, r]` for each `B`; a step costs one small product
/// for each. Make them anew after other factors were loaded into the model.
///
/// ```
/// # fn train<M: burn::module::Module>(
/// #     mut model: burn_peft::model::PeftModel<M>, batches: Vec<i32>,
/// #     loss: impl Fn(&burn_peft::model::PeftModel<M>, i32) -> burn::tensor::Tensor<1>,
/// # ) -> burn_peft::Result<burn_peft::model::PeftModel<M>> {
/// use burn::optim::{AdamWConfig, GradientsParams};
/// use burn_peft::optim::LoraFa;
///
/// let mut optimizer = AdamWConfig::new().init();
/// let projections = LoraFa::of(&model)?;
/// for batch in batches {
///     let mut grads = GradientsParams::from_grads(loss(&model, batch).backward(), &model);
///     projections.project(&mut grads);
///     model = optimizer.step(1e-4, model, grads);
/// }
/// # Ok(model)
/// # }
/// ```
///
/// # Compared to PEFT
///
/// The projection is PEFT's; the step is that of Burn's optimiser. `AdamW` differs from what PEFT wrote for this (that of
/// transformers) in two places: PEFT's `ε` is not corrected for the bias, so it stands for `ε/√(1 - β₂ᵗ)` here, and it decays the
/// weight after the step in place of before, by which a step is smaller by the factor `1 - lr·decay`. Where bf16 is
/// available PEFT computes the projection in bf16; here it is f32.
#[derive(Clone, Debug)]
pub struct LoraFa {
    projections: Vec<(ParamId, Vec<Projection>)>,
}

/// Of one slice of the outputs; a plain LoRA has one.
#[derive(Clone, Debug)]
struct Projection {
    /// `s⁻²·(Aᵀ·A + δ·I)⁺ [r, r]`, without autodiff.
    matrix: Tensor<2>,
    /// How many columns of `B` it is for.
    width: usize,
}

impl LoraFa {
    /// The projections of all adapters of `model` that keep their `A`, active or not. Reads these `A` from the device.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] if there is no such adapter, or one of scale 0; [`PeftError::NotFinite`],
    /// [`PeftError::DeviceRead`] and [`PeftError::Decomposition`], in [`PeftError::InModule`].
    pub fn of<M: Module>(model: &PeftModel<M>) -> Result<Self> {
        let mut projections = Vec::new();
        for name in model.adapters() {
            let factors = model.factors(name).expect("an adapter of the model");
            for (path, lora) in factors {
                if lora.config().freeze_a {
                    let own = of_lora(&lora).map_err(|source| PeftError::InModule {
                        path,
                        source: Box::new(source),
                    })?;
                    projections.push((lora.b.id, own));
                }
            }
        }
        if projections.is_empty() {
            return Err(PeftError::config(
                "freeze_a",
                "false",
                "an adapter that keeps its `A`",
            ));
        }
        Ok(Self { projections })
    }

    /// Projects the gradients of the factors `B`, in their dtype; all others, and factors without a gradient, are left alone.
    ///
    /// Once a step: after gradients were accumulated, and before they are clipped.
    pub fn project(&self, grads: &mut GradientsParams) {
        for (id, projections) in &self.projections {
            let Some(grad) = grads.remove::<2>(*id) else {
                continue;
            };
            let mut column = 0;
            let parts = projections.iter().map(|Projection { matrix, width }| {
                let part = grad.clone().narrow(1, column, *width);
                column += width;
                let part = matrix.clone().matmul(cast(part, FloatDType::F32));
                cast(part, grad.dtype().into())
            });
            let projected = Tensor::cat(parts.collect(), 1);
            grads.register(*id, projected);
        }
    }
}

fn of_lora(lora: &Lora) -> Result<Vec<Projection>> {
    let (scale, rank) = (lora.scale(), lora.rank());
    if scale == 0.0 {
        return Err(PeftError::config(
            "alpha",
            "0",
            "another number than 0: nothing learns",
        ));
    }
    let a = lora.a.val().without_autodiff();
    let widths = lora.slice_widths().into_iter().enumerate();
    let projections = widths.map(|(slice, width)| {
        let own = a.clone().narrow(1, slice * rank, rank);
        let matrix = gram_inverse("A", &own, DELTA, 1.0 / (scale * scale))?;
        Ok(Projection { matrix, width })
    });
    projections.collect()
}
