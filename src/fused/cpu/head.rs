//! A head and its log-probabilities, `log softmax((x·W + u·B + b)/T)[label]`, a chunk of rows by a chunk of the vocabulary at a time.
//!
//! Forward brings [`Running`] sums of each row up to date with each chunk. Backward computes the logits of a chunk again, turns them into
//! `dz` in place ([`differentiate`]), and adds what follows: `dx += dz·Wᵀ`, `du += dz·Bᵀ`, `dB = uᵀ·dz`, `db = Σ dz`, `dW = xᵀ·dz`.

use std::borrow::Cow;
use std::ops::Range;

use super::log_probs::{Running, Upstream, differentiate, extend};
use crate::cpu::matmul::dense::Dense;
use crate::cpu::matmul::element::Element;
use crate::cpu::matmul::factor::Factor;
use crate::cpu::matmul::low_rank::LowRank;
use crate::cpu::matmul::skinny;
use crate::cpu::matmul::target::Target;
use crate::cpu::matmul::window::Window;
use crate::cpu::matmul::{Source, many_rows, transposed};
use crate::cpu::output::written;
use crate::cpu::parallel::for_each_chunk;
use crate::cpu::simd::Isa;
use crate::cpu::value::Value;

/// A head over a weight of any kind.
pub(crate) struct Head<'a, W> {
    pub(crate) isa: Isa,
    pub(crate) weight: W,
    /// Whether the weight is held as `[vocabulary, features]`, or as `[features, vocabulary]`.
    pub(crate) by_token: bool,
    pub(crate) features: usize,
    pub(crate) vocabulary: usize,
    /// `B [r, vocabulary]`.
    pub(crate) b: Factor<'a>,
    /// `[vocabulary]`, or nothing.
    pub(crate) bias: &'a [f32],
    /// Rows and tokens of the vocabulary at a time.
    pub(crate) chunks: [usize; 2],
    /// `1/T`, which multiplies the logits.
    pub(crate) inverse_temperature: f32,
}

/// What goes through a head: rows `x [rows, features]`, `u [rows, r]`, and each row's label.
pub(crate) struct Inputs<'a, V> {
    pub(crate) x: &'a [V],
    pub(crate) u: &'a [f32],
    pub(crate) labels: &'a [usize],
}

/// Some rows of it: `x` in the dtype of an arithmetic, `u`, labels.
type Part<'a, T> = (Cow<'a, [T]>, &'a [f32], &'a [usize]);

/// Gradients, zeros to begin with, or empty where none is wanted; that of the weight as the weight is held.
pub(crate) struct Gradients<'a, V, G> {
    pub(crate) x: &'a mut [V],
    pub(crate) u: &'a mut [f32],
    /// `[r, vocabulary]`.
    pub(crate) b: &'a mut [f32],
    pub(crate) bias: &'a mut [f32],
    pub(crate) weight: &'a mut [G],
}

