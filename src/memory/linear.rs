//! Linear layers of a planned step: what their products copy, what the layers keep, their gradients.

use super::ledger::{Part, Tensor};
use super::setup::{Head, Method, Products};
use super::shape::Projection;
use super::step::Step;
use super::tensors::linear_key;

/// What a linear layer keeps: its input, if wanted, and `s·x·A`.
#[derive(Default)]
pub(super) struct Linear {
    pub x: Option<Tensor>,
    pub u: Option<Tensor>,
}

impl Step<'_> {
    /// The result of a product with the weight of `at`, of so many values, and what is copied meanwhile; `operands` are the numbers of
    /// values of what is multiplied.
    pub(super) fn product(
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
    pub(super) fn width_at(&self, at: Projection) -> u128 {
        match (at, self.setup.head) {
            (Projection::Head, Head::Dense(dtype)) => dtype.bytes().max(self.setup.base.bytes()),
            _ => self.setup.base.bytes(),
        }
    }

    /// How many products Burn's CPU backend makes of one with a trained weight: a batch stays one unless its sequences' lengths
    /// fill no tile and the whole comes closer to a square. Each has a gradient of the whole weight, summed then.
    pub(super) fn matrices(&self, at: Projection) -> u128 {
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

    pub(super) fn is_packed(&self, at: Projection) -> bool {
        match at {
            Projection::Head => self.setup.head == Head::Nf4,
            _ => self.setup.method == Method::QLora,
        }
    }

    /// Whether backward wants the input of this layer.
    pub(super) fn wants_input(&self, projection: Projection) -> bool {
        self.is_full() || self.setup.adapts(projection)
    }

    /// Per token `s·x·A` or the like, in f32.
    pub(super) fn low_rank(&self, part: Part) -> Tensor {
        let bytes = 4 * self.tokens() * u128::from(self.setup.rank);
        self.ledger.tensor(part, bytes)
    }

    /// Values of what a product of activations of this width takes: them, and the weight.
    pub(super) fn operands(&self, at: Projection, width: u64) -> [u128; 2] {
        let [d_in, d_out] = self.shape.dims(at).map(u128::from);
        [self.tokens() * u128::from(width), d_in * d_out]
    }

    /// `y` of a linear layer, which stays if `kept`, and what the layer keeps if there is a `graph`.
    pub(super) fn linear(
        &self,
        at: Projection,
        x: Tensor,
        graph: bool,
        kept: bool,
    ) -> (Tensor, Linear) {
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
    pub(super) fn linear_backward(
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
}
