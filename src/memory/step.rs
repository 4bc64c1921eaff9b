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

use super::ledger::{Ledger, Moment, Part, Tensor};
use super::setup::{Checkpointing, Head, Loss, Method, Optimizer, Setup};
use super::shape::{ModelShape, Projection};
use super::tensors::{EMBEDDING, Key, last_norm_key, linear_key, norm_key, trained, trained_dtype};

/// A step being planned.
pub(super) struct Step<'a> {
    pub shape: &'a ModelShape,
    pub setup: &'a Setup,
    pub ledger: Ledger,
    gradients: BTreeMap<Key, Tensor>,
}

/// What a linear layer keeps: its input, if wanted, and `s·x·A`.
#[derive(Default)]
struct Linear {
    x: Option<Tensor>,
    u: Option<Tensor>,
}

/// What a block keeps.
struct Block {
    index: u64,
    /// Whether a gradient flows to the block's input.
    to_input: bool,
    x: Option<Tensor>,
    query: Linear,
    key: Linear,
    value: Linear,
    qkv: Option<[Tensor; 3]>,
    output: Linear,
    h: Option<Tensor>,
    gate: Linear,
    up: Linear,
    gated: Option<[Tensor; 2]>,
    down: Linear,
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

    /// Runs the step; `kept` is told of what stands when the forward pass of the blocks has ended.
    pub fn run(mut self, kept: impl FnOnce(&Ledger)) {
        let (tail, checkpoints) = self.forward();
        kept(&self.ledger);
        let last = self.shape.layers - 1;
        let mut dy = self.head_and_loss(tail.norm_input, last);
        let rotation = tail.rotation;
        for block in tail.graph.into_iter().rev() {
            dy = self.block_backward(block, dy);
        }
        if let Checkpointing::Segments(size) = self.setup.checkpointing {
            for (index, input) in checkpoints.into_iter().enumerate().rev() {
                let first = index as u64 * size;
                let end = self.shape.layers.min(first.saturating_add(size));
                dy = self.segment(first..end, input, dy);
            }
        }
        drop(rotation);
        if let Some(dy) = dy.filter(|_| self.is_full()) {
            self.ledger.begin(Moment::BackwardEmbedding);
            let [vocab, hidden] = [self.shape.vocab, self.shape.hidden].map(u128::from);
            self.gradient(EMBEDDING, vocab * hidden);
            drop(dy);
        }
        self.optimizer();
    }

    fn is_full(&self) -> bool {
        self.setup.method == Method::Full
    }

    fn tokens(&self) -> u128 {
        u128::from(self.setup.batch) * u128::from(self.setup.seq)
    }

    /// An activation of so many values a token, kept for backward or not.
    fn activation(&self, kept: bool, width: u64) -> Tensor {
        let part = if kept {
            Part::Activations
        } else {
            Part::Transients
        };
        self.ledger.tensor(part, self.activation_bytes(width))
    }

    fn activation_bytes(&self, width: u64) -> u128 {
        self.tokens() * u128::from(width) * self.setup.base.bytes()
    }

    fn transient(&self, bytes: u128) -> Tensor {
        self.ledger.tensor(Part::Transients, bytes)
    }

    /// The result of a product of Burn's own, which its CPU backend holds twice for a moment, in moving it to an address that
    /// is a multiple of a cache line.
    fn product(&self, part: Part, bytes: u128) -> Tensor {
        let first = self.transient(bytes);
        let result = self.ledger.tensor(part, bytes);
        drop(first);
        result
    }

    /// The gradient of a trained tensor, added in place to what there is of it.
    fn gradient(&mut self, key: Key, values: u128) {
        let gradient = self
            .ledger
            .tensor(Part::Gradients, self.gradient_bytes(key, values));
        self.gradients.insert(key, gradient);
    }

    fn gradient_bytes(&self, key: Key, values: u128) -> u128 {
        values * trained_dtype(self.setup, self.shape, key).bytes()
    }

