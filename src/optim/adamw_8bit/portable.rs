//! The step on 8-bit moments in a backend's ordinary tensor operations.

use burn::tensor::{DType, FloatDType, Int, Tensor, TensorData};

use super::super::block_wise::{BLOCK, WORDS};
use super::super::dynamic_map::{DynamicMap, SIGNED, UNSIGNED};
use super::blocks::Codes;
use super::update::Update;
use crate::adapter::cast;

/// Blocks that are computed at a time: 2¹⁸ values, a mebibyte of f32.
const STRIP: usize = 1 << 10;

/// The parameter and its moments after a step. Holds the parameter once more in its dtype, and about ten tensors of a strip.
pub(super) fn step<const D: usize>(
    tensor: Tensor<D>,
    grad: Tensor<D>,
    moments: [Codes; 2],
    update: &Update,
) -> (Tensor<D>, [Codes; 2]) {
    step_by(STRIP, tensor, grad, moments, update)
}

pub(super) fn step_by<const D: usize>(
    strip: usize,
    tensor: Tensor<D>,
    grad: Tensor<D>,
    moments: [Codes; 2],
    update: &Update,
) -> (Tensor<D>, [Codes; 2]) {
    let (dims, dtype) = (tensor.dims(), FloatDType::from(tensor.dtype()));
    let n = dims.iter().product::<usize>();
    let (tensor, grad) = (tensor.reshape([n]), grad.reshape([n]));
    let blocks = n.div_ceil(BLOCK);
    let mut values = Vec::new();
    let mut parts = [const { (Vec::new(), Vec::new()) }; 2];
    for first in (0..blocks).step_by(strip) {
        let last = (first + strip).min(blocks);
        let at = first * BLOCK..n.min(last * BLOCK);
        let len = at.len();
        let part = |whole: &Tensor<1>| {
            let part = cast(whole.clone().slice([at.clone()]), FloatDType::F32);
            padded(part, (last - first) * BLOCK)
        };
        let decoded = |codes: &Codes, map| {
            let words = codes.words.clone().slice([first * WORDS..last * WORDS]);
            dequantize(map, words, codes.absmax.clone().slice([first..last]))
        };
        let [w, m, v] = update.of_tensor(
            part(&tensor),
            part(&grad),
            decoded(&moments[0], &SIGNED),
            decoded(&moments[1], &UNSIGNED),
        );
        values.push(cast(w.slice([0..len]), dtype));
        for (part, (map, moment)) in parts.iter_mut().zip([(&SIGNED, m), (&UNSIGNED, v)]) {
            let Codes { words, absmax } = quantize(map, moment);
            part.0.push(words);
            part.1.push(absmax);
        }
    }
    let moments = parts.map(|(words, absmax)| Codes {
        words: joined(words),
        absmax: joined(absmax),
    });
    (joined(values).reshape(dims), moments)
}

fn joined<K>(mut parts: Vec<Tensor<1, K>>) -> Tensor<1, K>
where
    K: burn::tensor::kind::Basic,
{
    match parts.len() {
        1 => parts.remove(0),
        _ => Tensor::cat(parts, 0),
    }
}

/// With zeros behind, `len` values.
fn padded(values: Tensor<1>, len: usize) -> Tensor<1> {
    let missing = len - values.dims()[0];
    match missing {
        0 => values,
        _ => {
            let zeros = Tensor::zeros([missing], (&values.device(), DType::F32));
            Tensor::cat(vec![values, zeros], 0)
        }
    }
}

/// As [`block_wise::dequantize`](super::super::block_wise::dequantize), for several blocks.
fn dequantize(map: &DynamicMap, words: Tensor<1, Int>, absmax: Tensor<1>) -> Tensor<1> {
    let (device, blocks) = (words.device(), absmax.dims()[0]);
    let bytes = [0, 8, 16, 24].map(|shift| {
        let shifted = words.clone().bitwise_right_shift_scalar(shift);
        let codes: Tensor<2, Int> = shifted.bitwise_and_scalar(255).unsqueeze_dim(1);
        codes
    });
    let codes = Tensor::cat(bytes.to_vec(), 1).reshape([blocks * BLOCK]);
    let values = table(&map.values, &device).select(0, codes);
    let scaled = values.reshape([blocks, BLOCK]) * absmax.unsqueeze_dim(1);
    scaled.reshape([blocks * BLOCK])
}

/// As [`block_wise::quantize`](super::super::block_wise::quantize), for several blocks.
fn quantize(map: &DynamicMap, values: Tensor<1>) -> Codes {
    let device = values.device();
    let blocks = values.dims()[0] / BLOCK;
    let values: Tensor<2> = values.reshape([blocks, BLOCK]);
    // NaN where a value is not finite, whatever a maximum makes of it.
    let poison = values.clone().mul_scalar(0.0).sum_dim(1);
    let absmax = values.clone().abs().max_dim(1) + poison;
    let divisor = absmax
        .clone()
        .mask_fill(absmax.clone().equal_scalar(0.0), 1.0);
    let quotients = (values / divisor).reshape([blocks * BLOCK]);
    // How many thresholds are below: a binary search. A comparison with NaN is false.
    let thresholds = table(&map.thresholds, &device);
    let mut below = Tensor::<1, Int>::zeros([blocks * BLOCK], (&device, DType::I32));
    for bit in [128, 64, 32, 16, 8, 4, 2, 1] {
        let more = below.clone().add_scalar(bit);
        let threshold = thresholds.clone().select(0, more.clone().sub_scalar(1));
        below = below.mask_where(threshold.lower(quotients.clone()), more);
    }
    let bytes: Tensor<2, Int> = below.reshape([blocks * WORDS, 4]);
    let byte = |index: usize| {
        let byte = bytes.clone().slice([0..blocks * WORDS, index..index + 1]);
        byte.bitwise_left_shift_scalar(8 * index as i32)
    };
    let words = byte(0).bitwise_or(byte(1)).bitwise_or(byte(2));
    let words = words.bitwise_or(byte(3));
    Codes {
        words: words.reshape([blocks * WORDS]),
        absmax: absmax.reshape([blocks]),
    }
}

fn table(values: &[f32; 256], device: &burn::tensor::Device) -> Tensor<1> {
    Tensor::from_data(TensorData::from(*values), (device, DType::F32))
}
