//! Burn's tensors in and out of the kernels of [`fused::cpu::head`](crate::fused::cpu::head), in the arithmetic of their dtypes.
//!
//! bf16 rows and a bf16 or packed weight are multiplied as pairs of bf16 if features and vocabulary are even. Everything else is
//! multiplied in f32: what is narrower is widened, rows a chunk and the weight a strip at a time. A packed weight is rounded to the
//! dtype of the rows either way.

use burn::backend::{Flex, ops::FloatTensorOps};
use burn::tensor::{DType, TensorData};
use half::bf16;

use super::ops::{Operands, Wanted, Weight};
use super::rows;
use crate::cpu::flex::{
    Float, contiguous, factor, lines, shape, slice, with_forward_strides, with_whole_lines,
};
use crate::cpu::matmul::Source;
use crate::cpu::matmul::dense::{Dense, Widened};
use crate::cpu::matmul::element::{Element, F32, Pairs};
use crate::cpu::matmul::factor::Factor;
use crate::cpu::simd::Isa;
use crate::cpu::value::Value;
use crate::fused::cpu::head::{Gradients, Head, Inputs};
use crate::fused::cpu::log_probs::{Running, Upstream};
use crate::nf4::cpu::flex::with_packed;
use crate::nf4::cpu::{Packed, Precision};

impl Operands<Flex> {
    /// The [`rows`], `[k, rows]`.
    pub(super) fn forward(&self) -> Float {
        let running = self.pass(Forward {
            statistics: self.asked.statistics,
        });
        let count = rows::count(self.asked.statistics);
        let mut values = Vec::with_capacity(count * running.len());
        values.extend(running.iter().map(Running::log_prob));
        for index in 0..2 {
            values.extend(running.iter().map(|row| row.partition()[index]));
        }
        if self.asked.statistics {
            for index in 0..4 {
                values.extend(running.iter().map(|row| row.statistics()[index]));
            }
        }
        Float::from_data(TensorData::new(values, [count, running.len()]))
    }

    /// The gradients for `dy [k, rows]`, those of `values`, the result of [`forward`](Self::forward).
    pub(super) fn backward(
        &self,
        values: &Float,
        dy: &Float,
        wanted: Wanted,
    ) -> [Option<Float>; 5] {
        let (values, dy) = (contiguous(values), contiguous(dy));
        let (values, dy) = (slice::<f32>(&values), slice::<f32>(&dy));
        let (count, dims) = (self.asked.labels.len(), shape::<2>(&self.x));
        assert_eq!(dims[0], count, "rows of a head");
        let vocabulary = self.vocabulary() as f32;
        let of = |values: &[f32], place: usize, row: usize| match self.asked.statistics {
            false if place >= rows::count(false) => 0.0,
            _ => values[place * count + row],
        };
        let upstream: Vec<Upstream> = (0..count)
            .map(|row| Upstream {
                partition: [rows::LARGEST, rows::SUM].map(|place| of(values, place, row)),
                log_prob: of(dy, rows::LOG_PROB, row),
                entropy: of(dy, rows::ENTROPY, row),
                mean: of(dy, rows::MEAN, row),
                own_entropy: of(values, rows::ENTROPY, row),
                vocabulary,
            })
            .collect();
        self.pass(Backward {
            upstream: &upstream,
            wanted,
        })
    }

    /// Runs a pass with the operands as the kernels take them.
    fn pass<P: Pass>(&self, pass: P) -> P::Output {
        let x = contiguous(&self.x);
        match x.dtype() {
            DType::BF16 => self.of_rows(slice::<bf16>(&x), pass),
            _ => self.of_rows(slice::<f32>(&x), pass),
        }
    }

    fn of_rows<V: Value, P: Pass>(&self, x: &[V], pass: P) -> P::Output {
        let narrow = size_of::<V>() == size_of::<bf16>();
        match &self.weight {
            Weight::Nf4(weight) => with_packed(weight, |w: &Packed| {
                let w = &match narrow {
                    true => w.rounded_to(Precision::Bf16),
                    false => *w,
                };
                let [vocabulary, features] = w.shape;
                let dims = [features, vocabulary];
                match narrow && even(dims) {
                    true => self.of_weight::<Pairs, V, f32, _, P>(x, w, true, dims, pass),
                    false => self.of_weight::<F32, V, f32, _, P>(x, w, true, dims, pass),
                }
            }),
            Weight::Dense(weight) => {
                let weight = with_whole_lines(weight);
                let dims @ [features, vocabulary] = shape(&weight);
                let by_token = weight.layout().strides()[1] != 1;
                let held = match by_token {
                    true => [vocabulary, features],
                    false => dims,
                };
                match weight.dtype() {
                    DType::BF16 => {
                        let w = Dense::new(lines::<bf16>(&weight), held);
                        match narrow && even(dims) {
                            true => {
                                self.of_weight::<Pairs, V, bf16, _, P>(x, w, by_token, dims, pass)
                            }
                            false => self.of_weight::<F32, V, bf16, _, P>(
                                x,
                                Widened(w),
                                by_token,
                                dims,
                                pass,
                            ),
                        }
                    }
                    _ => {
                        let w = Dense::new(lines::<f32>(&weight), held);
                        self.of_weight::<F32, V, f32, _, P>(x, w, by_token, dims, pass)
                    }
                }
            }
        }
    }

