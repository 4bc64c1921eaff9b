//! Resuming a training run where it stopped, to the last bit.
//!
//! A step of training is a function of the factors, the optimiser's state, and what is random: dropout and the order of
//! the data. A [`Checkpoint`] holds the first two with the seed and the number of steps done, in one file that is there
//! whole or not at all; a [`Seed`] makes everything random a function of `(seed, step, micro-step)`. So the steps after
//! the checkpoint are the same ones whether or not the process is.
//!
//! ```no_run
//! # use burn::module::Module;
//! # use burn::optim::{AdamWConfig, GradientsAccumulator, GradientsParams};
//! # use burn::tensor::{Device, Tensor};
//! # use burn_peft::model::PeftModel;
//! # fn run<M: Module>(
//! #     mut model: PeftModel<M>, device: Device, loss: impl Fn(&PeftModel<M>, &[usize]) -> Tensor<1>,
//! # ) -> burn_peft::Result<()> {
//! use std::path::Path;
//! use burn_peft::format::WriteOptions;
//! use burn_peft::resume::{Checkpoint, Seed};
//!
//! // `model` is built as it was for the first run: same base, same adapters. Parameter ids may be others.
//! let path = Path::new("run/checkpoint.safetensors");
//! let mut optimizer = AdamWConfig::new().init();
//! let mut run = match path.exists() {
//!     true => Checkpoint::load(path, &mut model, &mut optimizer)?,
//!     false => Checkpoint { seed: Seed(42), step: 0 },
//! };
//! let (steps, micro_steps, size, examples) = (1000, 4, 8, 5000);
//! while run.step < steps {
//!     let mut gradients = GradientsAccumulator::new();
//!     for micro_step in 0..micro_steps {
//!         let batch = run.seed.batch(run.step * micro_steps + micro_step, size, examples);
//!         run.seed.seed_device(&device, run.step, micro_step);
//!         let loss = loss(&model, &batch);
//!         gradients.accumulate(&model, GradientsParams::from_grads(loss.backward(), &model));
//!     }
//!     // A learning rate that changes is a function of `run.step` too.
//!     model = optimizer.step(1e-4, model, gradients.grads());
//!     run.step += 1;
//!     if run.step % 100 == 0 {
//!         run.save(path, &model, &optimizer, &WriteOptions { overwrite: true, ..Default::default() })?;
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! What must be the same for the same bits: the base weights, the data, and the loop; the backend, the processor's
//! instruction set and the number of threads as far as sums depend on them; this crate's and Burn's version. A checkpoint
//! is taken between steps: gradients of a step begun are not in it.
//!
//! # The file
//!
//! A [safetensors](https://github.com/huggingface/safetensors) file, for Python too, without any pickle:
//!
//! * `adapters.PATH`: every parameter of every adapter, in its dtype, by its path in the model;
//! * `optimizer.PATH.FIELD`: what the optimiser keeps for it. Burn keys this by parameter ids, which every process draws
//!   anew; by paths it finds its place again;
//! * `sha256`, the last 32 bytes of the file: the digest of all bytes before;
//! * `burn_peft.checkpoint` in the header's `__metadata__`: JSON with the version of this format, the seed, the step, what the
//!   checkpoint belongs to, and the optimiser's numbers that are no tensors.

mod checkpoint;
mod container;
mod description;
mod optimizer;
mod parameters;
mod seed;

pub use checkpoint::Checkpoint;
pub use container::{MAX_CHECKPOINT_BYTES, METADATA_KEY};
pub use description::Difference;
pub use seed::Seed;