    /// Whether a layer's products are Burn's: forward if nothing is packed, backward if no adapter is there.
    fn is_burns(&self, at: Projection, forward: bool) -> bool {
        let packed = match at {
            Projection::Head => self.setup.head == Head::Nf4,
            _ => self.setup.method == Method::QLora,
        };
        !packed && (forward || !self.setup.adapts(at))
    }

    /// Whether backward wants the input of this layer.
    fn wants_input(&self, projection: Projection) -> bool {
        self.is_full() || self.setup.adapts(projection)
    }

    /// Per token `s·x·A` or the like, in f32.
    fn low_rank(&self, part: Part) -> Tensor {
        let bytes = 4 * self.tokens() * u128::from(self.setup.rank);
        self.ledger.tensor(part, bytes)
    }

    /// What a product copies of its weight while it runs.
    fn weight_copy(&self, projection: Projection) -> Option<Tensor> {
        let [d_in, d_out] = self.shape.dims(projection).map(u128::from);
        let dtype = self.setup.weight_copy?;
        Some(self.transient(d_in * d_out * dtype.bytes()))
    }

    /// `y` of a linear layer, which stays if `kept`, and what the layer keeps if there is a `graph`.
    fn linear(&self, at: Projection, x: Tensor, graph: bool, kept: bool) -> (Tensor, Linear) {
        let [_, d_out] = self.shape.dims(at);
        let part = if graph {
            Part::Activations
        } else {
            Part::Transients
        };
        let u = self.setup.adapts(at).then(|| self.low_rank(part));
        let copy = self.weight_copy(at);
        let y = match self.is_burns(at, true) {
            true => {
                let part = if kept {
                    Part::Activations
                } else {
                    Part::Transients
                };
                self.product(part, self.activation_bytes(d_out))
            }
            false => self.activation(kept, d_out),
        };
        drop(copy);
        if !graph {
            return (y, Linear::default());
        }
        let x = self.wants_input(at).then_some(x);
        (y, Linear { x, u })
    }

    /// The gradients of a linear layer: its tensors', and that of its input if wanted.
    fn linear_backward(
        &mut self,
        (block, at): (u64, Projection),
        layer: Linear,
        dy: Tensor,
        to_input: bool,
    ) -> Option<Tensor> {
        let [d_in, d_out] = self.shape.dims(at);
        let [rows, columns] = [d_in, d_out].map(u128::from);
        let key = |tensor| linear_key(self.shape, block, at, tensor);
        let keys = [key(0), key(1)];
        let dx = |step: &Self| {
            let copy = to_input.then(|| step.weight_copy(at));
            let dx = to_input.then(|| match step.is_burns(at, false) {
                true => step.product(Part::Transients, step.activation_bytes(d_in)),
                false => step.activation(false, d_in),
            });
            drop(copy);
            dx
        };
        let Linear { x, u } = layer;
        if self.is_full() {
            let dx = dx(self);
            let first = self.transient(self.gradient_bytes(keys[0], rows * columns));
            self.gradient(keys[0], rows * columns);
            drop(first);
            if self.shape.has_bias(at) {
                self.gradient(keys[1], columns);
            }
            drop((x, dy));
            return dx;
        }
        if !self.setup.adapts(at) {
            let dx = dx(self);
            drop(dy);
            return dx;
        }
        let rank = u128::from(self.setup.rank);
        self.gradient(keys[1], rank * columns);
        let v = self.low_rank(Part::Transients);
        self.gradient(keys[0], rows * rank);
        drop(x);
        let dx = dx(self);
        drop((u, v, dy));
        dx
    }

