//! The same of Burn's own operations, for every backend and dtype.
//!
//! A composition that autodiff differentiates would keep all logits. Here the gradients for `dy = 1` are computed in the forward
//! pass, on constants, chunk by chunk, and `L + Σ_t (⟨t, g_t⟩ − const)` has them as its own: the value of the sum is `L` to the
//! bit, since what is added is a number less itself.

use std::ops::Range;

use burn::tensor::{FloatDType, Int, Tensor, TensorData};

use super::{Head, HeadChunks, HeadWeight, wide};
use crate::tensor::{cast, constant, matmul};

pub(super) fn cross_entropy(
    x: Tensor<2>,
    head: Head,
    labels: &[usize],
    chunks: &HeadChunks,
) -> Tensor<1> {
    let tracked = Tracked {
        x: x.clone(),
        weight: match &head.weight {
            HeadWeight::Dense(weight) => Some(weight.clone()),
            HeadWeight::Nf4(_) => None,
        },
        low_rank: head.low_rank.clone(),
        bias: head.bias.clone(),
    };
    let step = match &head.weight {
        HeadWeight::Dense(_) => 1,
        HeadWeight::Nf4(weight) => weight.whole_rows(),
    };
    let constants = Constants {
        dtype: wide(&x),
        x: constant(x),
        head: Head {
            weight: match head.weight {
                HeadWeight::Dense(weight) => HeadWeight::Dense(constant(weight)),
                packed => packed,
            },
            low_rank: head.low_rank.map(|pair| pair.map(constant)),
            bias: head.bias.map(constant),
        },
        labels,
        rows: chunks.rows(),
        tokens: chunks.vocabulary().next_multiple_of(step),
    };
    let (loss, largest, sum) = constants.forward();
    debug_assert!(!loss.is_tracked(), "a chunk of logits would be kept");
    match tracked.any() {
        true => tracked.with_gradients(loss, &constants, largest, sum),
        false => loss,
    }
}

struct Constants<'a> {
    dtype: FloatDType,
    x: Tensor<2>,
    head: Head<'a>,
    labels: &'a [usize],
    rows: usize,
    tokens: usize,
}

