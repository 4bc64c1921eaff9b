//! A weight in NF4 put together from parts, as bitsandbytes stores them.
//!
//! ```text
//! u64 d_out | u64 d_in | u16 block size | u8 double | u8 | u16 codes | u16 scales | f32 offset | codes | scales
//! ```
//!
//! where `codes` and `scales` in front are how many bytes of either there are, as far as there are any.

use burn_peft::nf4::blocks::dequantize_blocks;
use burn_peft::nf4::{BLOCK_SIZES, BlockSize, DoubleAbsmax, Nf4Config, Nf4Data, Nf4Scales};

const FRONT: usize = 28;

/// States of matrices with partial blocks, odd counts, and no values.
pub fn seeds() -> Vec<Vec<u8>> {
    let shapes = [[2, 64], [3, 33], [1, 1], [0, 5], [5, 0], [7, 301], [64, 64]];
    let mut seeds = Vec::new();
    for shape in shapes {
        for (block_size, double) in [(64, false), (32, true), (256, true)] {
            let values: Vec<f32> = (0..shape[0] * shape[1])
                .map(|i| (i as f32 * 0.7).sin())
                .collect();
            let config = Nf4Config::new()
                .with_block_size(BlockSize::new(block_size).unwrap())
                .with_double_quant(double);
            let data = Nf4Data::quantize("w", &values, shape, &config).unwrap();
            let (scales, offset) = match data.scales() {
                Nf4Scales::Plain(scales) => (floats(scales), 0.0),
                Nf4Scales::Double(double) => {
                    let absmax = floats(double.absmax());
                    ([double.codes(), &absmax].concat(), double.offset())
                }
            };
            let mut seed = Vec::new();
            seed.extend((shape[0] as u64).to_le_bytes());
            seed.extend((shape[1] as u64).to_le_bytes());
            seed.extend((block_size as u16).to_le_bytes());
            seed.extend([u8::from(double), 0]);
            seed.extend((data.codes().len() as u16).to_le_bytes());
            seed.extend((scales.len() as u16).to_le_bytes());
            seed.extend(f32::to_le_bytes(offset));
            assert_eq!(seed.len(), FRONT);
            seed.extend(data.codes());
            seed.extend(scales);
            seeds.push(seed);
        }
    }
    seeds
}

fn floats(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn words(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks_exact(4)
        .map(|word| f32::from_le_bytes(word.try_into().unwrap()))
        .collect()
}

/// A state that fits together is restored as the reference restores it; any other is an error.
pub fn check(input: &[u8]) -> String {
    let Some((front, rest)) = input.split_first_chunk::<FRONT>() else {
        return "short".to_owned();
    };
    let u64_at = |at: usize| u64::from_le_bytes(front[at..at + 8].try_into().unwrap()) as usize;
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([front[at], front[at + 1]]));
    let shape = [u64_at(0), u64_at(8)];
    let size = u16_at(16);
    let block_size = match BlockSize::new(size) {
        Ok(block_size) => block_size,
        Err(error) => {
            assert!(!BLOCK_SIZES.contains(&size), "{error}");
            return error.to_string();
        }
    };
    let (codes, rest) = rest.split_at(u16_at(20).min(rest.len()));
    let bytes = &rest[..u16_at(22).min(rest.len())];
    let offset = f32::from_le_bytes(front[24..28].try_into().unwrap());
    let (scales, absmax) = match front[18] % 2 {
        0 => (Nf4Scales::Plain(words(bytes)), words(bytes)),
        _ => {
            // `n` codes of a byte, and a float for each 256 of them.
            let n = (0..=bytes.len())
                .rev()
                .find(|n| n + 4 * n.div_ceil(256) <= bytes.len());
            let (scale_codes, absmax) = bytes.split_at(n.unwrap_or(0));
            let absmax = words(absmax);
            match DoubleAbsmax::from_parts("w", scale_codes.to_vec(), absmax.clone(), offset) {
                Ok(double) => {
                    let restored = double.dequantize();
                    assert_eq!(restored.len(), scale_codes.len());
                    (Nf4Scales::Double(double), restored)
                }
                Err(error) => {
                    assert_ne!(absmax.len(), scale_codes.len().div_ceil(256), "{error}");
                    return error.to_string();
                }
            }
        }
    };
    let n = shape[0].checked_mul(shape[1]);
    let fits = n.is_some_and(|n| codes.len() == n.div_ceil(2) && absmax.len() == n.div_ceil(size));
    let finite = absmax.iter().all(|scale| scale.is_finite());
    match Nf4Data::from_parts("w", shape, block_size, codes.to_vec(), scales) {
        Err(error) => {
            assert!(!(fits && finite), "{error}");
            error.to_string()
        }
        Ok(data) => {
            assert!(fits && finite);
            let n = n.unwrap();
            assert_eq!((data.shape(), data.num_weights()), (shape, n));
            let dense = data.dequantize();
            let expected = dequantize_blocks(codes, &absmax, n, block_size);
            let bits = |values: &[f32]| {
                values
                    .iter()
                    .map(|value| value.to_bits())
                    .collect::<Vec<_>>()
            };
            assert_eq!(bits(&dense), bits(&expected));
            assert_eq!(data.codes(), codes);
            format!("{} of {}", front[18] % 2, size)
        }
    }
}