    /// A block's output, and what it keeps if there is a `graph`.
    fn block(&self, index: u64, x: Tensor, graph: bool, to_input: bool) -> (Tensor, Option<Block>) {
        use Projection::{Down, Gate, Key, Output, Query, Up, Value};
        let shape = self.shape;
        let trains =
            |layers: &[Projection]| graph && layers.iter().any(|&layer| self.wants_input(layer));
        let (queries, keys) = (
            shape.heads * shape.head_dim,
            shape.kv_heads * shape.head_dim,
        );
        let to_input = graph && to_input;
        let norm_x = (to_input || graph && self.is_full()).then(|| x.clone());
        let attended = to_input || trains(&[Query, Key, Value]);

        let n1 = self.activation(trains(&[Query, Key, Value]), shape.hidden);
        let (projected, query) = self.linear(Query, n1.clone(), graph, false);
        let q = self.activation(attended, queries);
        drop(projected);
        let (projected, key) = self.linear(Key, n1.clone(), graph, false);
        let k = self.activation(attended, keys);
        drop(projected);
        let (v, value) = self.linear(Value, n1, graph, attended);
        let y = self.activation(trains(&[Output]), queries);
        let qkv = attended.then(|| [q.clone(), k.clone(), v.clone()]);
        drop((q, k, v));

        let tracked = attended || trains(&[Output]);
        // The sum is written over what is added.
        let (h, output) = self.linear(Output, y, graph, tracked);
        drop(x);
        let norm_h = tracked.then(|| h.clone());
        let n2 = self.activation(trains(&[Gate, Up]), shape.hidden);
        let gated = tracked || trains(&[Gate, Up]);
        let (g, gate) = self.linear(Gate, n2.clone(), graph, gated);
        let (u, up) = self.linear(Up, n2, graph, gated);
        let s = self.activation(trains(&[Down]), shape.intermediate);
        let gated = gated.then(|| [g.clone(), u.clone()]);
        drop((g, u));
        let (y, down) = self.linear(Down, s, graph, true);
        drop(h);
        let block = graph.then(|| Block {
            index,
            to_input,
            x: norm_x,
            query,
            key,
            value,
            qkv,
            output,
            h: norm_h,
            gate,
            up,
            gated,
            down,
        });
        (y, block)
    }

    /// The gradient of a norm's input, and of its weight.
    fn norm_backward(&mut self, key: Key, x: Option<Tensor>, dy: Tensor) -> Tensor {
        if self.is_full() {
            self.gradient(key, u128::from(self.shape.hidden));
        }
        let dx = self.activation(false, self.shape.hidden);
        drop((x, dy));
        dx
    }

