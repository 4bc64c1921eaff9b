//! LoRA+: the factor `B` learns faster than `A`.

use burn::module::{Module, ParamGroup};
use burn::optim::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;

use crate::model::PeftModel;
use crate::{PeftError, Result};

/// The parameters of a model's adapters in the two groups of LoRA+.
///
/// Source: LoRA+, [arXiv:2402.12354](https://arxiv.org/abs/2402.12354); the groups are those of PEFT's
/// `create_loraplus_optimizer`.
#[derive(Clone, Debug)]
pub struct LoraPlusGroups {
    /// The factors `A`, which learn at the base rate.
    pub a: ParamGroup,
    /// The factors `B` with their biases, and DoRA's magnitudes, which learn at the rate times the ratio.
    pub b: ParamGroup,
}

impl LoraPlusGroups {
    /// The groups of all adapters of `model`, active or not.
    pub fn of<M: Module>(model: &PeftModel<M>) -> Self {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for name in model.adapters() {
            let factors = model.factors(name).expect("an adapter of the model");
            for (_, lora) in factors {
                a.push(lora.a.id);
                b.push(lora.b.id);
                b.extend(lora.magnitude.map(|magnitude| magnitude.id));
                b.extend(lora.bias.map(|bias| bias.id));
            }
        }
        Self {
            a: ParamGroup::from_ids(a),
            b: ParamGroup::from_ids(b),
        }
    }
}

/// The learning rates of LoRA+: `lr` for the factors `A` and all that is no factor, `ratio · lr` for `B`, its bias and magnitudes.
///
/// The paper finds a ratio about 16 good, with an `lr` somewhat below LoRA's. For rates that change, give a scheduler for each
/// group of [`LoraPlusGroups`] to Burn's [`ModuleLrScheduler`].
///
/// ```
/// # fn step<M: burn::module::Module>(
/// #     model: burn_peft::model::PeftModel<M>, loss: burn::tensor::Tensor<1>, mut optimizer: burn::optim::ModuleOptimizer,
/// # ) -> burn_peft::Result<burn_peft::model::PeftModel<M>> {
/// use burn::optim::GradientsParams;
/// use burn_peft::optim::lora_plus;
///
/// let mut rates = lora_plus(&model, 1e-4, 16.0)?;
/// let grads = GradientsParams::from_grads(loss.backward(), &model);
/// let model = optimizer.step(rates.step(), model, grads);
/// # Ok(model)
/// # }
/// ```
///
/// # Errors
///
/// [`PeftError::Config`] unless `lr` and `ratio` are positive and finite.
pub fn lora_plus<M: Module>(
    model: &PeftModel<M>,
    lr: f64,
    ratio: f64,
) -> Result<ModuleLrScheduler> {
    for (name, value) in [("lr", lr), ("ratio", ratio)] {
        if !value.is_finite() || value <= 0.0 {
            return Err(PeftError::config(name, value, "a positive number"));
        }
    }
    Ok(ModuleLrScheduler::new(lr).with_group(LoraPlusGroups::of(model).b, ratio * lr))
}