impl<W> Head<'_, W> {
    /// What is known of each row; of its statistics too, if they are asked for.
    pub(crate) fn forward<E: Element, V: Value>(
        &self,
        inputs: &Inputs<V>,
        statistics: bool,
    ) -> Vec<Running>
    where
        W: Source<E>,
    {
        let mut running = vec![Running::EMPTY; inputs.labels.len()];
        let mut tile = self.tile(running.len());
        for rows in parts(running.len(), self.chunks[0]) {
            let (x, u, labels) = self.part::<E, V>(inputs, &rows);
            for tokens in parts(self.vocabulary, self.chunks[1]) {
                let z = &mut tile[..rows.len() * tokens.len()];
                self.logits::<E>(&x, u, &self.factor(&tokens), &tokens, z);
                let (running, width) = (&mut running[rows.clone()], tokens.len());
                extend(
                    self.isa,
                    z,
                    width,
                    tokens.start,
                    labels,
                    running,
                    statistics,
                );
            }
        }
        running
    }

    /// The gradients for those that come to each row.
    pub(crate) fn backward<E: Element, V: Value, G: Value>(
        &self,
        inputs: &Inputs<V>,
        upstream: &[Upstream],
        gradients: &mut Gradients<V, G>,
    ) where
        W: Source<E>,
        for<'b> Dense<'b, E::Value>: Source<E>,
    {
        let (features, [rank, _]) = (self.features, self.b.shape());
        let mut tile = self.tile(upstream.len());
        for rows in parts(upstream.len(), self.chunks[0]) {
            let (x, u, labels) = self.part::<E, V>(inputs, &rows);
            let whole = rows.len().next_multiple_of(E::PER_WORD);
            let outer = match gradients.weight.is_empty() {
                true => None,
                false => Some(Outer::new(&x, [rows.len(), whole, features], self.by_token)),
            };
            let mut dx = match gradients.x.is_empty() {
                true => None,
                false => Some(Sums::new(&mut gradients.x[times(&rows, features)])),
            };
            for tokens in parts(self.vocabulary, self.chunks[1]) {
                let width = tokens.len();
                let z = &mut tile[..rows.len() * width];
                let b = self.factor(&tokens);
                self.logits::<E>(&x, u, &b, &tokens, z);
                let (upstream, scale) = (&upstream[rows.clone()], self.inverse_temperature);
                differentiate(self.isa, z, width, tokens.start, labels, upstream, scale);
                let z = &*z;
                if !gradients.bias.is_empty() {
                    let bias = &mut gradients.bias[tokens.clone()];
                    z.chunks_exact(width).for_each(|z| add(bias, z));
                }
                if !gradients.u.is_empty() {
                    let b = Factor::row_major(&b, [rank, width]).transposed();
                    let write = |[out]: [&mut [_]; 1]| skinny::to_rank(self.isa, z, b, 1.0, out);
                    // SAFETY: all is written.
                    let [du] = unsafe { written([rows.len() * rank], write) };
                    add(&mut gradients.u[times(&rows, rank)], &du);
                }
                if !gradients.b.is_empty() {
                    let write = |[out]: [&mut [_]; 1]| {
                        skinny::over_rows(self.isa, u, z, rank, false, out);
                    };
                    // SAFETY: all is written.
                    let [db] = unsafe { written([rank * width], write) };
                    let all = gradients.b.chunks_exact_mut(self.vocabulary);
                    for (all, db) in all.zip(db.chunks_exact(width)) {
                        add(&mut all[tokens.clone()], db);
                    }
                }
                if dx.is_none() && outer.is_none() {
                    continue;
                }
                let dz = padded::<E>(z, whole * width);
                if let Some(dx) = &mut dx {
                    let dz = &dz[..rows.len() * width];
                    let target = Target::window(dx.values(), features, 0..features, true);
                    self.towards_rows::<E>(dz, &tokens, target);
                }
                if let Some(outer) = &outer {
                    let add = rows.start > 0;
                    let (values, stride, columns) = match self.by_token {
                        true => {
                            let own = &mut gradients.weight[times(&tokens, features)];
                            (own, features, 0..features)
                        }
                        false => (&mut *gradients.weight, self.vocabulary, tokens),
                    };
                    let target = Target::window(values, stride, columns, add);
                    outer.product::<E, G>(self.isa, &dz, [whole, width], target);
                }
            }
            if let Some(dx) = dx {
                dx.round();
            }
        }
    }

    fn tile(&self, rows: usize) -> Vec<f32> {
        vec![0.0; rows.min(self.chunks[0]) * self.vocabulary.min(self.chunks[1])]
    }

    fn part<'a, E: Element, V: Value>(
        &self,
        inputs: &Inputs<'a, V>,
        rows: &Range<usize>,
    ) -> Part<'a, E::Value> {
        let x = &inputs.x[times(rows, self.features)];
        let [rank, _] = self.b.shape();
        let u = &inputs.u[times(rows, rank)];
        (as_elements::<E, V>(x), u, &inputs.labels[rows.clone()])
    }

    /// These columns of `B`, `[r, width]`.
    fn factor(&self, tokens: &Range<usize>) -> Vec<f32> {
        let [rank, _] = self.b.shape();
        let row = |p: usize| tokens.clone().map(move |token| self.b.at(p, token));
        (0..rank).flat_map(row).collect()
    }

    /// `(x·W + u·B + b)/T` of these tokens.
    fn logits<E: Element>(
        &self,
        x: &[E::Value],
        u: &[f32],
        b: &[f32],
        tokens: &Range<usize>,
        z: &mut [f32],
    ) where
        W: Source<E>,
    {
        let (weight, width) = (self.window(tokens), tokens.len());
        let [rank, _] = self.b.shape();
        let low = LowRank { rank, u, v: b };
        let target = Target::window(z, width, 0..width, false);
        match self.by_token {
            true => many_rows::product_to::<E, _, _>(self.isa, weight, x, low, target),
            false => transposed::product_to::<E, _, _>(self.isa, weight, x, low, target),
        }
        if !self.bias.is_empty() {
            let bias = &self.bias[tokens.clone()];
            for_each_chunk(z, width, z.len(), |_, z| add(z, bias));
        }
        if self.inverse_temperature != 1.0 {
            let scale = self.inverse_temperature;
            for_each_chunk(z, width, z.len(), |_, z| {
                z.iter_mut().for_each(|z| *z *= scale)
            });
        }
    }

    /// `dz·Wᵀ`, of these tokens' columns.
    fn towards_rows<E: Element>(&self, dz: &[E::Value], tokens: &Range<usize>, target: Target<f32>)
    where
        W: Source<E>,
    {
        let (weight, low) = (self.window(tokens), LowRank::NONE);
        match self.by_token {
            true => transposed::product_to::<E, _, _>(self.isa, weight, dz, low, target),
            false => many_rows::product_to::<E, _, _>(self.isa, weight, dz, low, target),
        }
    }

    fn window(&self, tokens: &Range<usize>) -> Window<W>
    where
        W: Copy,
    {
        let (features, vocabulary, tokens) = (self.features, self.vocabulary, tokens.clone());
        match self.by_token {
            true => Window::new(self.weight, [vocabulary, features], tokens, 0..features),
            false => Window::new(self.weight, [features, vocabulary], 0..features, tokens),
        }
    }
}

