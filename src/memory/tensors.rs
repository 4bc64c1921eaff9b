//! What is there before a step: weights, scales, adapters, optimiser state; and which parameters train, in order.

use super::ledger::{Part, Parts};
use super::setup::{Float, Head, Method, Optimizer, Setup};
use super::shape::{ModelShape, Projection};
use crate::nf4::double::NESTED_BLOCK_SIZE;

/// Values of an optimiser's 8-bit state that share an f32 scale. A plan needs no optimiser, whose module may be left out.
const STATE_BLOCK: u128 = 256;
/// Fewest values of a tensor whose state has eight bits.
const STATE_MIN: u128 = 4096;

/// Where a trained tensor stands, in the order in which an optimiser visits them: the place (the embedding, the blocks, the
/// last norm with the head), the layer in it, the tensor in that.
pub(super) type Key = (u64, u8, u8);

pub(super) const EMBEDDING: Key = (0, 0, 0);

/// The norm before the attention or, `second`, before the feed-forward network of a block.
pub(super) fn norm_key(block: u64, second: bool) -> Key {
    (block + 1, if second { 5 } else { 0 }, 0)
}

pub(super) fn last_norm_key(shape: &ModelShape) -> Key {
    (shape.layers + 1, 0, 0)
}

/// A tensor of a linear layer: the weight or factor `A` is 0, the bias or factor `B` is 1.
pub(super) fn linear_key(
    shape: &ModelShape,
    block: u64,
    projection: Projection,
    tensor: u8,
) -> Key {
    let place = match projection {
        Projection::Head if shape.tied => return EMBEDDING,
        Projection::Head => shape.layers,
        _ => block,
    };
    let layer = match projection {
        Projection::Query => 1,
        Projection::Key => 2,
        Projection::Value => 3,
        Projection::Output => 4,
        Projection::Gate => 6,
        Projection::Up => 7,
        Projection::Down => 8,
        Projection::Head => 9,
    };
    (place + 1, layer, tensor)
}

/// Bytes of `n` packed weights: codes, scales. All are held in 32-bit words.
pub(super) fn nf4_bytes(setup: &Setup, n: u128) -> [u128; 2] {
    let words = |bytes: u128| bytes.next_multiple_of(4);
    let blocks = n.div_ceil(setup.nf4.block_size.get() as u128);
    let scales = match setup.nf4.double_quant {
        false => 4 * blocks,
        true => words(blocks) + 4 * blocks.div_ceil(NESTED_BLOCK_SIZE as u128) + 4,
    };
    [words(n.div_ceil(2)), scales]
}

/// Bytes that an optimiser keeps of a tensor of `n` values.
pub(super) fn state_bytes(optimizer: Optimizer, n: u128) -> u128 {
    match optimizer {
        Optimizer::Sgd => 0,
        Optimizer::AdamW { state } => 2 * state.bytes() * n,
        Optimizer::AdamW8bit if n < STATE_MIN => 2 * 4 * n,
        Optimizer::AdamW8bit => 2 * (STATE_BLOCK + 4) * n.div_ceil(STATE_BLOCK),
    }
}

/// The projections of a whole model, each with its block.
fn projections(shape: &ModelShape) -> impl Iterator<Item = (u64, Projection)> {
    let blocks = (0..shape.layers).flat_map(|block| Projection::BLOCK.map(|p| (block, p)));
    let head = (!shape.tied).then_some((shape.layers, Projection::Head));
    blocks.chain(head)
}

/// The trained tensors with their numbers of values.
pub(super) fn trained(shape: &ModelShape, setup: &Setup) -> Vec<(Key, u128)> {
    let mut all = Vec::new();
    let hidden = u128::from(shape.hidden);
    for (block, projection) in projections(shape) {
        let [d_in, d_out] = shape.dims(projection).map(u128::from);
        let key = |tensor| linear_key(shape, block, projection, tensor);
        if setup.method == Method::Full {
            all.push((key(0), d_in * d_out));
            if shape.has_bias(projection) {
                all.push((key(1), d_out));
            }
        } else if setup.adapts(projection) {
            let rank = u128::from(setup.rank);
            all.push((key(0), d_in * rank));
            all.push((key(1), rank * d_out));
        }
    }
    if setup.method == Method::Full {
        all.push((EMBEDDING, u128::from(shape.vocab) * hidden));
        all.push((last_norm_key(shape), hidden));
        for block in 0..shape.layers {
            all.push((norm_key(block, false), hidden));
            all.push((norm_key(block, true), hidden));
        }
    }
    all.sort_unstable();
    all
}