    /// The gradient of a block's input from that of its output; none where none is wanted.
    fn block_backward(&mut self, block: Block, dy: Option<Tensor>) -> Option<Tensor> {
        use Projection::{Down, Gate, Key, Output, Query, Up, Value};
        let dy = dy?;
        let index = block.index;
        self.ledger.begin(Moment::Backward(index));
        let shape = self.shape;
        let (queries, keys) = (
            shape.heads * shape.head_dim,
            shape.kv_heads * shape.head_dim,
        );

        // The residual's share is the same tensor.
        let mut dh = Some(dy.clone());
        let to_gated = block.gated.is_some();
        let ds = self.linear_backward((index, Down), block.down, dy, to_gated);
        if let (Some(ds), Some(operands)) = (ds, block.gated) {
            let [dg, du] = [0, 1].map(|_| self.activation(false, shape.intermediate));
            drop((ds, operands));
            let to_norm = block.h.is_some();
            let dn = self.linear_backward((index, Gate), block.gate, dg, to_norm);
            let other = self.linear_backward((index, Up), block.up, du, to_norm);
            drop(other);
            if let Some(dn) = dn {
                let dx = self.norm_backward(norm_key(index, true), block.h, dn);
                dh = Some(dx);
            }
        }
        let dh = dh?;
        let to_attention = block.qkv.is_some();
        let to_input = block.to_input;
        let residual = to_input.then(|| dh.clone());
        let dy = self.linear_backward((index, Output), block.output, dh, to_attention);
        let dy = dy?;
        let [dq, dk, dv] = [queries, keys, keys].map(|width| self.activation(false, width));
        drop((dy, block.qkv));
        let rotated = self.activation(false, queries);
        drop(dq);
        let dq = rotated;
        let rotated = self.activation(false, keys);
        drop(dk);
        let dk = rotated;
        let to_norm = block.x.is_some();
        let dn = self.linear_backward((index, Query), block.query, dq, to_norm);
        let others = [
            self.linear_backward((index, Key), block.key, dk, to_norm),
            self.linear_backward((index, Value), block.value, dv, to_norm),
        ];
        drop(others);
        let dx = self.norm_backward(norm_key(index, false), block.x, dn?);
        drop(residual);
        to_input.then_some(dx)
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
            let graph = match self.setup.checkpointing {
                Checkpointing::None => true,
                Checkpointing::Segments(size) => {
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

    /// Norm, head and loss, forward and backward: the gradient of the last block's output.
    fn head_and_loss(&mut self, x: Tensor, last: u64) -> Option<Tensor> {
        let shape = self.shape;
        let hidden = shape.hidden;
        self.ledger.begin(Moment::ForwardHead);
        let chunked = matches!(self.setup.loss, Loss::Chunked { .. });
        let wanted = self.wants_input(Projection::Head) || chunked;
        let n = self.activation(wanted, hidden);
        let u = self.setup.adapts(Projection::Head);
        let u = u.then(|| self.low_rank(Part::Activations));
        let layer = |n| Linear {
            x: wanted.then_some(n),
            u,
        };
        let dn = match self.setup.loss {
            Loss::Logits => {
                let logits = self.tokens() * u128::from(shape.vocab) * self.logit_bytes();
                let copy = self.weight_copy(Projection::Head);
                let z = match self.is_burns(Projection::Head, true) {
                    true => self.product(Part::Logits, logits),
                    false => self.ledger.tensor(Part::Logits, logits),
                };
                drop(copy);
                let layer = layer(n);
                self.ledger.begin(Moment::Loss);
                let dz = self.ledger.tensor(Part::Logits, logits);
                drop(z);
                self.ledger.begin(Moment::BackwardHead);
                self.linear_backward((last, Projection::Head), layer, dz, true)
            }
            Loss::Chunked { tokens, vocab } => {
                self.ledger.begin(Moment::Loss);
                self.chunked((last, tokens.into(), vocab.into()), layer(n))
            }
        };
        self.ledger.begin(Moment::BackwardHead);
        let dn = dn?;
        Some(self.norm_backward(last_norm_key(shape), Some(x), dn))
    }

    /// Of a logit: of the dtype of activations, or the head's if that is wider.
    fn logit_bytes(&self) -> u128 {
        let base = self.setup.base.bytes();
        match self.setup.head {
            Head::Dense(dtype) => dtype.bytes().max(base),
            Head::Nf4 => base,
        }
    }

    /// Head and loss over so many tokens by so much of the vocabulary at a time; which of them is largest does not matter, as
    /// each is gone before the next.
    fn chunked(
        &mut self,
        (last, tokens, vocab): (u64, u128, u128),
        layer: Linear,
    ) -> Option<Tensor> {
        let (rows, width) = (
            tokens.min(self.tokens()),
            vocab.min(u128::from(self.shape.vocab)),
        );
        let features = u128::from(self.shape.hidden);
        // Logits, which become their gradient in place; that gradient rounded, and sums in f32, where values have 16 bits.
        let z = self.ledger.tensor(Part::Logits, 4 * rows * width);
        let narrow = self.setup.base.bytes() < 4;
        let rounded = narrow.then(|| self.ledger.tensor(Part::Logits, 2 * rows * width));
        let sums = narrow.then(|| self.transient(4 * rows * features));
        // Of a weight that trains, both turned.
        let turned = self.is_full();
        let turned = turned.then(|| self.transient(4 * rows * (width + features)));
        let dx = self.linear_backward((last, Projection::Head), layer, z, true);
        drop((rounded, sums, turned));
        dx
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
                    // A part of the gradient, to be added to a moment.
                    drop(self.transient(values * dtype));
                    drop(gradient);
                    // Both moments corrected, one of which becomes the change; then the decayed tensor beside it.
                    let moment = self.transient(values * state.bytes());
                    drop(self.transient(values * state.bytes()));
                    drop(self.transient(values * dtype));
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
