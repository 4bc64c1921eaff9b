//! The loss of a head under whatever is attached to its weight, without its logits.

use burn::nn::{Embedding, Linear};
use burn::tensor::{DType, Int, Tensor, TensorData};

use super::active::Active;
use super::forward::PeftForward;
use super::weight::{PeftWeight, composed_value};
use crate::adapter::{Change, Lora, cast};
use crate::fused::cross_entropy as of_logits;
use crate::head::{Head, HeadChunks, HeadWeight, cross_entropy};
use crate::layer::weight_dims;

/// The output layer of a language model, whose cross entropy is computed a chunk of tokens by a chunk of the vocabulary at a time.
///
/// A `Linear` is a head of its own; an `Embedding` is one that is tied, `x·Eᵀ`. The value is that of
/// [`forward_peft`](PeftForward::forward_peft), or [`attend_peft`](super::TiedHead::attend_peft), and a cross entropy. What is
/// attached to the weight decides how much of it is in chunks:
///
/// | attached | computed as | gradients |
/// |---|---|---|
/// | nothing, or adapters that are off | `x·W + b` | of `x`, `b`, and of `W` if it requires one |
/// | a base packed in NF4 | the same, on the packed weight | of `x`, `b` |
/// | LoRA, one or several, also Burn's own | `x·W + Σ s·(drop(x)·A)·B + b` | of `A` and `B` too |
/// | trained rows (tokens) | the same, of the rank of their number | of the rows |
/// | a trained copy | `x·V + b` | of `V`, dense |
/// | DoRA without dropout | the effective weight is composed once, dense | that of it, dense |
/// | DoRA with dropout or beside a bias of `B`; of a `Linear` also rows of a batch under adapters of their own | the logits as a whole | by `forward_peft` |
///
/// A weight of Burn's own quantisation is dequantised once.
pub trait HeadLoss {
    /// `[features, vocabulary]`.
    fn head_dims(&self) -> [usize; 2];

    /// `Σ −log softmax(z)[label]` over `labels`, which are `(position, label)` in ascending order of positions in `hidden [batch, seq,
    /// features]`, row-major: `[1]`, f32 (f64 for f64 hidden states). Only the labelled positions are computed.
    ///
    /// # Panics
    ///
    /// If `hidden` is not of the head's features, there is no label, or one is outside of `hidden` or the vocabulary. If rows of the batch
    /// use adapters of their own on a tied head, which has no such forward pass.
    fn head_cross_entropy(
        &self,
        hidden: Tensor<3>,
        labels: Vec<(usize, usize)>,
        chunks: &HeadChunks,
    ) -> Tensor<1>;
}

impl HeadLoss for Linear {
    fn head_dims(&self) -> [usize; 2] {
        let state = self.weight.reparameterization::<PeftWeight>();
        match state.and_then(|state| state.nf4.as_ref()) {
            Some(nf4) => {
                let [vocabulary, features] = nf4.shape();
                [features, vocabulary]
            }
            None => weight_dims(&self.weight),
        }
    }

    fn head_cross_entropy(
        &self,
        hidden: Tensor<3>,
        labels: Vec<(usize, usize)>,
        chunks: &HeadChunks,
    ) -> Tensor<1> {
        let bias = self.bias.as_ref().map(|bias| bias.val());
        let Some(state) = self.weight.reparameterization::<PeftWeight>() else {
            let rows = Rows::new(hidden, labels);
            let Some(lora) = self.weight.adapter() else {
                return rows.loss(dense(self.weight.val()), Terms::default(), bias, chunks);
            };
            let mut terms = Terms::default();
            terms.add(&rows.x, lora.a.val(), lora.b.val(), lora.scale);
            return rows.loss(dense(self.weight.base()), terms, bias, chunks);
        };
        match Way::of(state, &hidden) {
            Way::Whole => whole(self.forward_peft(hidden), labels),
            Way::Composed => {
                let rows = Rows::new(hidden, labels);
                let weight = dense(composed_value(&self.weight));
                rows.loss(weight, Terms::default(), bias, chunks)
            }
            Way::Factored => {
                state.read_factored();
                let rows = Rows::new(hidden, labels);
                let mut terms = Terms::of_loras(&rows.x, &state.loras());
                let shift = shift(&state.loras());
                let bias = match (bias, shift) {
                    (Some(bias), Some(shift)) => {
                        let shift = cast(shift, bias.dtype().into());
                        Some(bias + shift)
                    }
                    (bias, shift) => bias.or(shift),
                };
                let weight = match &state.nf4 {
                    Some(nf4) if !state.has_own_values() => HeadWeight::Nf4(nf4),
                    _ => state.own_head(self.weight.base(), &rows.x, &mut terms),
                };
                rows.loss(weight, terms, bias, chunks)
            }
        }
    }
}