    fn of_weight<E: Element, V: Value, G: Value, W: Source<E>, P: Pass>(
        &self,
        x: &[V],
        weight: W,
        by_token: bool,
        [features, vocabulary]: [usize; 2],
        pass: P,
    ) -> P::Output
    where
        for<'b> Dense<'b, E::Value>: Source<E>,
    {
        let u = self.low_rank.as_ref().map(|[u, _]| contiguous(u));
        let bias = self.bias.as_ref().map(contiguous);
        let b = self.low_rank.as_ref().map(|[_, b]| with_forward_strides(b));
        let b = match &b {
            None => Factor::without_rows(vocabulary),
            Some(b) => factor(b),
        };
        let head = Head {
            isa: Isa::best(),
            weight,
            by_token,
            features,
            vocabulary,
            b,
            bias: bias.as_ref().map_or(&[], slice),
            chunks: [self.asked.chunks.rows(), self.asked.chunks.vocabulary()],
            inverse_temperature: (1.0 / self.asked.temperature) as f32,
        };
        let inputs = Inputs {
            x,
            u: u.as_ref().map_or(&[], slice),
            labels: &self.asked.labels,
        };
        pass.run::<E, V, G, W>(&head, &inputs)
    }
}

fn even(dims: [usize; 2]) -> bool {
    dims.iter().all(|dim| dim.is_multiple_of(2))
}

/// One of the two passes, over operands of any kind.
trait Pass {
    type Output;

    fn run<E: Element, V: Value, G: Value, W: Source<E>>(
        self,
        head: &Head<W>,
        inputs: &Inputs<V>,
    ) -> Self::Output
    where
        for<'b> Dense<'b, E::Value>: Source<E>;
}

struct Forward {
    statistics: bool,
}

impl Pass for Forward {
    type Output = Vec<Running>;

    fn run<E: Element, V: Value, G: Value, W: Source<E>>(
        self,
        head: &Head<W>,
        inputs: &Inputs<V>,
    ) -> Self::Output
    where
        for<'b> Dense<'b, E::Value>: Source<E>,
    {
        head.forward::<E, V>(inputs, self.statistics)
    }
}

struct Backward<'a> {
    upstream: &'a [Upstream],
    wanted: Wanted,
}

impl Pass for Backward<'_> {
    type Output = [Option<Float>; 5];

    fn run<E: Element, V: Value, G: Value, W: Source<E>>(
        self,
        head: &Head<W>,
        inputs: &Inputs<V>,
    ) -> Self::Output
    where
        for<'b> Dense<'b, E::Value>: Source<E>,
    {
        let (rows, [rank, _]) = (inputs.labels.len(), head.b.shape());
        let shapes = [
            [rows, head.features],
            match head.by_token {
                true => [head.vocabulary, head.features],
                false => [head.features, head.vocabulary],
            },
            [rows, rank],
            [rank, head.vocabulary],
            [1, head.vocabulary],
        ];
        let lengths = [0, 1, 2, 3, 4].map(|index| match self.wanted[index] {
            true => shapes[index][0] * shapes[index][1],
            false => 0,
        });
        let mut x: Vec<V> = bytemuck::zeroed_vec(lengths[0]);
        let mut weight: Vec<G> = bytemuck::zeroed_vec(lengths[1]);
        let [mut u, mut b, mut bias]: [Vec<f32>; 3] =
            [2, 3, 4].map(|index| bytemuck::zeroed_vec(lengths[index]));
        let mut gradients = Gradients {
            x: &mut x,
            weight: &mut weight,
            u: &mut u,
            b: &mut b,
            bias: &mut bias,
        };
        head.backward::<E, V, G>(inputs, self.upstream, &mut gradients);
        let weight = tensor(weight, shapes[1]).map(|weight| match head.by_token {
            true => Flex::float_transpose(weight),
            false => weight,
        });
        let bias =
            (!bias.is_empty()).then(|| Float::from_data(TensorData::new(bias, [head.vocabulary])));
        [
            tensor(x, shapes[0]),
            weight,
            tensor(u, shapes[2]),
            tensor(b, shapes[3]),
            bias,
        ]
    }
}

fn tensor<T: Value>(values: Vec<T>, shape: [usize; 2]) -> Option<Float> {
    (!values.is_empty()).then(|| Float::from_data(TensorData::new(values, shape)))
}
