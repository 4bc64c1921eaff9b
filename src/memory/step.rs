//! One training step, in sizes: what each operation allocates, keeps and frees, in the order in which they run.
//!
//! With `T` tokens, `e` bytes an activation and the letters of [`ModelShape`], a block keeps for its backward pass
//!
//! ```text
//! x, n₁, n₂, h: T·h·e each          inputs of the norms and what comes out of them
//! q, y: T·a·d·e   k, v: T·g·d·e     attention's operands and its result
//! gate, up, s: T·f·e each           the gated unit's operands and its result
//! u = s·x·A: 4·T·r                  of each adapter
//! ```
//!
//! less what no layer wants: the input of a linear layer stays if its weight trains (all of them in full fine-tuning) or if it
//! has an adapter; scores of attention never do (see [`fused`](crate::fused)). A packed or frozen weight keeps nothing but its
//! handle. The order of the backward pass is that of Burn's tape, by depth in the graph, so that gradients of parallel
//! branches are alive together; sums of gradients are made in place. What the first block receives is not tracked unless
//! the embedding trains.

use std::collections::BTreeMap;

use super::block::Block;
use super::ledger::{Ledger, Moment, Part, Tensor};
use super::setup::{Method, Optimizer, Products, Recompute, Setup};
use super::shape::ModelShape;
use super::tensors::{EMBEDDING, Key, trained, trained_dtype};

/// A step being planned.
pub(super) struct Step<'a> {
    pub shape: &'a ModelShape,
    pub setup: &'a Setup,
    pub ledger: Ledger,
    pub gradients: BTreeMap<Key, Tensor>,
}

impl<'a> Step<'a> {
    pub fn new(shape: &'a ModelShape, setup: &'a Setup, ledger: Ledger) -> Self {
        Self {
            shape,
            setup,
            ledger,
            gradients: BTreeMap::new(),
        }
    }

    /// Runs the step and returns what the forward pass keeps for backward, logits not counted.
    pub fn run(mut self) -> u128 {
        let (tail, checkpoints) = self.forward();
        let last = self.shape.layers - 1;
        let (mut dy, kept) = self.head_and_loss(tail.norm_input, last);
        let rotation = tail.rotation;
        for block in tail.graph.into_iter().rev() {
            dy = self.block_backward(block, dy);
        }
        if let Recompute::Segments(size) = self.setup.recompute {
            for (index, input) in checkpoints.into_iter().enumerate().rev() {
                let first = index as u64 * size;
                let end = self.shape.layers.min(first.saturating_add(size));
                dy = self.segment(first..end, input, dy);
            }
        }
        drop(rotation);
        if let Some(dy) = dy.filter(|_| self.is_full()) {
            self.ledger.begin(Moment::BackwardEmbedding);
            // Dense, from zeros, which Burn's CPU backend makes as it makes results of products.
            let bytes = self.embedding_bytes();
            let twice = (self.setup.products == Products::Cpu).then(|| self.transient(bytes));
            let gradient = self.ledger.tensor(Part::Gradients, bytes);
            self.gradients.insert(EMBEDDING, gradient);
            drop((twice, dy));
        }
        self.optimizer();
        kept
    }

    pub(super) fn is_full(&self) -> bool {
        self.setup.method == Method::Full
    }

    pub(super) fn tokens(&self) -> u128 {
        u128::from(self.setup.batch) * u128::from(self.setup.seq)
    }

    /// An activation of so many values a token, kept for backward or not.
    pub(super) fn activation(&self, kept: bool, width: u64) -> Tensor {
        let part = if kept {
            Part::Activations
        } else {
            Part::Transients
        };
        self.ledger.tensor(part, self.activation_bytes(width))
    }

    pub(super) fn activation_bytes(&self, width: u64) -> u128 {
        self.tokens() * u128::from(width) * self.setup.base.bytes()
    }

    pub(super) fn transient(&self, bytes: u128) -> Tensor {
        self.ledger.tensor(Part::Transients, bytes)
    }

