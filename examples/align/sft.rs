//! Supervised fine-tuning, which makes the policy that all runs start from.

use std::error::Error;

use burn::grad_clipping::GradientClippingConfig;
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn_peft::objective::{LogProbsConfig, SupervisedKind, supervised_loss};
use burn_peft::optim::{check_gradients, check_loss};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::answers::{Data, Form};
use crate::args::Args;
use crate::policy::{self, Policy};

/// Learning rate of supervised fine-tuning.
const LR: f64 = 3e-3;
/// Examples in a step.
const BATCH: usize = 16;

/// A policy that answers in both forms as often, or in words alone.
pub fn train(args: &Args, data: &Data, both: bool, seed: u64) -> Result<Policy, Box<dyn Error>> {
    let device = burn::tensor::Device::default().autodiff();
    let mut model = policy::fresh(args, &device, seed)?;
    let mut optimizer = optimizer();
    let mut rng = StdRng::seed_from_u64(seed);
    for step in 0..args.sft_steps {
        let mut examples = Vec::with_capacity(BATCH);
        for _ in 0..BATCH {
            let question = &data.train[rng.random_range(0..data.train.len())];
            let form = match both && rng.random() {
                true => Form::Sentence,
                false => Form::Word,
            };
            let completion = data.completion(&form.of(&question.answer))?;
            examples.push(policy::example(&question.prompt, &completion)?);
        }
        let log_probs = policy::log_probs(&model, &examples, &LogProbsConfig::new())?;
        let loss = supervised_loss(&log_probs, SupervisedKind::Nll)?.mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        check_loss(&loss, step as u64)?;
        check_gradients(&*model, &gradients, step as u64)?;
        // Down to a tenth.
        let lr = LR * (1.0 - 0.9 * step as f64 / args.sft_steps as f64);
        model = optimizer.step(lr, model, gradients);
    }
    Ok(model)
}

/// AdamW as every run here has it.
pub fn optimizer() -> ModuleOptimizer {
    AdamWConfig::new()
        .with_weight_decay(0.0)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(1.0)))
        .init()
}