impl HeadLoss for Embedding {
    fn head_dims(&self) -> [usize; 2] {
        let [vocabulary, features] = weight_dims(&self.weight);
        [features, vocabulary]
    }

    fn head_cross_entropy(
        &self,
        hidden: Tensor<3>,
        labels: Vec<(usize, usize)>,
        chunks: &HeadChunks,
    ) -> Tensor<1> {
        let state = self.weight.reparameterization::<PeftWeight>();
        let factored = state.filter(|state| {
            let changes = state.in_use();
            let changed_whole = |(change, _): &(&Change, f64)| match change {
                Change::Lora(lora) => lora.magnitude.is_some(),
                Change::Copy(_) => true,
                Change::Rows(_) => false,
            };
            changes.is_some_and(|changes| !changes.iter().any(changed_whole))
        });
        let rows = Rows::new(hidden, labels);
        let mut terms = Terms::default();
        let weight = match factored {
            None => composed_value(&self.weight),
            Some(state) => {
                if state.is_changed() {
                    state.read_factored();
                }
                let weight = self.weight.base();
                for (change, factor) in state.in_use().unwrap_or_default() {
                    match change {
                        // Turned: `x·(E + s·A·B)ᵀ = x·Eᵀ + s·(x·Bᵀ)·Aᵀ`.
                        Change::Lora(lora) => {
                            let (a, b) = lora.factors();
                            let scale = factor * lora.scale();
                            terms.add(&rows.x, b.transpose(), a.transpose(), scale);
                        }
                        Change::Rows(own) => {
                            let [a, b] = own.factors(&weight);
                            terms.add(&rows.x, a, b, factor);
                        }
                        Change::Copy(_) => {}
                    }
                }
                weight
            }
        };
        rows.loss(dense(weight.transpose()), terms, None, chunks)
    }
}

impl PeftWeight {
    /// The dense base of a head with what adapters have of their own: values instead of it, or rows as another term.
    fn own_head(&self, base: Tensor<2>, x: &Tensor<2>, terms: &mut Terms) -> HeadWeight<'static> {
        let dtype = self.effective_dtype(base.dtype());
        let own: Vec<_> = self
            .in_use()
            .unwrap_or_default()
            .into_iter()
            .filter(|(change, _)| change.lora().is_none())
            .collect();
        let rows = |(change, _): &(&Change, f64)| matches!(change, Change::Rows(_));
        match own[..] {
            [] => return dense(base),
            // As it is: not by way of f32.
            [(Change::Copy(copy), 1.0)] => return dense(cast(copy.value(), dtype)),
            _ => {}
        }
        if self.nf4.is_some() || !own.iter().all(rows) {
            return dense(cast(self.with_own_values(base), dtype));
        }
        for (change, factor) in own {
            if let Change::Rows(rows) = change {
                let [a, b] = rows.factors(&base);
                terms.add(x, a, b, factor);
            }
        }
        dense(base)
    }
}

/// How the loss under a state is computed.
enum Way {
    Factored,
    Composed,
    Whole,
}