impl Constants<'_> {
    fn row_chunks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        parts(self.labels.len(), self.rows)
    }

    fn token_chunks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let [_, vocabulary] = self.head.dims();
        parts(vocabulary, self.tokens)
    }

    /// `W` of these tokens, `[features, width]`, in the dtype of `x` or the wider one of both.
    fn weight(&self, tokens: &Range<usize>) -> Tensor<2> {
        let dtype = FloatDType::from(self.x.dtype());
        match &self.head.weight {
            HeadWeight::Nf4(weight) => weight.dequantize_rows(tokens.clone(), dtype).transpose(),
            HeadWeight::Dense(weight) => {
                let weight = narrow(weight, 1, tokens);
                match weight.dtype() == self.x.dtype() {
                    true => weight,
                    false => cast(weight, self.dtype),
                }
            }
        }
    }

    fn x(&self, rows: &Range<usize>, like: &Tensor<2>) -> Tensor<2> {
        cast(narrow(&self.x, 0, rows), like.dtype().into())
    }

    /// The logits of a chunk, `[rows, width]`.
    fn logits(&self, rows: &Range<usize>, tokens: &Range<usize>) -> Tensor<2> {
        let weight = self.weight(tokens);
        let mut z = cast(matmul(self.x(rows, &weight), weight), self.dtype);
        if let Some([u, b]) = &self.head.low_rank {
            z = z + matmul(narrow(u, 0, rows), narrow(b, 1, tokens));
        }
        match &self.head.bias {
            Some(bias) => {
                z + bias
                    .clone()
                    .narrow(0, tokens.start, tokens.len())
                    .unsqueeze()
            }
            None => z,
        }
    }

    /// The labels of these rows, `[rows, 1]`, counted from `first` on.
    fn labels(&self, rows: &Range<usize>, first: usize) -> Tensor<2, Int> {
        let labels = self.labels[rows.clone()].iter();
        let labels: Vec<i64> = labels.map(|&label| label as i64 - first as i64).collect();
        let data = TensorData::new(labels, [rows.len(), 1]);
        Tensor::from_data(data, &self.x.device())
    }

    /// The loss; of each row its largest logit, and the sum of `e^(z − largest)`.
    fn forward(&self) -> (Tensor<1>, Vec<Tensor<2>>, Vec<Tensor<2>>) {
        let mut loss: Option<Tensor<1>> = None;
        let (mut all_largest, mut all_sums) = (Vec::new(), Vec::new());
        for rows in self.row_chunks() {
            let mut seen: Option<[Tensor<2>; 3]> = None;
            for tokens in self.token_chunks() {
                let z = self.logits(&rows, &tokens);
                let largest = z.clone().max_dim(1);
                let labels = self.labels(&rows, tokens.start);
                let width = tokens.len() as i64;
                let elsewhere = labels
                    .clone()
                    .lower_elem(0)
                    .bool_or(labels.clone().greater_equal_elem(width));
                let label = z.clone().gather(1, labels.clamp(0, width - 1));
                let [before, sum_before, label_before] = match seen {
                    Some(seen) => seen,
                    None => {
                        let zeros = largest.zeros_like();
                        [largest.clone(), zeros, label.clone()]
                    }
                };
                let label = label.mask_where(elsewhere, label_before);
                let largest = largest.max_pair(before.clone());
                // While no token has had any probability, nothing has been summed, and the difference of infinities is no number.
                let nothing = largest.clone().equal_elem(f64::NEG_INFINITY);
                let from = largest.clone().mask_fill(nothing, 0.0);
                let sum = (z - from.clone()).exp().sum_dim(1);
                let sum = sum + sum_before * (before - from).exp();
                seen = Some([largest, sum, label]);
            }
            let [largest, sum, label] = seen.expect("a vocabulary");
            let cost = (largest.clone() - label + sum.clone().log()).sum();
            loss = Some(match loss {
                Some(loss) => loss + cost,
                None => cost,
            });
            all_largest.push(largest);
            all_sums.push(sum);
        }
        (loss.expect("a row"), all_largest, all_sums)
    }
}

/// What a gradient may be asked of.
struct Tracked {
    x: Tensor<2>,
    weight: Option<Tensor<2>>,
    low_rank: Option<[Tensor<2>; 2]>,
    bias: Option<Tensor<1>>,
}

impl Tracked {
    fn any(&self) -> bool {
        let factors = self.low_rank.iter().flatten();
        self.x.is_tracked()
            || self.weight.as_ref().is_some_and(Tensor::is_tracked)
            || factors.into_iter().any(Tensor::is_tracked)
            || self.bias.as_ref().is_some_and(Tensor::is_tracked)
    }

