//! A block of a planned step, forward and backward.

use super::ledger::{Moment, Tensor};
use super::linear::Linear;
use super::shape::Projection;
use super::step::Step;
use super::tensors::{Key, norm_key};

/// What a block keeps.
pub(super) struct Block {
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

impl Step<'_> {
    /// A block's output, and what it keeps if there is a `graph`.
    pub(super) fn block(
        &self,
        index: u64,
        x: Tensor,
        graph: bool,
        to_input: bool,
    ) -> (Tensor, Option<Block>) {
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
    pub(super) fn norm_backward(&mut self, key: Key, x: Option<Tensor>, dy: Tensor) -> Tensor {
        if self.is_full() {
            self.gradient(key, u128::from(self.shape.hidden));
        }
        let dx = self.activation(false, self.shape.hidden);
        drop((x, dy));
        dx
    }

    /// The gradient of a block's input from that of its output; none where none is wanted.
    pub(super) fn block_backward(&mut self, block: Block, dy: Option<Tensor>) -> Option<Tensor> {
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
}
