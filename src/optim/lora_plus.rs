//! LoRA+: the factor `B` learns faster than `A`.

use burn::module::{Module, ParamGroup};
use burn::optim::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;

use crate::adapter::Change;
use crate::layer::LayerKind;
use crate::model::{PeftModel, by_path};
use crate::{PeftError, Result};

/// The learning rate that PEFT gives the factors of embeddings.
pub const EMBEDDING_LR: f64 = 1e-6;

/// The parameters of a model's adapters in the groups of LoRA+.
///
/// Source: LoRA+, [arXiv:2402.12354](https://arxiv.org/abs/2402.12354); the groups are those of PEFT's
/// `create_loraplus_optimizer`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LoraPlusGroups {
    /// The factors `A`, trained rows of embeddings, and copies of parameters of two axes or more. They learn at the base rate.
    pub a: ParamGroup,
    /// The factors `B` with their biases, DoRA's magnitudes, and copies of parameters of one axis (norms, biases). They learn at the
    /// base rate times the ratio.
    pub b: ParamGroup,
    /// Both factors of embeddings, which learn at a small rate of their own.
    pub embedding: ParamGroup,
}

impl LoraPlusGroups {
    /// The groups of all adapters of `model`, active or not.
    pub fn of<M: Module>(model: &PeftModel<M>) -> Self {
        let (mut a, mut b, mut embedding) = (Vec::new(), Vec::new(), Vec::new());
        let parameters = model.parameters();
        let known = by_path(&parameters);
        for name in model.adapters() {
            let changes = model.changes(name).expect("an adapter of the model");
            for (path, change) in changes {
                let layer = known.get(path.as_str()).and_then(|known| known.layer);
                match change {
                    Change::Lora(lora) => {
                        match layer {
                            Some(LayerKind::Embedding) => embedding.extend([lora.a.id, lora.b.id]),
                            _ => {
                                a.push(lora.a.id);
                                b.push(lora.b.id);
                            }
                        }
                        // PEFT tells by the number of axes, and a convolution's magnitude has as many as its weight.
                        let magnitudes = match layer {
                            Some(LayerKind::Conv) => &mut a,
                            _ => &mut b,
                        };
                        magnitudes.extend(lora.magnitude.map(|magnitude| magnitude.id));
                        b.extend(lora.bias.map(|bias| bias.id));
                    }
                    Change::Copy(copy) => match copy.shape().len() {
                        1 => b.push(copy.values.id),
                        _ => a.push(copy.values.id),
                    },
                    Change::Rows(rows) => a.push(rows.rows.id),
                }
            }
        }
        Self {
            a: ParamGroup::from_ids(a),
            b: ParamGroup::from_ids(b),
            embedding: ParamGroup::from_ids(embedding),
        }
    }
}

/// The learning rates of LoRA+: `lr` for the group [`a`](LoraPlusGroups::a), `ratio · lr` for [`b`](LoraPlusGroups::b), and
/// [`EMBEDDING_LR`] for the factors of embeddings.
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
    let groups = LoraPlusGroups::of(model);
    let rates = ModuleLrScheduler::new(lr).with_group(groups.b, ratio * lr);
    Ok(rates.with_group(groups.embedding, EMBEDDING_LR))
}