    fn with_gradients(
        self,
        loss: Tensor<1>,
        constants: &Constants,
        largest: Vec<Tensor<2>>,
        sums: Vec<Tensor<2>>,
    ) -> Tensor<1> {
        let zeros = |t: &Tensor<2>| Tensor::<2>::zeros(t.dims(), (&t.device(), t.dtype()));
        let tracked = |t: &Tensor<2>| t.is_tracked().then(|| zeros(t));
        let mut dx = Vec::new();
        let mut du = Vec::new();
        let [u, b] = match &constants.head.low_rank {
            Some([u, b]) => [Some(u), Some(b)],
            None => [None, None],
        };
        let mut dw = self.weight.as_ref().and_then(tracked);
        let mut db = self.low_rank.as_ref().and_then(|[_, b]| tracked(b));
        let mut d_bias = self
            .bias
            .as_ref()
            .filter(|bias| bias.is_tracked())
            .map(|bias| Tensor::<2>::zeros([1, bias.dims()[0]], (&bias.device(), bias.dtype())));
        for ((rows, largest), sum) in constants.row_chunks().zip(largest).zip(sums) {
            let (mut dx_rows, mut du_rows) = (None, None);
            for tokens in constants.token_chunks() {
                let z = constants.logits(&rows, &tokens);
                let p = (z - largest.clone()).exp() / sum.clone();
                let dz = less_labels(p, constants.labels(&rows, tokens.start));
                let weight = constants.weight(&tokens);
                let rounded = cast(dz.clone(), weight.dtype().into());
                if let Some(dw) = &mut dw {
                    let x = constants.x(&rows, &weight);
                    let part = matmul(x.transpose(), rounded.clone());
                    add_columns(dw, &tokens, part);
                }
                if self.x.is_tracked() {
                    let part = matmul(rounded, weight.transpose());
                    let part = cast(part, constants.dtype);
                    dx_rows = plus(dx_rows, part);
                }
                if let (Some(u), Some(b)) = (u, b) {
                    let b = narrow(b, 1, &tokens);
                    du_rows = plus(du_rows, matmul(dz.clone(), b.transpose()));
                    if let Some(db) = &mut db {
                        let part = matmul(narrow(u, 0, &rows).transpose(), dz.clone());
                        add_columns(db, &tokens, part);
                    }
                }
                if let Some(d_bias) = &mut d_bias {
                    add_columns(d_bias, &tokens, dz.sum_dim(0));
                }
            }
            dx.extend(dx_rows.map(|part| cast(part, self.x.dtype().into())));
            du.extend(du_rows);
        }
        let whole = |parts: Vec<Tensor<2>>| match parts.is_empty() {
            true => None,
            false => Some(Tensor::cat(parts, 0)),
        };
        let wide = FloatDType::from(loss.dtype());
        // A weight is not widened whole: the gradient of the loss is rounded to its dtype before the product.
        let narrow = self.weight.as_ref().map_or(wide, |w| w.dtype().into());
        let mut pairs = vec![(Some(self.x), whole(dx), wide), (self.weight, dw, narrow)];
        if let Some([u, b]) = self.low_rank {
            pairs.extend([(Some(u), whole(du), wide), (Some(b), db, wide)]);
        }
        pairs.push((self.bias.map(Tensor::unsqueeze), d_bias, wide));
        pairs.into_iter().fold(loss, |loss, pair| match pair {
            (Some(tensor), Some(gradient), dtype) if tensor.is_tracked() => {
                loss + cast(attach(tensor, gradient, dtype), wide)
            }
            _ => loss,
        })
    }
}

/// Zero, with a gradient of the tensor that is `gradient` times that of the zero, in a product of this dtype. Of an infinite value, such as
/// a bias that rules a token out, the gradient is zero.
fn attach(tensor: Tensor<2>, gradient: Tensor<2>, dtype: FloatDType) -> Tensor<1> {
    // A finite number less itself is zero, and the product with it too.
    let infinite = constant(tensor.clone()).is_finite().bool_not();
    let tensor = tensor.mask_fill(infinite, 0.0);
    let zero = tensor.clone() - constant(tensor);
    (cast(zero, dtype) * cast(gradient, dtype)).sum()
}

/// `dz` of `p`: one less at each row's label, if it is among the columns.
fn less_labels(p: Tensor<2>, labels: Tensor<2, Int>) -> Tensor<2> {
    let [rows, width] = p.dims();
    let columns = Tensor::<1, Int>::arange(0..width as i64, &p.device());
    let at = columns.unsqueeze::<2>().expand([rows, width]);
    let at = at.equal(labels.expand([rows, width]));
    p.clone() - at.float().cast(p.dtype())
}

fn plus(sum: Option<Tensor<2>>, part: Tensor<2>) -> Option<Tensor<2>> {
    Some(match sum {
        Some(sum) => sum + part,
        None => part,
    })
}

/// Adds to some columns, in place where the backend does so.
fn add_columns(to: &mut Tensor<2>, columns: &Range<usize>, part: Tensor<2>) {
    let [rows, _] = to.dims();
    let old = narrow(to, 1, columns);
    let sum = old + cast(part, to.dtype().into());
    let device = to.device();
    let owned = std::mem::replace(to, Tensor::empty([0, 0], &device));
    *to = owned.slice_assign([0..rows, columns.clone()], sum);
}

fn narrow(tensor: &Tensor<2>, axis: usize, range: &Range<usize>) -> Tensor<2> {
    tensor.clone().narrow(axis, range.start, range.len())
}

fn parts(len: usize, most: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    (0..len)
        .step_by(most)
        .map(move |first| first..len.min(first + most))
}
