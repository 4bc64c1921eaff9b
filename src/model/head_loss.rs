//! The log-probabilities of a head under whatever is attached to its weight, without its logits.

use burn::nn::{Embedding, Linear};
use burn::tensor::{DType, Int, Tensor, TensorData};

use super::active::Active;
use super::forward::{PeftForward, TiedHead};
use super::weight::{PeftWeight, composed_value};
use crate::adapter::{Change, Lora, cast};
use crate::fused::cross_entropy as of_logits;
use crate::head::{
    Head, HeadChunks, HeadWeight, Options, log_probs, of_logits as rows_of_logits, rows,
};
use crate::layer::weight_dims;
use crate::tensor::{matmul, reshape};

/// The output layer of a language model, whose log-probabilities are computed a chunk of rows by a chunk of the vocabulary at a time.
///
/// [`head_log_probs`](crate::objective::head_log_probs) and [`sft_head_loss`](crate::objective::sft_head_loss) are what to call.
///
/// A `Linear` is a head of its own; an `Embedding` is one that is tied, `x·Eᵀ`. The value is that of
/// [`forward_peft`](PeftForward::forward_peft), or [`attend_peft`](super::TiedHead::attend_peft), and a log-softmax. What is
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
/// | DoRA with dropout or beside a bias of `B`; rows of a batch under adapters of their own | the logits as a whole | by `forward_peft` or `attend_peft` |
///
/// Base values that an adapter brings with it (frozen) take the place of the base. Of a tied head, only what changes the head counts: see
/// [`PeftModel::with_tied_head`](super::PeftModel::with_tied_head). A weight of Burn's own quantisation is dequantised once.
pub trait HeadLoss {
    /// `[features, vocabulary]`.
    fn head_dims(&self) -> [usize; 2];

    /// The labelled rows of `hidden [batch, seq, features]`, ready to be computed. `labels` are `(position, label)` in `hidden`, row-major, in any
    /// order; a position may stand twice. Only the labelled positions are computed.
    ///
    /// # Panics
    ///
    /// If `hidden` is not of the head's features, there is no label, or one is outside of `hidden`. If rows of the batch use adapters of their
    /// own on a tied head that change the lookup and the head alike.
    fn head_rows(&self, hidden: Tensor<3>, labels: Vec<(usize, usize)>) -> HeadRows<'_>;
}

/// Labelled rows on their way through a head.
#[derive(Debug)]
pub struct HeadRows<'a>(Prepared<'a>);

#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // There is one of it at a time.
enum Prepared<'a> {
    /// Hidden states, computed in chunks.
    Chunked {
        x: Tensor<2>,
        head: Head<'a>,
        labels: Vec<usize>,
    },
    /// The logits `[batch, seq, vocabulary]`.
    Whole {
        logits: Tensor<3>,
        labels: Vec<(usize, usize)>,
    },
}

impl HeadRows<'_> {
    /// The [`rows`], `[k, rows]`.
    pub(crate) fn log_probs(self, options: &Options) -> Tensor<2> {
        match self.0 {
            Prepared::Chunked { x, head, labels } => log_probs(x, head, labels, options),
            Prepared::Whole { logits, labels } => {
                let [batch, seq, vocabulary] = logits.dims();
                let logits = reshape(logits, [batch * seq, vocabulary]);
                let (logits, labels) = selected(logits, labels);
                rows_of_logits(logits, labels, options)
            }
        }
    }

    /// `Σ −log p`, `[1]`, in f32 (f64 for f64 hidden states).
    pub(crate) fn cross_entropy(self, chunks: &HeadChunks) -> Tensor<1> {
        match self.0 {
            Prepared::Whole { logits, labels } if labels.is_sorted_by(|a, b| a.0 < b.0) => {
                let [batch, seq, vocabulary] = logits.dims();
                of_logits(reshape(logits, [batch * seq, vocabulary]), labels)
            }
            _ => {
                let values = self.log_probs(&Options::new(chunks));
                values.narrow(0, rows::LOG_PROB, 1).sum().neg()
            }
        }
    }
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

    fn head_rows(&self, hidden: Tensor<3>, labels: Vec<(usize, usize)>) -> HeadRows<'_> {
        let bias = self.bias.as_ref().map(|bias| bias.val());
        let Some(state) = self.weight.reparameterization::<PeftWeight>() else {
            let rows = Rows::new(hidden, labels);
            let Some(lora) = self.weight.adapter() else {
                return rows.of(dense(self.weight.val()), Terms::default(), bias);
            };
            let mut terms = Terms::default();
            terms.add(&rows.x, lora.a.val(), lora.b.val(), lora.scale);
            return rows.of(dense(self.weight.base()), terms, bias);
        };
        match Way::of(state, &hidden) {
            Way::Whole => whole(self.forward_peft(hidden), labels),
            Way::Composed => {
                let rows = Rows::new(hidden, labels);
                let weight = dense(composed_value(&self.weight));
                rows.of(weight, Terms::default(), bias)
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
                rows.of(weight, terms, bias)
            }
        }
    }
}

