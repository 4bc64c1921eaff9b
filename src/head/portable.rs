//! The same of a backend's own operations, for every backend and dtype. It is also what the kernels are tested against.

use std::ops::Range;

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor, tensor::IntTensor};
use burn::tensor::{FloatDType, IndexingUpdateOp, Shape, Slice, TensorData};

use super::ops::{Operands, Wanted, Weight};
use super::rows;
use crate::nf4::Nf4Ops;
use crate::nf4::portable::{cast, float_dtype, matmul};

/// Below any logarithm of a positive probability, in f64 too. Times a probability of zero it is zero, which −∞ is not.
const LEAST_LOG: f64 = -1e4;
/// Below any finite logit.
const LEAST: f64 = f32::MIN as f64;

pub(super) fn forward<B: Nf4Ops>(operands: &Operands<B>) -> FloatTensor<B> {
    let chunks = operands.row_chunks();
    let parts = chunks.map(|rows| operands.values_of(&rows)).collect();
    B::float_transpose(B::float_cat(parts, 0))
}

pub(super) fn backward<B: Nf4Ops>(
    operands: &Operands<B>,
    values: FloatTensor<B>,
    dy: FloatTensor<B>,
    wanted: Wanted,
) -> [Option<FloatTensor<B>>; 5] {
    let wide = operands.wide();
    let zeros = |like: &FloatTensor<B>| {
        B::float_zeros(like.shape(), &like.device(), float_dtype::<B>(like))
    };
    let mut sums = Sums::<B> {
        x: Vec::new(),
        weight: match &operands.weight {
            Weight::Dense(weight) if wanted[1] => Some(zeros(weight)),
            _ => None,
        },
        u: Vec::new(),
        b: operands
            .low_rank
            .as_ref()
            .filter(|_| wanted[3])
            .map(|[_, b]| zeros(b)),
        bias: operands.bias.as_ref().filter(|_| wanted[4]).map(|bias| {
            let [vocabulary] = bias.shape().dims();
            B::float_zeros(
                [1, vocabulary].into(),
                &bias.device(),
                float_dtype::<B>(bias),
            )
        }),
    };
    for rows in operands.row_chunks() {
        let column = |of: &FloatTensor<B>, place: usize| {
            let line = [Slice::from(place..place + 1), Slice::from(rows.clone())];
            B::float_reshape(B::float_slice(of.clone(), &line), [rows.len(), 1].into())
        };
        operands.add_gradients(
            &rows,
            |place| column(&values, place),
            |place| column(&dy, place),
            wanted,
            &mut sums,
        );
    }
    let whole = |parts: Vec<FloatTensor<B>>, dtype: FloatDType| {
        (!parts.is_empty()).then(|| cast::<B>(B::float_cat(parts, 0), dtype))
    };
    let bias = sums.bias.map(|bias| {
        let [_, vocabulary] = bias.shape().dims();
        B::float_reshape(bias, [vocabulary].into())
    });
    [
        whole(sums.x, float_dtype::<B>(&operands.x)),
        sums.weight,
        whole(sums.u, wide),
        sums.b,
        bias,
    ]
}

/// Gradients as they grow: of `x` and `u` chunks of rows, of the others the whole.
struct Sums<B: Backend> {
    x: Vec<FloatTensor<B>>,
    weight: Option<FloatTensor<B>>,
    u: Vec<FloatTensor<B>>,
    b: Option<FloatTensor<B>>,
    bias: Option<FloatTensor<B>>,
}

impl<B: Nf4Ops> Operands<B> {
    /// What sums are computed in: f64 for an f64 `x`, else f32.
    fn wide(&self) -> FloatDType {
        match float_dtype::<B>(&self.x) {
            FloatDType::F64 => FloatDType::F64,
            _ => FloatDType::F32,
        }
    }

    pub(super) fn vocabulary(&self) -> usize {
        match &self.weight {
            Weight::Dense(weight) => weight.shape()[1],
            Weight::Nf4(weight) => weight.shape[0],
        }
    }

    fn row_chunks(&self) -> impl Iterator<Item = Range<usize>> + use<B> {
        parts(self.asked.labels.len(), self.asked.chunks.rows())
    }

    /// Chunks of the vocabulary; those of a packed weight begin with whole blocks and words.
    fn token_chunks(&self) -> impl Iterator<Item = Range<usize>> + use<B> {
        let step = match &self.weight {
            Weight::Dense(_) => 1,
            Weight::Nf4(weight) => weight.whole_rows(),
        };
        let most = self.asked.chunks.vocabulary().next_multiple_of(step);
        parts(self.vocabulary(), most)
    }

    /// `W` of these tokens, `[features, width]`, in the dtype of `x` or the wider one of both.
    fn weight_of(&self, tokens: &Range<usize>) -> FloatTensor<B> {
        let dtype = float_dtype::<B>(&self.x);
        match &self.weight {
            Weight::Nf4(weight) => {
                B::float_transpose(B::nf4_dequantize(weight.rows(tokens.clone()), dtype))
            }
            Weight::Dense(weight) => {
                let weight = narrow::<B>(weight, 1, tokens);
                match float_dtype::<B>(&weight) == dtype {
                    true => weight,
                    false => cast::<B>(weight, self.wide()),
                }
            }
        }
    }

