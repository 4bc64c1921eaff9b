//! The step on 8-bit moments on Burn's CPU backend: block by block, in place, on all threads.
//!
//! A thread holds a few blocks in f32, less than 8 KiB, and nothing else is allocated, unless something else holds the parameter
//! or its state too, as a clone of the model does: that is then copied, in its dtype.

use burn::backend::{DispatchTensorKind, Flex, tensor::FloatTensor};
use burn::tensor::{DType, FloatDType, Int, Tensor, TensorData};
use half::bf16;
use rayon::prelude::*;

use super::super::block_wise::{BLOCK, WORDS, dequantize, quantize};
use super::super::dynamic_map::{SIGNED, UNSIGNED};
use super::blocks::Codes;
use super::update::Update;
use crate::adapter::cast;
use crate::cpu::simd::{Isa, Loop, run_loop};
use crate::cpu::value::Value;

/// What Burn calls all tensors of its CPU backend, of integers too.
type FlexTensor = FloatTensor<Flex>;

/// Blocks of a task of a thread.
const TASK: usize = 64;

/// Whether the kernel is for this parameter.
pub(super) fn serves<const D: usize>(tensor: &Tensor<D>) -> bool {
    matches!(tensor.dtype(), DType::F32 | DType::BF16)
        && matches!(
            tensor.clone().into_dispatch().kind,
            DispatchTensorKind::Flex(_)
        )
}

/// The parameter and its moments after a step.
pub(super) fn step<const D: usize>(
    tensor: Tensor<D>,
    grad: Tensor<D>,
    moments: [Codes; 2],
    update: &Update,
) -> (Tensor<D>, [Codes; 2]) {
    step_by(Isa::best(), tensor, grad, moments, update)
}

pub(super) fn step_by<const D: usize>(
    isa: Isa,
    tensor: Tensor<D>,
    grad: Tensor<D>,
    moments: [Codes; 2],
    update: &Update,
) -> (Tensor<D>, [Codes; 2]) {
    let grad = match grad.dtype() {
        DType::F32 | DType::BF16 => grad,
        _ => cast(grad, FloatDType::F32),
    };
    let mut tensor = whole(float(tensor));
    let grad = whole(float(grad));
    let grads = match grad.dtype() {
        DType::BF16 => Grads::Half(grad.storage()),
        _ => Grads::Full(grad.storage()),
    };
    let [m, v] = moments;
    let mut words = [m.words, v.words].map(|words| whole(int(words)));
    let mut absmax = [m.absmax, v.absmax].map(|absmax| whole(float(absmax)));
    let state = State {
        words: words
            .each_mut()
            .map(|words| words.storage_mut::<i32>().as_chunks_mut().0),
        absmax: absmax.each_mut().map(|absmax| absmax.storage_mut::<f32>()),
    };
    match tensor.dtype() {
        DType::BF16 => all(isa, tensor.storage_mut::<bf16>(), grads, state, update),
        _ => all(isa, tensor.storage_mut::<f32>(), grads, state, update),
    }
    let [m, v] = words.map(Tensor::from_primitive::<Flex>);
    let [a, b] = absmax.map(Tensor::from_primitive::<Flex>);
    let moments = [(m, a), (v, b)].map(|(words, absmax)| Codes { words, absmax });
    (Tensor::from_primitive::<Flex>(tensor), moments)
}

fn float<const D: usize>(tensor: Tensor<D>) -> FlexTensor {
    let tensor = tensor.try_into_primitive::<Flex>();
    tensor.expect("a tensor of the parameter's backend")
}

fn int(tensor: Tensor<1, Int>) -> FlexTensor {
    let tensor = tensor.try_into_primitive::<Flex>();
    tensor.expect("a tensor of the parameter's backend")
}

/// The same tensor in memory that holds its values in order, and no others.
fn whole(tensor: FlexTensor) -> FlexTensor {
    let contiguous = tensor.to_contiguous();
    // What is held twice would be copied when it is written.
    drop(tensor);
    let dtype = contiguous.dtype();
    let layout = contiguous.layout();
    let len = layout.num_elements() * dtype.size();
    if contiguous.bytes().len() == len {
        return contiguous;
    }
    let at = layout.start_offset() * dtype.size();
    let bytes = contiguous.bytes()[at..at + len].to_vec();
    let shape = layout.shape().clone();
    FlexTensor::from_data(TensorData::from_bytes_vec(bytes, shape, dtype))
}

