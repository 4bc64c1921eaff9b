//! Gradient checkpointing by blocks: the activations inside a block are computed again in backward, not kept.
//!
//! ```text
//! x_0, x_i = f_i(x_{i−1})        forward keeps x_0, x_k, x_2k, … only, of segments of k blocks
//! dx_{i−1} = (∂f_i/∂x)ᵀ·dx_i     backward runs f_i again under autodiff, one segment at a time
//! ```
//!
//! `f_i` is the `i`-th block of a network, `x_i` what it gives, `dx_i` the gradient of the loss with respect to it.
//!
//! # What Burn's own checkpointing does, and what it cannot
//!
//! A device made by `Device::gradient_checkpointing` keeps what costs much to compute and computes again what is cheap, operation by
//! operation: the results of matrix products and of this crate's fused operations stay. In a block of a Llama, whose other
//! operations are fused already, that is nearly everything. Here a whole block leaves one tensor. The two can be combined.
//!
//! # Memory and time
//!
//! Of `n` blocks and segments of `k`: `⌈n/k⌉` tensors of the size of `x` between forward and backward, and the graph of one segment
//! while it runs. The gradients of one segment join those that are done. Every block's forward is computed twice.
//!
//! Source: T. Chen et al., "Training deep nets with sublinear memory cost", <https://arxiv.org/abs/1604.06174>.

mod parameters;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Gradients, Tensor};

use crate::model::nothing_trains;
use crate::resume::Seed;
use crate::tensor::constant;
use crate::{PeftError, Result};
use parameters::{add_of, initialize, requires_grad};

/// Which activations are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All of them, in one graph: no block runs twice.
    All,
    /// The input of every segment of so many blocks; at least 1. One keeps the fewest inside of a segment; about the root of
    /// the number of blocks keeps the fewest in all where the input of a block is large beside what it keeps.
    Segments(usize),
}

/// How the blocks of a network are run in training.
///
/// Before each block the device is seeded with a number derived from `seed` and the block's place, in forward and again in
/// backward, so that dropout repeats; in forward [`Keep::All`] draws the same. What is drawn after the last block follows from that
/// block's seed, and what is drawn after backward from that of the block it came to last: seed the device anew for what follows a
/// step.
///
/// ```
/// # use burn::{module::Module, nn::Linear, optim::GradientsParams, tensor::Tensor};
/// # use burn_peft::{checkpointing::Checkpointing, model::{PeftForward, PeftModel}, resume::Seed};
/// # #[derive(Module, Debug)]
/// # struct Model { blocks: Vec<Linear>, head: Linear }
/// # fn step(model: &PeftModel<Model>, x: Tensor<2>, seed: Seed, step: u64) -> burn_peft::Result<GradientsParams> {
/// let run = Checkpointing::by_block(seed.at(step, 0));
/// let (y, tape) = run.forward(&model.blocks, x, |block, x| block.forward_peft(x))?;
/// let loss = model.head.forward_peft(y).mean();
/// Ok(tape.backward(&loss, model))
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpointing {
    /// What is kept.
    pub keep: Keep,
    /// Where the randomness of each block comes from: a number of this micro-step, as [`Seed::at`] gives it.
    pub seed: u64,
}

impl Checkpointing {
    /// Keeps the input of every block.
    pub fn by_block(seed: u64) -> Self {
        Self {
            keep: Keep::Segments(1),
            seed,
        }
    }

    /// Keeps everything, as without checkpointing.
    pub fn off(seed: u64) -> Self {
        Self {
            keep: Keep::All,
            seed,
        }
    }

    /// Runs `x` through the blocks, `run` computing one of them, and returns what the last one gives and what backward needs.
    ///
    /// `x` may be tracked by autodiff, and its gradient is then followed. Whatever else `run` reads must not require a
    /// gradient unless it is a parameter of the block it is given: it would get none. `run` must compute the same when called
    /// again, but for what it draws from the device.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for segments of no block, or if `x` is not on a device with autodiff.
    pub fn forward<'a, B: Module, const D: usize>(
        self,
        blocks: &'a [B],
        x: Tensor<D>,
        run: impl Fn(&B, Tensor<D>) -> Tensor<D> + 'a,
    ) -> Result<(Tensor<D>, Tape<'a, B, D>)> {
        self.check(&x)?;
        // What is initialised when first used would be so twice, differently, and draw what a block's seed is for.
        blocks.iter().for_each(initialize);
        let mut tape = Tape {
            blocks,
            run: Box::new(run),
            checkpointing: self,
            input: x.clone(),
            kept: Vec::new(),
            output: None,
        };
        let y = match self.keep {
            Keep::All => tape.run_blocks(0..blocks.len(), x, B::clone),
            Keep::Segments(size) => {
                let trained = match tape.input.is_tracked() {
                    true => Some(0),
                    false => blocks.iter().position(requires_grad),
                };
                let mut x = constant(x);
                for first in (0..blocks.len()).step_by(size) {
                    let segment = first..blocks.len().min(first + size);
                    if trained.is_some_and(|trained| trained < segment.end) {
                        tape.kept.push((first, x.clone()));
                    }
                    // Dropout needs the device of training; a graph needs a parameter that requires a gradient.
                    x = tape.run_blocks(segment, x, |block| block.clone().no_grad());
                }
                if trained.is_some() {
                    x = x.require_grad();
                    tape.output = Some(x.clone());
                }
                x
            }
        };
        Ok((y, tape))
    }

    fn check<const D: usize>(&self, x: &Tensor<D>) -> Result<()> {
        let error =
            |name: &str, value: &str, expected: &str| Err(PeftError::config(name, value, expected));
        match self.keep {
            Keep::Segments(0) => error("segments", "0", "at least one block"),
            _ if !x.device().is_autodiff() => error(
                "device of x",
                &format!("{:?}", x.device()),
                "one with autodiff",
            ),
            _ => Ok(()),
        }
    }

    fn seed_of(&self, block: usize) -> u64 {
        Seed(self.seed).at(block as u64, 0)
    }
}

