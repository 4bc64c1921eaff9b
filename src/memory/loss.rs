//! The last norm, the head and the loss of a planned step, with all logits or in chunks.

use super::ledger::{Moment, Part, Tensor};
use super::linear::Linear;
use super::setup::{Loss, Products};
use super::shape::Projection;
use super::step::Step;
use super::tensors::{last_norm_key, linear_key};

impl Step<'_> {
    /// Norm, head and loss, forward and backward: the gradient of the last block's output.
    pub(super) fn head_and_loss(&mut self, x: Tensor, last: u64) -> (Option<Tensor>, u128) {
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
}
