//! Training steps, each phase measured.

use std::error::Error;

use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use burn_peft::checkpointing::Checkpointing;
use burn_peft::model::PeftModel;
use burn_peft::objective::HeadChunks;
use burn_peft::optim::{AdamW8bitConfig, F32State, check_loss, clip_grad_norm};
use burn_peft::resume::Seed;

use crate::args::{Args, Optim};
use crate::meter::Meter;
use crate::synthetic::mix;
use llama::attention::Layout;
use llama::config::LlamaConfig;
use llama::model::LlamaForCausalLm;

const LEARNING_RATE: f64 = 1e-4;

/// What a step took, in bytes by part.
#[derive(Clone, Debug)]
pub struct Step {
    /// Its loss.
    pub loss: f32,
    /// Live before it.
    pub before: usize,
    /// What forward left for backward, the loss's included.
    pub kept: usize,
    /// The gradients of adapters.
    pub gradients: usize,
    /// The most at once, of all that is live.
    pub peak: usize,
    /// The phase with the peak.
    pub peak_phase: &'static str,
    /// Seconds, in all.
    pub seconds: f64,
}

/// Trains on random tokens, all supervised.
pub fn train(
    args: &Args,
    config: &LlamaConfig,
    mut model: PeftModel<LlamaForCausalLm>,
    device: &Device,
    meter: &mut Meter,
) -> Result<(PeftModel<LlamaForCausalLm>, Vec<Step>), Box<dyn Error>> {
    let mut optimizer: ModuleOptimizer = match args.optimizer {
        // Around f32 factors it changes nothing.
        Optim::Adamw => F32State::new(AdamWConfig::new().build()).init(),
        Optim::Adamw8bit => AdamW8bitConfig::new().init(),
    };
    let seed = Seed(args.seed);
    let layout = Layout::causal(args.seq as usize, 0, device);
    let mut steps = Vec::new();
    for number in 0..args.steps {
        let (tokens, targets, mask) = batch(args, config, seed.at(number, 1), device);
        let before = meter.live();
        let first = meter.phases.len();
        let named = |phase: &str| format!("step {}, {phase}", number + 1);
        let checkpointing = Checkpointing::by_block(seed.at(number, 0));
        let (hidden, tape) = meter.phase(named("forward of the blocks"), || {
            let base = &model.model;
            base.forward_checkpointed(tokens, &layout, checkpointing)
        })?;
        let loss = meter.phase(named("head and loss"), || {
            let chunks = HeadChunks::default();
            model
                .head_loss(hidden, targets, mask, &chunks)
                .map(|loss| loss.mean())
        })?;
        let kept = meter.live() - before;
        let mut gradients = meter.phase(named("backward"), || tape.backward(&loss, &*model));
        let loss = check_loss(&loss, number + 1)?;
        let held = meter.live() - before;
        let (stepped, norm) = meter.phase(named("clipping and optimiser"), || {
            let norm = clip_grad_norm(&model, &mut gradients, 1.0)
                .map_err(|error| error.at_step(number + 1))?;
            Ok::<_, Box<dyn Error>>((optimizer.step(LEARNING_RATE, model, gradients), norm))
        })?;
        model = stepped;
        let phases = &meter.phases[first..];
        let names = ["forward", "head and loss", "backward", "optimiser"];
        let peaks = phases.iter().map(|phase| phase.peak).zip(names);
        let (peak, peak_phase) = peaks.max().expect("there are phases");
        steps.push(Step {
            loss,

            before,
            kept,
            gradients: held,
            peak,
            peak_phase,
            seconds: phases.iter().map(|phase| phase.time.as_secs_f64()).sum(),
        });
        println!(
            "step {}: loss {loss:.4}, norm of gradients {norm:.4}\n",
            number + 1
        );
    }
    Ok((model, steps))
}

/// Random tokens, those that follow them, and a mask that is true everywhere.
fn batch(
    args: &Args,
    config: &LlamaConfig,
    seed: u64,
    device: &Device,
) -> (Tensor<2, Int>, Tensor<2, Int>, Tensor<2, Bool>) {
    let [batch, seq] = [args.batch as usize, args.seq as usize];
    let token = |row: usize, at: usize| {
        (mix(seed ^ (row * (seq + 1) + at) as u64) % config.vocab_size as u64) as i64
    };
    let from = |first: usize| {
        let rows = (0..batch).flat_map(|row| (first..first + seq).map(move |at| token(row, at)));
        let data = TensorData::new(rows.collect::<Vec<_>>(), [batch, seq]);
        Tensor::<2, Int>::from_data(data, device)
    };
    let mask = Tensor::<2, Bool>::from_data(
        TensorData::new(vec![true; batch * seq], [batch, seq]),
        device,
    );
    (from(0), from(1), mask)
}