    fn x_of(&self, rows: &Range<usize>, like: &FloatTensor<B>) -> FloatTensor<B> {
        cast::<B>(narrow::<B>(&self.x, 0, rows), float_dtype::<B>(like))
    }

    /// The logits of a chunk, `[rows, width]`, divided by the temperature.
    fn logits(&self, rows: &Range<usize>, tokens: &Range<usize>) -> FloatTensor<B> {
        let weight = self.weight_of(tokens);
        let z = matmul::<B>(self.x_of(rows, &weight), weight);
        let mut z = cast::<B>(z, self.wide());
        if let Some([u, b]) = &self.low_rank {
            let low = matmul::<B>(narrow::<B>(u, 0, rows), narrow::<B>(b, 1, tokens));
            z = B::float_add(z, low);
        }
        if let Some(bias) = &self.bias {
            let bias = B::float_slice(bias.clone(), &[Slice::from(tokens.clone())]);
            let bias = B::float_reshape(bias, [1, tokens.len()].into());
            z = B::float_add(z, bias);
        }
        self.cooled(z)
    }

    /// `x / T`.
    fn cooled(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        match self.asked.temperature == 1.0 {
            true => x,
            false => B::float_mul_scalar(x, (1.0 / self.asked.temperature).into()),
        }
    }

    /// Of these rows, the places of their labels among these tokens, `[rows, 1]`, and which of the rows have theirs among them.
    fn labels_of(&self, rows: &Range<usize>, tokens: &Range<usize>) -> (IntTensor<B>, Vec<bool>) {
        let labels = &self.asked.labels[rows.clone()];
        let places: Vec<i32> = labels
            .iter()
            .map(|&label| label.clamp(tokens.start, tokens.end - 1) - tokens.start)
            .map(|place| place as i32)
            .collect();
        let data = TensorData::new(places, [rows.len(), 1]);
        let here = labels.iter().map(|label| tokens.contains(label)).collect();
        (B::int_from_data(data, &self.x.device()), here)
    }

    /// The [`rows`] of a chunk, `[rows, k]`.
    fn values_of(&self, rows: &Range<usize>) -> FloatTensor<B> {
        let (device, wide) = (self.x.device(), self.wide());
        let column =
            |value: f64| B::float_full([rows.len(), 1].into(), value.into(), &device, wide);
        let add = |a, b| B::float_add(a, b);
        let mut largest = column(f64::NEG_INFINITY);
        let [mut sum, mut label, mut weighted, mut squares, mut plain] = [0.0; 5].map(column);
        for tokens in self.token_chunks() {
            let z = self.logits(rows, &tokens);
            let here = B::float_max_dim(z.clone(), 1);
            let new = B::float_max_dim(B::float_cat(vec![largest.clone(), here], 1), 1);
            // While no token has had any probability, the difference of infinities would be no number.
            let from = B::float_clamp_min(new.clone(), LEAST.into());
            let shift = B::float_sub(largest, from.clone());
            let kept = B::float_exp(shift.clone());
            let less = B::float_sub(z.clone(), from);
            let e = B::float_exp(less.clone());
            if self.asked.statistics {
                let shift = B::float_clamp_min(shift, LEAST.into());
                let old = B::float_mul(shift.clone(), sum.clone());
                let old = B::float_mul(add(weighted, old), kept.clone());
                let bounded = B::float_clamp_min(less.clone(), LEAST_LOG.into());
                let part = B::float_sum_dim(B::float_mul(e.clone(), bounded), 1);
                weighted = add(old, part);
                let old = B::float_mul(squares, B::float_mul(kept.clone(), kept.clone()));
                squares = add(old, B::float_sum_dim(B::float_mul(e.clone(), e.clone()), 1));
                let old = B::float_mul_scalar(shift, (tokens.start as f64).into());
                plain = add(add(plain, old), B::float_sum_dim(less, 1));
            }
            sum = add(B::float_mul(sum, kept), B::float_sum_dim(e, 1));
            let (places, is_here) = self.labels_of(rows, &tokens);
            if is_here.contains(&true) {
                let mask = B::bool_from_data(TensorData::new(is_here, [rows.len(), 1]), &device);
                label = B::float_mask_where(label, mask, B::float_gather(1, z, places));
            }
            largest = new;
        }
        let log = B::float_log(sum.clone());
        let distance = B::float_sub(label, largest.clone());
        let mut columns = vec![
            B::float_sub(distance.clone(), log.clone()),
            largest,
            sum.clone(),
        ];
        if self.asked.statistics {
            let mean = B::float_mul_scalar(plain, (1.0 / self.vocabulary() as f64).into());
            let double = B::float_mul_scalar(log.clone(), 2.0.into());
            columns.extend([
                B::float_sub(log.clone(), B::float_div(weighted, sum)),
                B::float_sub(mean, log),
                B::float_sub(B::float_log(squares), double),
                // The distance is zero or less.
                B::float_add_scalar(B::float_sign(distance), 1.0.into()),
            ]);
        }
        B::float_cat(columns, 1)
    }