/// Computes one block.
type Run<'a, B, const D: usize> = Box<dyn Fn(&B, Tensor<D>) -> Tensor<D> + 'a>;

/// What forward left for backward: the inputs of segments, and how to run them again.
#[must_use = "the gradients of the blocks come from its `backward`"]
pub struct Tape<'a, B, const D: usize> {
    blocks: &'a [B],
    run: Run<'a, B, D>,
    checkpointing: Checkpointing,
    /// What came into the first block, with its graph.
    input: Tensor<D>,
    /// The inputs of the segments, constants, each with the index of its first block. Segments before the first one
    /// that anything is trained in are left out.
    kept: Vec<(usize, Tensor<D>)>,
    /// What the last block gave, as the leaf of another graph; none where everything is one graph.
    output: Option<Tensor<D>>,
}

impl<B: Module, const D: usize> Tape<'_, B, D> {
    /// The gradients of `loss` with respect to all parameters of `module` that require one, as
    /// `GradientsParams::from_grads(loss.backward(), module)` has them.
    ///
    /// `loss` is computed from what [`forward`](Checkpointing::forward) returned; `module` is the whole model, which holds
    /// the blocks. A parameter that is used in several blocks, or in and out of them, gets the sum.
    ///
    /// # Panics
    ///
    /// As `Tensor::backward`: if `loss` depends on nothing that requires a gradient. The text names the adapters if all of them are
    /// frozen or inactive.
    pub fn backward<M: Module, const L: usize>(
        self,
        loss: &Tensor<L>,
        module: &M,
    ) -> GradientsParams {
        if !self.input.is_tracked()
            && let Some(error) = nothing_trains(module)
        {
            panic!("{error}");
        }
        self.backward_from(loss.backward(), module)
    }

    /// As [`backward`](Self::backward), of gradients that were computed already.
    pub fn backward_from<M: Module>(
        mut self,
        mut gradients: Gradients,
        module: &M,
    ) -> GradientsParams {
        let mut all = GradientsParams::from_module(&mut gradients, module);
        let Some(output) = self.output.take() else {
            return all;
        };
        let dy = output.grad_remove(&mut gradients);
        drop((gradients, output));
        // None if the loss does not depend on the blocks.
        let Some(mut dy) = dy else {
            return all;
        };
        let Keep::Segments(size) = self.checkpointing.keep else {
            unreachable!("with everything in one graph there is no other leaf");
        };
        while let Some((first, input)) = self.kept.pop() {
            let segment = first..self.blocks.len().min(first + size);
            // Of the first one the input's gradient is wanted only if something before it is trained.
            let is_last = self.kept.is_empty() && !self.input.is_tracked();
            let x = input.set_require_grad(!is_last);
            let y = self.run_blocks(segment.clone(), x.clone(), B::clone);
            if !y.is_tracked() {
                return all;
            }
            let mut gradients = pull(y, dy);
            for block in &self.blocks[segment] {
                add_of(block, &mut gradients, &mut all);
            }
            match x.grad_remove(&mut gradients) {
                Some(dx) => dy = dx,
                None => return all,
            }
        }
        if self.input.is_tracked() {
            let mut gradients = pull(self.input, dy);
            add_of(module, &mut gradients, &mut all);
        }
        all
    }

    fn run_blocks(
        &self,
        blocks: std::ops::Range<usize>,
        x: Tensor<D>,
        prepare: impl Fn(&B) -> B,
    ) -> Tensor<D> {
        let device = x.device();
        blocks.fold(x, |x, index| {
            device.seed(self.checkpointing.seed_of(index));
            (self.run)(&prepare(&self.blocks[index]), x)
        })
    }
}

/// The gradients of what `y` depends on, `dy` being that of `y`.
fn pull<const D: usize>(y: Tensor<D>, dy: Tensor<D>) -> Gradients {
    // The gradient of a sum of products with a constant, which a tensor without autodiff is, is that constant to the bit.
    (y * dy).sum().backward()
}
