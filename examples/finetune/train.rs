//! The training loop: AdamW on whatever of the model requires a gradient.

use std::error::Error;
use std::time::{Duration, Instant};

use burn::grad_clipping::GradientClippingConfig;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::Device;
use burn_peft::PeftError;
use burn_peft::dataset::Example;
use burn_peft::format::WriteOptions;
use burn_peft::model::PeftModel;
use burn_peft::optim::{check_gradients, check_loss};
use burn_peft::resume::{Checkpoint, Seed};
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::args::Args;
use crate::loss;
use crate::schedule::learning_rate;
use llama::model::LlamaForCausalLm;

/// How often the held-out loss is looked at, and on how many triples at most.
const LOOKS: usize = 10;
const LOOK_AT: usize = 64;

/// Batches whose triples are sorted by length among themselves.
const POOL: usize = 8;

/// What is one run's own, beside the command line.
pub struct Run<'a> {
    /// What is trained on.
    pub train: &'a [Example],
    /// What is looked at in between.
    pub heldout: &'a [Example],
    /// Highest learning rate.
    pub lr: f64,
    /// Seed of the order of the triples.
    pub seed: u64,
}

/// The losses by step, and how long it took.
#[derive(Default)]
pub struct Curve {
    /// Of each step's batch.
    pub train: Vec<(usize, f64)>,
    /// Of held-out triples, every so often.
    pub heldout: Vec<(usize, f64)>,
    /// Time spent on training steps.
    pub time: Duration,
    /// Tokens trained on, prompts included and padding not.
    pub tokens: usize,
}

/// Trains `model` on `device` for `args.steps` steps, less those that are done by `args.checkpoint`.
pub fn train(
    mut model: PeftModel<LlamaForCausalLm>,
    device: &Device,
    run: &Run,
    args: &Args,
) -> Result<(PeftModel<LlamaForCausalLm>, Curve), Box<dyn Error>> {
    let mut optimizer = AdamWConfig::new()
        .with_weight_decay(0.0)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(1.0)))
        .init();
    let mut batches = Batches::new(run.train, args.batch, run.seed);
    let mut place = Checkpoint {
        seed: Seed(run.seed),
        step: 0,
    };
    if let Some(path) = args.checkpoint.as_ref().filter(|path| path.exists()) {
        place = Checkpoint::load(path, &mut model, &mut optimizer)?;
        let done = place.step as usize;
        if place.seed != Seed(run.seed) || done >= args.steps {
            let path = path.display();
            return Err(format!("{path}: {done} steps of a run with {:?}", place.seed).into());
        }
        // The order of the triples is that of a generator, which is wound on.
        (0..done).for_each(|_| drop(batches.next_batch()));
        println!("goes on after step {done}");
    }
    let mut curve = Curve::default();
    let look = &run.heldout[..run.heldout.len().min(LOOK_AT)];
    let every = (args.steps / LOOKS).max(1);
    let bar = ProgressBar::new(args.steps as u64).with_style(ProgressStyle::with_template(
        "{bar:30} step {pos}/{len}  {msg}  {eta} left",
    )?);

    bar.set_position(place.step);
    for step in place.step as usize + 1..=args.steps {
        let started = Instant::now();
        let batch = batches.next_batch();
        place.seed.seed_device(device, place.step, 0);
        let loss = loss::loss(&model, &batch, device)?.mean();
        let lr = learning_rate(run.lr, step, args.steps, args.steps / 20);
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        let loss = check_loss(&loss, step as u64).map_err(|error| advice(error, run.lr))?;
        check_gradients(&*model, &gradients, step as u64).map_err(|error| advice(error, run.lr))?;
        model = optimizer.step(lr, model, gradients);
        place.step += 1;
        let loss = f64::from(loss);
        curve.time += started.elapsed();
        curve.tokens += batch
            .iter()
            .map(|example| example.tokens().len())
            .sum::<usize>();
        curve.train.push((step, loss));
        if !look.is_empty() && (step == 1 || step % every == 0 || step == args.steps) {
            curve
                .heldout
                .push((step, loss::mean_loss(&model, look, 2 * args.batch)?));
        }
        if let Some(path) = args.checkpoint.as_ref().filter(|_| step % every == 0) {
            place.save(
                path,
                &model,
                &optimizer,
                &WriteOptions {
                    overwrite: true,
                    ..Default::default()
                },
            )?;
        }
        let heldout = curve
            .heldout
            .last()
            .map(|(_, loss)| format!(", held out {loss:.3}"))
            .unwrap_or_default();
        let speed = curve.tokens as f64 / curve.time.as_secs_f64();
        let message = format!("loss {loss:.3}{heldout}, {speed:.0} tokens/s");
        if bar.is_hidden() && step % every == 0 {
            // No terminal, no bar.
            println!("step {step}/{}: {message}", args.steps);
        }
        bar.set_message(message);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok((model, curve))
}

/// The error with the argument that sets the learning rate.
fn advice(error: PeftError, lr: f64) -> String {
    format!("{error}. The highest learning rate of this run is {lr:e}: see `--lr`")
}

/// Endless passes over the examples, each in a new order.
struct Batches<'a> {
    examples: &'a [Example],
    size: usize,
    rng: StdRng,
    waiting: Vec<Vec<Example>>,
}

impl<'a> Batches<'a> {
    fn new(examples: &'a [Example], size: usize, seed: u64) -> Self {
        Self {
            examples,
            size,
            rng: StdRng::seed_from_u64(seed),
            waiting: Vec::new(),
        }
    }

    /// The next examples, of like length: among a few batches' worth they are sorted, so that there is little padding.
    fn next_batch(&mut self) -> Vec<Example> {
        if self.waiting.is_empty() {
            let mut order: Vec<&Example> = self.examples.iter().collect();
            order.shuffle(&mut self.rng);
            for pool in order.chunks_mut(POOL * self.size) {
                pool.sort_by_key(|example| example.tokens().len());
                self.waiting.extend(
                    pool.chunks(self.size)
                        .map(|batch| batch.iter().copied().cloned().collect()),
                );
            }
            self.waiting.shuffle(&mut self.rng);
        }
        self.waiting.pop().expect("there is an example")
    }
}