/// `xᵀ·dz`, the part of the weight's gradient that some rows give, laid out as the weight is.
struct Outer<'a, T: Clone> {
    /// `x [whole rows, features]`, or `xᵀ [features, whole rows]`.
    x: Cow<'a, [T]>,
    features: usize,
    by_token: bool,
}

impl<'a, T: Value> Outer<'a, T> {
    /// `x [rows, features]`, filled up with zeros to whole words of rows.
    fn new(x: &'a [T], [rows, whole, features]: [usize; 3], by_token: bool) -> Self {
        let x = match by_token {
            true if whole == rows => Cow::Borrowed(x),
            true => {
                let mut filled = x.to_vec();
                filled.resize(whole * features, T::zeroed());
                Cow::Owned(filled)
            }
            false => Cow::Owned(turned(x, [rows, whole, features])),
        };
        Self {
            x,
            features,
            by_token,
        }
    }

    /// `dz` is `[whole rows, width]`.
    fn product<E: Element<Value = T>, G: Value>(
        &self,
        isa: Isa,
        dz: &[T],
        [whole, width]: [usize; 2],
        target: Target<G>,
    ) where
        for<'b> Dense<'b, T>: Source<E>,
    {
        let low = LowRank::NONE;
        match self.by_token {
            true => {
                let dz = turned(dz, [whole, whole, width]);
                let x = Dense::new(&self.x, [whole, self.features]);
                transposed::product_to::<E, _, _>(isa, x, &dz, low, target);
            }
            false => {
                let dz = Dense::new(dz, [whole, width]);
                transposed::product_to::<E, _, _>(isa, dz, &self.x, low, target);
            }
        }
    }
}

/// The transpose of `values [rows, columns]`, `[columns, whole]`, what is filled up being zero.
fn turned<T: Value>(values: &[T], [rows, whole, columns]: [usize; 3]) -> Vec<T> {
    let mut turned = vec![T::zeroed(); columns * whole];
    for_each_chunk(&mut turned, whole, values.len(), |column, turned| {
        for (turned, values) in turned[..rows].iter_mut().zip(values.chunks_exact(columns)) {
            *turned = values[column];
        }
    });
    turned
}

/// Sums in f32 that become values of another dtype: in place if that is f32.
enum Sums<'a, V> {
    InPlace(&'a mut [f32]),
    Beside(Vec<f32>, &'a mut [V]),
}

impl<'a, V: Value> Sums<'a, V> {
    fn new(zeros: &'a mut [V]) -> Self {
        match size_of::<V>() == size_of::<f32>() {
            true => Self::InPlace(bytemuck::cast_slice_mut(zeros)),
            false => Self::Beside(vec![0.0; zeros.len()], zeros),
        }
    }

    fn values(&mut self) -> &mut [f32] {
        match self {
            Self::InPlace(values) => values,
            Self::Beside(values, _) => values,
        }
    }

    fn round(self) {
        if let Self::Beside(sums, values) = self {
            for (value, sum) in values.iter_mut().zip(sums) {
                *value = V::round(sum);
            }
        }
    }
}

/// Values in the dtype that an arithmetic takes: as they are, or widened.
fn as_elements<E: Element, V: Value>(values: &[V]) -> Cow<'_, [E::Value]> {
    match size_of::<V>() == size_of::<E::Value>() {
        true => Cow::Borrowed(bytemuck::cast_slice(values)),
        false => {
            let values = values.iter().map(|&value| E::round(value.into()));
            Cow::Owned(values.collect())
        }
    }
}

/// Values for an arithmetic, rounded where it takes bf16, filled up with zeros to `len`.
fn padded<E: Element>(values: &[f32], len: usize) -> Cow<'_, [E::Value]> {
    if size_of::<E::Value>() == size_of::<f32>() {
        return Cow::Borrowed(bytemuck::cast_slice(values));
    }
    /// Values of a task.
    const VALUES: usize = 1 << 14;
    let mut rounded = vec![E::round(0.0); len];
    let own = &mut rounded[..values.len()];
    for_each_chunk(own, VALUES, values.len(), |index, own| {
        for (own, &value) in own.iter_mut().zip(&values[index * VALUES..]) {
            *own = E::round(value);
        }
    });
    Cow::Owned(rounded)
}

fn add(to: &mut [f32], values: &[f32]) {
    for (to, value) in to.iter_mut().zip(values) {
        *to += value;
    }
}

fn parts(len: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len)
        .step_by(most)
        .map(move |first| first..len.min(first + most))
}

fn times(range: &Range<usize>, factor: usize) -> Range<usize> {
    range.start * factor..range.end * factor
}
