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
use super::setup::{Checkpointing, Head, Loss, Method, Optimizer, Products, Setup};
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

    /// Runs the step and returns what the forward pass keeps for backward, logits not counted.
    pub fn run(mut self) -> u128 {
        let (tail, checkpoints) = self.forward();
        let last = self.shape.layers - 1;
        let (mut dy, kept) = self.head_and_loss(tail.norm_input, last);
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

    /// The result of a product with the weight of `at`, of so many values, and what is copied meanwhile; `operands` are the numbers of
    /// values of what is multiplied.
    fn product(
        &self,
        (at, forward): (Projection, bool),
        part: Part,
        operands: [u128; 2],
        values: u128,
    ) -> Tensor {
        let width = self.width_at(at);
        let result = || self.ledger.tensor(part, values * width);
        match self.setup.products {
            Products::Dequantized if self.is_packed(at) => {
                let [d_in, d_out] = self.shape.dims(at).map(u128::from);
                let _dense = self.transient(d_in * d_out * width);
                result()
            }
            Products::Cpu if self.is_packed(at) || !forward && self.setup.adapts(at) => result(),
            Products::Cpu if width < 4 => {
                let operands = operands.map(|values| self.transient(4 * values));
                let twice = self.transient(4 * values);
                let wide = self.transient(4 * values);
                drop((operands, twice));
                let narrow = result();
                drop(wide);
                narrow
            }
            Products::Cpu => {
                let _twice = self.transient(values * width);
                result()
            }
            _ => result(),
        }
    }

    /// Bytes of a value that the products of a layer take and give.
    fn width_at(&self, at: Projection) -> u128 {
        match (at, self.setup.head) {
            (Projection::Head, Head::Dense(dtype)) => dtype.bytes().max(self.setup.base.bytes()),
            _ => self.setup.base.bytes(),
        }
    }

    /// How many products Burn's CPU backend makes of one with a trained weight: a batch stays one unless its sequences' lengths
    /// fill no tile and the whole comes closer to a square. Each has a gradient of the whole weight, summed then.
    fn matrices(&self, at: Projection) -> u128 {
        /// Rows of a tile.
        const TILE: u64 = 32;
        let [_, columns] = self.shape.dims(at).map(u128::from);
        let (batch, seq) = (self.setup.batch, self.setup.seq);
        let (rows, all) = (u128::from(seq), self.tokens());
        let squarer = all.min(columns) * rows.max(columns) > rows.min(columns) * all.max(columns);
        let merged = !seq.is_multiple_of(TILE) && squarer;
        match self.setup.products {
            Products::Cpu if !merged => batch.into(),
            _ => 1,
        }
    }

    fn embedding_bytes(&self) -> u128 {
        let [vocab, hidden] = [self.shape.vocab, self.shape.hidden].map(u128::from);
        vocab * hidden * self.setup.embedding.bytes()
    }

    /// The gradient of a trained tensor, added in place to what there is of it.
    fn gradient(&mut self, key: Key, values: u128) {
        let dtype = trained_dtype(self.setup, self.shape, key);
        let bytes = values * dtype.bytes();
        let gradient = self.ledger.tensor(Part::Gradients, bytes);
        self.gradients.insert(key, gradient);
    }

    fn is_packed(&self, at: Projection) -> bool {
        match at {
            Projection::Head => self.setup.head == Head::Nf4,
            _ => self.setup.method == Method::QLora,
        }
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

    /// Values of what a product of activations of this width takes: them, and the weight.
    fn operands(&self, at: Projection, width: u64) -> [u128; 2] {
        let [d_in, d_out] = self.shape.dims(at).map(u128::from);
        [self.tokens() * u128::from(width), d_in * d_out]
    }

    /// `y` of a linear layer, which stays if `kept`, and what the layer keeps if there is a `graph`.
    fn linear(&self, at: Projection, x: Tensor, graph: bool, kept: bool) -> (Tensor, Linear) {
        let [d_in, d_out] = self.shape.dims(at);
        let part = |kept| {
            if kept {
                Part::Activations
            } else {
                Part::Transients
            }
        };
        let u = self.setup.adapts(at).then(|| self.low_rank(part(graph)));
        let operands = self.operands(at, d_in);
        let values = self.tokens() * u128::from(d_out);
        let y = self.product((at, true), part(kept), operands, values);
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
            let operands = step.operands(at, d_out);
            let values = step.tokens() * rows;
            to_input.then(|| step.product((at, false), Part::Transients, operands, values))
        };
        let Linear { x, u } = layer;
        if self.is_full() {
            let dx = dx(self);
            let operands = [rows, columns].map(|width| self.tokens() * width);
            let values = rows * columns;
            let gradient = match self.matrices(at) {
                1 => self.product((at, true), Part::Gradients, operands, values),
                n => {
                    let of_each = self.product((at, true), Part::Transients, operands, n * values);
                    let bytes = values * self.width_at(at);
                    let sum = self.ledger.tensor(Part::Gradients, bytes);
                    drop(of_each);
                    sum
                }
            };
            self.gradients.insert(keys[0], gradient);
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
    fn head_and_loss(&mut self, x: Tensor, last: u64) -> (Option<Tensor>, u128) {
        let shape = self.shape;
        let hidden = shape.hidden;
        self.ledger.begin(Moment::ForwardHead);
        let chunked = matches!(self.setup.loss, Loss::Chunked { .. });
        let wanted = self.wants_input(Projection::Head) || chunked;
        let n = self.activation(wanted, hidden);
        let u = self.setup.adapts(Projection::Head);
        let u = u.then(|| self.low_rank(Part::Activations));
        // Burn's product with a transposed weight that trains copies it, and keeps the copy.
        let turned =
            (shape.tied && self.is_full() && self.setup.products == Products::Cpu).then(|| {
                self.ledger
                    .tensor(Part::Activations, self.embedding_bytes())
            });
        let layer = |n| Linear {
            x: wanted.then_some(n),
            u,
        };
        let kept = |step: &Self| step.ledger.live().of(Part::Activations);
        let (dn, kept) = match self.setup.loss {
            Loss::Logits => {
                let head = Projection::Head;
                let (operands, values) = (
                    self.operands(head, hidden),
                    self.tokens() * u128::from(shape.vocab),
                );
                let z = self.product((head, true), Part::Logits, operands, values);
                let layer = layer(n);
                let kept = kept(self);
                self.ledger.begin(Moment::Loss);
                let logits = values * self.width_at(head);
                let dz = self.ledger.tensor(Part::Logits, logits);
                drop(z);
                self.ledger.begin(Moment::BackwardHead);
                let head = (last, head);
                (self.linear_backward(head, layer, dz, true), kept)
            }
            Loss::Chunked { tokens, vocab } => {
                self.ledger.begin(Moment::Loss);
                let kept = kept(self);
                let chunk = (last, tokens.into(), vocab.into());
                (self.chunked(chunk, layer(n)), kept)
            }
        };
        self.ledger.begin(Moment::BackwardHead);
        drop(turned);
        let dx = dn.map(|dn| self.norm_backward(last_norm_key(shape), Some(x), dn));
        (dx, kept)
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
        let trains = self.is_full();
        let turned = trains.then(|| self.transient(4 * rows * (width + features)));
        let dx = self.activation(false, self.shape.hidden);
        let head = Projection::Head;
        let [a, b] = [0, 1].map(|tensor| linear_key(self.shape, last, head, tensor));
        let vocab = u128::from(self.shape.vocab);
        if self.is_full() {
            self.gradient(a, features * vocab);
        } else if self.setup.adapts(head) {
            let rank = u128::from(self.setup.rank);
            self.gradient(b, rank * vocab);
            let v = self.low_rank(Part::Transients);
            self.gradient(a, features * rank);
            drop(v);
        }
        drop((layer, z, rounded, sums, turned));
        Some(dx)
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