impl Way {
    fn of(state: &PeftWeight, hidden: &Tensor<3>) -> Self {
        if matches!(state.active, Active::Rows(_)) && state.is_changed() {
            return Self::Whole;
        }
        let loras = state.loras();
        let mut dora = loras.iter().filter(|(lora, _)| lora.magnitude.is_some());
        if dora.clone().next().is_none() {
            return Self::Factored;
        }
        let biased = loras.iter().any(|(lora, _)| lora.bias.is_some());
        match biased || dora.any(|(lora, _)| lora.drops(hidden)) {
            true => Self::Whole,
            false if loras.iter().any(|(lora, _)| lora.drops(hidden)) => Self::Whole,
            false => Self::Composed,
        }
    }
}

/// The loss of all logits.
fn whole(logits: Tensor<3>, labels: Vec<(usize, usize)>) -> Tensor<1> {
    let [batch, seq, vocabulary] = logits.dims();
    of_logits(logits.reshape([batch * seq, vocabulary]), labels)
}

fn dense(weight: Tensor<2>) -> HeadWeight<'static> {
    HeadWeight::Dense(match weight.dtype() {
        DType::QFloat(_) => weight.dequantize(),
        _ => weight,
    })
}

/// What the biases of `B` add to the logits.
fn shift(loras: &[(&Lora, f64)]) -> Option<Tensor<1>> {
    let shifts = loras.iter().filter_map(|(lora, weight)| {
        let shift = lora.shift()?;
        Some(shift.mul_scalar(*weight))
    });
    shifts.reduce(|sum, shift| {
        let shift = cast(shift, sum.dtype().into());
        sum + shift
    })
}

/// The labelled rows.
struct Rows {
    x: Tensor<2>,
    labels: Vec<usize>,
}

impl Rows {
    fn new(hidden: Tensor<3>, labels: Vec<(usize, usize)>) -> Self {
        let [batch, seq, features] = hidden.dims();
        let x = hidden.reshape([batch * seq, features]);
        let (positions, labels): (Vec<i64>, Vec<usize>) = labels
            .into_iter()
            .map(|(position, label)| (position as i64, label))
            .unzip();
        let count = labels.len();
        if count == batch * seq {
            return Self { x, labels };
        }
        let data = TensorData::new(positions, [count]);
        let positions = Tensor::<1, Int>::from_data(data, &x.device());
        Self {
            x: x.select(0, positions),
            labels,
        }
    }

    fn loss(
        self,
        weight: HeadWeight,
        terms: Terms,
        bias: Option<Tensor<1>>,
        chunks: &HeadChunks,
    ) -> Tensor<1> {
        let head = Head {
            weight,
            low_rank: terms.side_by_side(),
            bias,
        };
        cross_entropy(self.x, head, self.labels, chunks)
    }
}

/// Low-rank changes of the logits, `Σ u_i·B_i`.
#[derive(Default)]
struct Terms(Vec<[Tensor<2>; 2]>);

impl Terms {
    fn of_loras(x: &Tensor<2>, loras: &[(&Lora, f64)]) -> Self {
        let mut terms = Self::default();
        for (lora, weight) in loras {
            let (a, b) = lora.factors();
            let x = lora.dropout.forward(x.clone());
            terms.add(&x, a, b, weight * lora.scale());
        }
        terms
    }

    /// Adds `scale·(x·a)·b`, the first product in the dtype of `a`.
    fn add(&mut self, x: &Tensor<2>, a: Tensor<2>, b: Tensor<2>, scale: f64) {
        let x = cast(x.clone(), a.dtype().into());
        self.0.push([x.matmul(a).mul_scalar(scale), b]);
    }

    fn side_by_side(mut self) -> Option<[Tensor<2>; 2]> {
        if self.0.len() < 2 {
            return self.0.pop();
        }
        let wide = |t: Tensor<2>| match t.dtype() {
            DType::F64 => t,
            _ => cast(t, burn::tensor::FloatDType::F32),
        };
        let pairs = self.0.into_iter().map(|pair| pair.map(wide));
        let (us, bs): (Vec<_>, Vec<_>) = pairs.map(|[u, b]| (u, b)).unzip();
        Some([Tensor::cat(us, 1), Tensor::cat(bs, 0)])
    }
}