/// Gradients in the dtype that they have, which may be another than the parameter's.
#[derive(Clone, Copy)]
enum Grads<'a> {
    Full(&'a [f32]),
    Half(&'a [bf16]),
}

impl Grads<'_> {
    fn part(self, from: usize, len: usize) -> Self {
        match self {
            Self::Full(grads) => Self::Full(&grads[from..from + len]),
            Self::Half(grads) => Self::Half(&grads[from..from + len]),
        }
    }

    /// Block `index`, with zeros behind the last value.
    #[inline(always)]
    fn block(self, index: usize) -> [f32; BLOCK] {
        match self {
            Self::Full(grads) => widened(block_of(grads, index)),
            Self::Half(grads) => widened(block_of(grads, index)),
        }
    }
}

#[inline(always)]
fn block_of<T>(values: &[T], index: usize) -> &[T] {
    let rest = &values[index * BLOCK..];
    &rest[..rest.len().min(BLOCK)]
}

#[inline(always)]
fn widened<V: Value>(values: &[V]) -> [f32; BLOCK] {
    let mut block = [0.0; BLOCK];
    for (to, &from) in block.iter_mut().zip(values) {
        *to = from.into();
    }
    block
}

/// Both moments, block by block.
struct State<'a> {
    words: [&'a mut [[i32; WORDS]]; 2],
    absmax: [&'a mut [f32]; 2],
}

fn all<V: Value>(isa: Isa, values: &mut [V], grads: Grads, state: State, update: &Update) {
    let State {
        words: [m_words, v_words],
        absmax: [m_absmax, v_absmax],
    } = state;
    if values.len() <= TASK * BLOCK {
        let (words, absmax) = ([m_words, v_words], [m_absmax, v_absmax]);
        let state = State { words, absmax };
        return run_loop(
            isa,
            Task {
                values,
                grads,
                state,
                update,
            },
        );
    }
    let words = m_words
        .par_chunks_mut(TASK)
        .zip(v_words.par_chunks_mut(TASK));
    let absmax = m_absmax
        .par_chunks_mut(TASK)
        .zip(v_absmax.par_chunks_mut(TASK));
    let tasks = values.par_chunks_mut(TASK * BLOCK).enumerate();
    tasks
        .zip(words.zip(absmax))
        .for_each(|((index, values), ((m, v), (a, b)))| {
            let grads = grads.part(index * TASK * BLOCK, values.len());
            let (words, absmax) = ([m, v], [a, b]);
            let state = State { words, absmax };
            run_loop(
                isa,
                Task {
                    values,
                    grads,
                    state,
                    update,
                },
            );
        });
}

/// Some blocks, one after the other.
struct Task<'a, V> {
    values: &'a mut [V],
    grads: Grads<'a>,
    state: State<'a>,
    update: &'a Update,
}

impl<V: Value> Loop for Task<'_, V> {
    #[inline(always)]
    fn run(self) {
        let State {
            words: [m_words, v_words],
            absmax: [m_absmax, v_absmax],
        } = self.state;
        for (index, values) in self.values.chunks_mut(BLOCK).enumerate() {
            let mut w = widened(values);
            let g = self.grads.block(index);
            let mut m = dequantize(&SIGNED, &m_words[index], m_absmax[index]);
            let mut v = dequantize(&UNSIGNED, &v_words[index], v_absmax[index]);
            for i in 0..BLOCK {
                [w[i], m[i], v[i]] = self.update.of_value(w[i], g[i], m[i], v[i]);
            }
            for (to, from) in values.iter_mut().zip(w) {
                *to = V::round(from);
            }
            m_absmax[index] = quantize(&SIGNED, &m, &mut m_words[index]);
            v_absmax[index] = quantize(&UNSIGNED, &v, &mut v_words[index]);
        }
    }
}