    pub(super) fn embedding_bytes(&self) -> u128 {
        let [vocab, hidden] = [self.shape.vocab, self.shape.hidden].map(u128::from);
        vocab * hidden * self.setup.embedding.bytes()
    }

    /// The gradient of a trained tensor, added in place to what there is of it.
    pub(super) fn gradient(&mut self, key: Key, values: u128) {
        let dtype = trained_dtype(self.setup, self.shape, key);
        let bytes = values * dtype.bytes();
        let gradient = self.ledger.tensor(Part::Gradients, bytes);
        self.gradients.insert(key, gradient);
    }

    /// The embedding and the blocks, forward, and the input of the last norm.
    fn forward(&self) -> (Tail, Vec<Tensor>) {
        let shape = self.shape;
        self.ledger.begin(Moment::ForwardEmbedding);
        let mut x = self.activation(true, shape.hidden);
        // Sines and cosines, f32.
        let angles = u128::from(self.setup.seq) * u128::from(shape.head_dim / 2) * 4;
        let rotation = [0, 1].map(|_| self.ledger.tensor(Part::Activations, angles));
        let mut checkpoints = Vec::new();
        let mut blocks = Vec::new();
        for index in 0..shape.layers {
            self.ledger.begin(Moment::Forward(index));
            let graph = match self.setup.recompute {
                Recompute::Never => true,
                Recompute::Segments(size) => {
                    if index.is_multiple_of(size) {
                        checkpoints.push(x.clone());
                    }
                    false
                }
            };
            let (y, block) = self.block(index, x, graph, index > 0 || self.is_full());
            blocks.extend(block);
            x = y;
        }
        let tail = Tail {
            norm_input: x,
            rotation,
            graph: blocks,
        };
        (tail, checkpoints)
    }

    /// Runs a segment again from its input, and back: the gradient of that input, if it is wanted.
    fn segment(
        &mut self,
        blocks: std::ops::Range<u64>,
        input: Tensor,
        dy: Option<Tensor>,
    ) -> Option<Tensor> {
        let dy = dy?;
        self.ledger.begin(Moment::Backward(blocks.end - 1));
        let mut x = input;
        let mut graph = Vec::new();
        for index in blocks {
            let (y, block) = self.block(index, x, true, index > 0 || self.is_full());
            graph.extend(block);
            x = y;
        }
        // What pulls `dy` through: the product with it, in place, and ones that become its gradient.
        let mut gradient = Some(self.activation(false, self.shape.hidden));
        drop((dy, x));
        while let Some(block) = graph.pop() {
            gradient = self.block_backward(block, gradient);
        }
        gradient
    }

    /// The step of an optimiser, tensor by tensor.
    fn optimizer(&mut self) {
        self.ledger.begin(Moment::Optimizer);
        for (key, values) in trained(self.shape, self.setup) {
            let Some(gradient) = self.gradients.remove(&key) else {
                continue;
            };
            let dtype = trained_dtype(self.setup, self.shape, key).bytes();
            match self.setup.optimizer {
                // In place.
                Optimizer::Sgd | Optimizer::AdamW8bit => drop(gradient),
                Optimizer::AdamW { state } => {
                    // Wider than what trains, it computes on a copy (`optim::F32State`): the parameter
                    // itself is gone until the copy is rounded.
                    let wide = dtype.max(state.bytes());
                    let copy = (wide > dtype).then(|| self.transient(values * (wide - dtype)));
                    let gradient = match copy {
                        None => gradient,
                        Some(_) => {
                            let widened = self.transient(values * wide);
                            drop(gradient);
                            widened
                        }
                    };
                    // A part of the gradient, to be added to a moment.
                    drop(self.transient(values * wide));
                    drop(gradient);
                    // Both moments corrected, one of which becomes the change; then the decayed tensor beside it.
                    let moment = self.transient(values * state.bytes());
                    drop(self.transient(values * state.bytes()));
                    drop(self.transient(values * wide));
                    drop(moment);
                }
            }
        }
    }
}

/// What the forward pass of the blocks leaves.
struct Tail {
    norm_input: Tensor,
    rotation: [Tensor; 2],
    graph: Vec<Block>,
}