impl HeadLoss for Embedding {
    fn head_dims(&self) -> [usize; 2] {
        let [vocabulary, features] = weight_dims(&self.weight);
        [features, vocabulary]
    }

    fn head_rows(&self, hidden: Tensor<3>, labels: Vec<(usize, usize)>) -> HeadRows<'_> {
        let Some(state) = self.weight.reparameterization::<PeftWeight>() else {
            let weight = dense(self.weight.val().transpose());
            return Rows::new(hidden, labels).of(weight, Terms::default(), None);
        };
        let Some(changes) = state.head_changes() else {
            return whole(self.attend_peft(hidden), labels);
        };
        state.note_attended();
        let base = self.weight.base();
        let dtype = state.effective_dtype(base.dtype());
        if changes.has_magnitudes() {
            if changes.depends_on_input(&hidden) {
                return whole(self.attend_peft(hidden), labels);
            }
            let weight = cast(state.effective_head(base), dtype).transpose();
            return Rows::new(hidden, labels).of(dense(weight), Terms::default(), None);
        }
        let rows = Rows::new(hidden, labels);
        let old = changes.frozen(base.clone(), dtype);
        let turned = changes.base(base, dtype).transpose();
        let mut terms = Terms::of_loras(&rows.x, &changes.head);
        for (lora, factor) in &changes.both {
            // Turned: `x·(E + s·A·B)ᵀ = x·Eᵀ + s·(x·Bᵀ)·Aᵀ`.
            let (a, b) = lora.factors();
            let x = lora.dropout.forward(rows.x.clone());
            terms.add(&x, b.transpose(), a.transpose(), factor * lora.scale());
        }
        for (own, factor) in &changes.rows {
            let [a, b] = match own.is_of_head() {
                true => own.factors(&old.clone().transpose()),
                false => own.factors(&old),
            };
            terms.add(&rows.x, a, b, *factor);
        }
        rows.of(dense(turned), terms, shift(&changes.head))
    }
}

impl PeftWeight {
    /// The dense base of a head with what adapters have of their own: values instead of it, or rows as another term.
    fn own_head(&self, base: Tensor<2>, x: &Tensor<2>, terms: &mut Terms) -> HeadWeight<'static> {
        let dtype = self.effective_dtype(base.dtype());
        let changes = self.in_use().unwrap_or_default().into_iter();
        let rows = changes.filter_map(|(change, factor)| match change {
            Change::Rows(rows) => Some((rows, factor)),
            _ => None,
        });
        let rows: Vec<_> = rows.collect();
        let has_whole = self.has_whole_values();
        if (self.nf4.is_some() && !has_whole) || (!rows.is_empty() && self.has_trained_copy()) {
            return dense(self.own_base(base));
        }
        let weight = match has_whole {
            // As they are: not by way of f32.
            true => cast(self.whole_values(base), dtype),
            false => base,
        };
        for (rows, factor) in rows {
            let [a, b] = rows.factors(&weight);
            terms.add(x, a, b, factor);
        }
        dense(weight)
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

fn whole(logits: Tensor<3>, labels: Vec<(usize, usize)>) -> HeadRows<'static> {
    HeadRows(Prepared::Whole { logits, labels })
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

/// The labelled rows of `x [rows, columns]`, and their labels.
fn selected(x: Tensor<2>, labels: Vec<(usize, usize)>) -> (Tensor<2>, Vec<usize>) {
    let count = labels.len();
    let (positions, labels): (Vec<i64>, Vec<usize>) = labels
        .into_iter()
        .map(|(position, label)| (position as i64, label))
        .unzip();
    if positions.iter().copied().eq(0..x.dims()[0] as i64) {
        return (x, labels);
    }
    let data = TensorData::new(positions, [count]);
    let positions = Tensor::<1, Int>::from_data(data, &x.device());
    (x.select(0, positions), labels)
}

/// The labelled rows of hidden states.
struct Rows {
    x: Tensor<2>,
    labels: Vec<usize>,
}

impl Rows {
    fn new(hidden: Tensor<3>, labels: Vec<(usize, usize)>) -> Self {
        let [batch, seq, features] = hidden.dims();
        let (x, labels) = selected(reshape(hidden, [batch * seq, features]), labels);
        Self { x, labels }
    }

    fn of<'a>(self, weight: HeadWeight<'a>, terms: Terms, bias: Option<Tensor<1>>) -> HeadRows<'a> {
        let head = Head {
            weight,
            low_rank: terms.side_by_side(),
            bias,
        };
        HeadRows(Prepared::Chunked {
            x: self.x,
            head,
            labels: self.labels,
        })
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
        self.0.push([matmul(x, a).mul_scalar(scale), b]);
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
