//! NF4 dequantisation on Burn's CPU backend, straight from the packed words.
//!
//! Bit for bit the value of the host reference in [`blocks`](super::blocks): each block's sixteen products
//! `codebook[c] · scale` are formed and rounded once, then looked up by code.

use burn::backend::{Flex, tensor::FloatTensor};
use burn::tensor::{Element, FloatDType, TensorData};
use half::{bf16, f16};
use rayon::prelude::*;

use super::codebook::CODEBOOK;
use super::ops::{Nf4ScaleTensors, Nf4Tensors};
use super::words::{CODE_SHIFTS, bytes_from_words, f32_from_bits, nested_from_bits};

/// Values that one task dequantises, a multiple of every block size: worth a task, and small enough to balance.
const TASK: usize = 64 * 1024;

/// The dense weight `[d_out, d_in]`.
pub(super) fn dequantize(weight: Nf4Tensors<Flex>, dtype: FloatDType) -> FloatTensor<Flex> {
    let scales = scales(&weight);
    let codes = weight.codes.to_contiguous();
    let words = codes
        .as_slice::<i32>()
        .expect("packed codes are 32-bit words");
    let fill = Dequantize {
        words,
        scales: &scales,
        block_size: weight.block_size,
    };
    let n = weight.shape[0] * weight.shape[1];
    let data = match dtype {
        FloatDType::F32 | FloatDType::Flex32 => data(fill.run(n, |value| value), weight.shape),
        FloatDType::BF16 => data(fill.run(n, bf16::from_f32), weight.shape),
        FloatDType::F16 => data(fill.run(n, f16::from_f32), weight.shape),
        FloatDType::F64 => data(fill.run(n, f64::from), weight.shape),
    };
    FloatTensor::<Flex>::from_data(data)
}

fn data<T: Element>(values: Vec<T>, shape: [usize; 2]) -> TensorData {
    TensorData::new(values, shape)
}

/// One f32 scale for each block.
fn scales(weight: &Nf4Tensors<Flex>) -> Vec<f32> {
    let words = |tensor: &burn::backend::tensor::IntTensor<Flex>| -> Vec<i32> {
        let tensor = tensor.to_contiguous();
        tensor
            .as_slice::<i32>()
            .expect("scales are 32-bit words")
            .to_vec()
    };
    match &weight.scales {
        Nf4ScaleTensors::Plain(bits) => f32_from_bits(&words(bits)),
        Nf4ScaleTensors::Double(codes, nested) => {
            let blocks = (weight.shape[0] * weight.shape[1]).div_ceil(weight.block_size);
            nested_from_bits(bytes_from_words(&words(codes), blocks), &words(nested)).dequantize()
        }
    }
}

struct Dequantize<'a> {
    words: &'a [i32],
    scales: &'a [f32],
    block_size: usize,
}

impl Dequantize<'_> {
    fn run<T: Copy + Default + Send>(&self, n: usize, round: impl Fn(f32) -> T + Sync) -> Vec<T> {
        let mut out = vec![T::default(); n];
        out.par_chunks_mut(TASK)
            .enumerate()
            .for_each(|(task, out)| {
                let first = task * TASK;
                for (i, out) in out.chunks_mut(self.block_size).enumerate() {
                    let scale = self.scales[first / self.block_size + i];
                    let table = CODEBOOK.map(|value| round(value * scale));
                    let words = &self.words[(first + i * self.block_size) / 8..];
                    for (out, &word) in out.chunks_mut(8).zip(words) {
                        for (out, shift) in out.iter_mut().zip(CODE_SHIFTS) {
                            *out = table[(word >> shift & 15) as usize];
                        }
                    }
                }
            });
        out
    }
}