/// Dtype of a trained tensor and of its gradient.
pub(super) fn trained_dtype(setup: &Setup, shape: &ModelShape, key: Key) -> Float {
    let is_head = key == linear_key(shape, shape.layers, Projection::Head, 0);
    match (setup.method, setup.head) {
        (Method::Lora | Method::QLora, _) => setup.adapter,
        (Method::Full, _) if key == EMBEDDING => setup.embedding,
        (Method::Full, Head::Dense(dtype)) if is_head => dtype,
        (Method::Full, _) => setup.base,
    }
}

/// Bytes of what lives as long as the model and its optimiser.
pub(super) fn standing(shape: &ModelShape, setup: &Setup) -> Parts {
    let mut parts = Parts::default();
    let hidden = u128::from(shape.hidden);
    let base = setup.base.bytes();
    let embedding = u128::from(shape.vocab) * hidden * setup.embedding.bytes();
    let norms = (2 * u128::from(shape.layers) + 1) * hidden * base;
    parts.add(Part::Weights, embedding + norms);
    for (_, projection) in projections(shape) {
        let [d_in, d_out] = shape.dims(projection).map(u128::from);
        let n = d_in * d_out;
        let packed = match (projection, setup.head) {
            (Projection::Head, head) => head == Head::Nf4,
            _ => setup.method == Method::QLora,
        };
        let dtype = match (projection, setup.head) {
            (Projection::Head, Head::Dense(dtype)) => dtype,
            _ => setup.base,
        };
        if packed {
            let [codes, scales] = nf4_bytes(setup, n);
            parts.add(Part::Weights, codes);
            parts.add(Part::Scales, scales);
        } else {
            parts.add(Part::Weights, n * dtype.bytes());
        }
        parts.add(
            Part::Weights,
            u128::from(shape.has_bias(projection)) * d_out * base,
        );
    }
    for (key, n) in trained(shape, setup) {
        if setup.method != Method::Full {
            parts.add(Part::Adapters, n * trained_dtype(setup, shape, key).bytes());
        }
        parts.add(Part::Optimizer, state_bytes(setup.optimizer, n));
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::super::setup::Targets;
    use super::*;
    use crate::nf4::{Nf4Config, Nf4Data};

    #[test]
    fn packed_bytes_are_those_of_packed_weights() {
        for (rows, columns) in [(64, 64), (3, 50), (1, 1), (33, 257)] {
            for double_quant in [false, true] {
                let config = Nf4Config::new().with_double_quant(double_quant);
                let setup = Setup::new(Method::QLora, Float::F32).with_nf4(config);
                let n = rows * columns;
                let values = vec![0.5f32; n];
                let data = Nf4Data::quantize("w", &values, [rows, columns], &config).unwrap();
                let [codes, scales] = nf4_bytes(&setup, n as u128);
                assert_eq!(codes, data.codes().len().next_multiple_of(4) as u128);
                // Only what is filled up to words is more.
                let exact = data.num_bytes() as u128;
                assert!((exact..exact + 7).contains(&(codes + scales)), "{n}");
            }
        }
    }

    #[cfg(feature = "optim")]
    #[test]
    fn state_of_8_bits_is_in_the_blocks_of_its_optimiser() {
        assert_eq!(STATE_BLOCK, crate::optim::block_wise::BLOCK as u128);
        let config = crate::optim::AdamW8bitConfig::new();
        assert_eq!(STATE_MIN, config.min_8bit_size as u128);
    }

    #[test]
    fn every_parameter_of_full_fine_tuning_is_trained_once() {
        for tied in [false, true] {
            let shape = ModelShape::new(100, 16, 24, 3, 4, 2).with_tied(tied);
            let all = trained(&shape, &Setup::new(Method::Full, Float::F32));
            let values = all.iter().map(|(_, n)| n).sum::<u128>();
            assert_eq!(values, shape.parameters().unwrap());
            assert!(
                all.windows(2).all(|pair| pair[0].0 < pair[1].0),
                "each key once"
            );
        }
    }

    /// Table E of the published numbers: `layers · r · Σ (d_in + d_out)`.
    #[test]
    fn trainable_parameters_of_llama_3() {
        let count = |shape: &ModelShape, targets, rank| {
            let setup = Setup::new(Method::Lora, Float::Bf16);
            let setup = setup.with_targets(targets).with_rank(rank);
            trained(shape, &setup).iter().map(|(_, n)| n).sum::<u128>()
        };
        let small = ModelShape::llama3_8b();
        // q 4096+4096, k and v 4096+1024, o 4096+4096; gate and up 4096+14336, down 14336+4096; head 4096+128256.
        let (q, k, f, head) = (8192, 5120, 18_432, 132_352);
        for (targets, rank, sum, published) in [
            (Targets::QUERY_VALUE, 8, 32 * (q + k), 3_407_872),
            (Targets::QUERY_VALUE, 16, 32 * (q + k), 6_815_744),
            (Targets::QUERY_VALUE, 64, 32 * (q + k), 27_262_976),
            (Targets::ATTENTION, 8, 32 * (q + 2 * k + q), 6_815_744),
            (Targets::MLP, 8, 32 * 3 * f, 14_155_776),
            (
                Targets::ALL_LINEAR,
                8,
                32 * (2 * q + 2 * k + 3 * f),
                20_971_520,
            ),
            (
                Targets::ALL_LINEAR,
                16,
                32 * (2 * q + 2 * k + 3 * f),
                41_943_040,
            ),
            (
                Targets::ALL_LINEAR,
                64,
                32 * (2 * q + 2 * k + 3 * f),
                167_772_160,
            ),
            (
                Targets::ALL_LINEAR.with_head(),
                8,
                32 * (2 * q + 2 * k + 3 * f) + head,
                22_030_336,
            ),
        ] {
            assert_eq!(u128::from(rank * sum), published);
            assert_eq!(count(&small, targets, rank), published);
        }
        let large = ModelShape::llama3_70b();
        // q and o 8192+8192, k and v 8192+1024, f 8192+28672, head 8192+128256.
        let (q, k, f, head) = (16_384, 9216, 36_864, 136_448);
        for (targets, rank, sum, published) in [
            (Targets::QUERY_VALUE, 8, 80 * (q + k), 16_384_000),
            (Targets::QUERY_VALUE, 64, 80 * (q + k), 131_072_000),
            (Targets::ATTENTION, 8, 80 * (2 * q + 2 * k), 32_768_000),
            (Targets::MLP, 8, 80 * 3 * f, 70_778_880),
            (
                Targets::ALL_LINEAR,
                8,
                80 * (2 * q + 2 * k + 3 * f),
                103_546_880,
            ),
            (
                Targets::ALL_LINEAR,
                64,
                80 * (2 * q + 2 * k + 3 * f),
                828_375_040,
            ),
            (
                Targets::ALL_LINEAR.with_head(),
                8,
                80 * (2 * q + 2 * k + 3 * f) + head,
                104_638_464,
            ),
        ] {
            assert_eq!(u128::from(rank * sum), published);
            assert_eq!(count(&large, targets, rank), published);
        }
        // The shares that the table names: .042 % and .26 % of the base's parameters.
        let share = |n: u128| 100.0 * n as f64 / small.parameters().unwrap() as f64;
        assert_eq!(format!("{:.3}", share(3_407_872)), "0.042");
        assert_eq!(format!("{:.2}", share(20_971_520)), "0.26");
    }
}