    /// Adds what some rows give, whose values and gradients come in columns.
    fn add_gradients(
        &self,
        rows: &Range<usize>,
        value: impl Fn(usize) -> FloatTensor<B>,
        dy: impl Fn(usize) -> FloatTensor<B>,
        wanted: Wanted,
        sums: &mut Sums<B>,
    ) {
        let (device, wide) = (self.x.device(), self.wide());
        let sum = value(rows::SUM);
        let from = B::float_clamp_min(value(rows::LARGEST), LEAST.into());
        let log = B::float_log(sum.clone());
        let (mut dx, mut du) = (None, None);
        for tokens in self.token_chunks() {
            let less = B::float_sub(self.logits(rows, &tokens), from.clone());
            let p = B::float_div(B::float_exp(less.clone()), sum.clone());
            let mut dz = if self.asked.statistics {
                let log_p = B::float_clamp_min(less, LEAST_LOG.into());
                let log_p = B::float_sub(log_p, log.clone());
                let entropy = B::float_add(log_p, value(rows::ENTROPY));
                let entropy = B::float_mul(entropy, dy(rows::ENTROPY));
                let constant = B::float_add(dy(rows::LOG_PROB), dy(rows::MEAN));
                let all = B::float_mul(p, B::float_add(entropy, constant));
                let share = 1.0 / self.vocabulary() as f64;
                let even = B::float_mul_scalar(dy(rows::MEAN), share.into());
                B::float_sub(even, all)
            } else {
                B::float_neg(B::float_mul(p, dy(rows::LOG_PROB)))
            };
            let (places, is_here) = self.labels_of(rows, &tokens);
            if is_here.contains(&true) {
                let is_here: Vec<f32> = is_here.iter().map(|&is| f32::from(u8::from(is))).collect();
                let data = TensorData::new(is_here, [rows.len(), 1]);
                let mask = cast::<B>(B::float_from_data(data, &device), wide);
                let own = B::float_mul(dy(rows::LOG_PROB), mask);
                dz = B::float_scatter(1, dz, places, own, IndexingUpdateOp::Add);
            }
            let dz = self.cooled(dz);
            let weight = self.weight_of(&tokens);
            let rounded = cast::<B>(dz.clone(), float_dtype::<B>(&weight));
            if let Some(sum) = &mut sums.weight {
                let x = B::float_transpose(self.x_of(rows, &weight));
                add_columns::<B>(sum, &tokens, matmul::<B>(x, rounded.clone()));
            }
            if wanted[0] {
                let part = matmul::<B>(rounded, B::float_transpose(weight));
                plus::<B>(&mut dx, cast::<B>(part, wide));
            }
            if let Some([u, b]) = &self.low_rank {
                if wanted[2] {
                    let b = B::float_transpose(narrow::<B>(b, 1, &tokens));
                    plus::<B>(&mut du, matmul::<B>(dz.clone(), b));
                }
                if let Some(sum) = &mut sums.b {
                    let u = B::float_transpose(narrow::<B>(u, 0, rows));
                    add_columns::<B>(sum, &tokens, matmul::<B>(u, dz.clone()));
                }
            }
            if let Some(sum) = &mut sums.bias {
                add_columns::<B>(sum, &tokens, B::float_sum_dim(dz, 0));
            }
        }
        sums.x.extend(dx);
        sums.u.extend(du);
    }
}

fn plus<B: Backend>(sum: &mut Option<FloatTensor<B>>, part: FloatTensor<B>) {
    *sum = Some(match sum.take() {
        Some(sum) => B::float_add(sum, part),
        None => part,
    });
}

/// Adds to some columns, in place where the backend does so.
fn add_columns<B: Backend>(to: &mut FloatTensor<B>, columns: &Range<usize>, part: FloatTensor<B>) {
    let shape: Shape = to.shape();
    let sum = B::float_add(
        narrow::<B>(to, 1, columns),
        cast::<B>(part, float_dtype::<B>(to)),
    );
    let nothing = B::float_empty([0].into(), &to.device(), float_dtype::<B>(to));
    let owned = std::mem::replace(to, nothing);
    let place = [Slice::from(0..shape[0]), Slice::from(columns.clone())];
    *to = B::float_slice_assign(owned, &place, sum);
}

fn narrow<B: Backend>(
    tensor: &FloatTensor<B>,
    axis: usize,
    range: &Range<usize>,
) -> FloatTensor<B> {
    let shape = tensor.shape();
    let mut place = [Slice::from(0..shape[0]), Slice::from(0..shape[1])];
    place[axis] = Slice::from(range.clone());
    B::float_slice(tensor.clone(), &place)
}

fn parts(len: usize, most: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    (0..len)
        .step_by(most)
        .map(move |first| first..len.min(first + most))
}
