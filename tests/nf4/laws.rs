//! Laws of NF4, on random matrices.

use burn_peft::PeftError;
use burn_peft::nf4::blocks::{dequantize_blocks, quantize_blocks};
use burn_peft::nf4::codebook::CODEBOOK;
use burn_peft::nf4::{BLOCK_SIZES, BlockSize};
use half::{bf16, f16};
use proptest::prelude::*;

/// Half the widest gap of the codebook, that between its two lowest values: the largest error, in units of the scale.
const LARGEST_ERROR: f32 = 0.1519;

fn block_sizes() -> impl Strategy<Value = BlockSize> {
    prop::sample::select(&BLOCK_SIZES[..]).prop_map(|size| BlockSize::new(size).unwrap())
}

/// Some blocks of values of ordinary magnitudes (from 1e-20 to 1e20), many of them zero; the last block may be partial.
fn matrices() -> impl Strategy<Value = (BlockSize, Vec<f32>)> {
    let value = prop_oneof![
        1 => Just(0.0_f32),
        1 => Just(-0.0_f32),
        4 => -1.0_f32..1.0,
        1 => (-1.0_f32..1.0, -20..20_i32).prop_map(|(x, exponent)| x * 10_f32.powi(exponent)),
    ];
    // Of the larger block sizes a block and a bit will do.
    block_sizes().prop_flat_map(move |size| {
        let values =
            prop::collection::vec(value.clone(), 1..(4 * size.get()).min(size.get() + 200));
        (Just(size), values)
    })
}

fn quantize(values: &[f32], size: BlockSize) -> (Vec<u8>, Vec<f32>) {
    quantize_blocks("w", values, size).unwrap()
}

/// One code per value.
fn codes(packed: &[u8], n: usize) -> Vec<u8> {
    packed
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .take(n)
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn the_largest_error_is_half_the_widest_gap() {
    let widest = CODEBOOK
        .windows(2)
        .map(|pair| pair[1] - pair[0])
        .fold(0.0, f32::max);
    assert_eq!(widest, CODEBOOK[1] - CODEBOOK[0]);
    assert!((widest / 2.0 - LARGEST_ERROR).abs() < 5e-6);
}

proptest! {
    #[test]
    fn no_value_is_off_by_more_than_half_the_widest_gap((size, values) in matrices()) {
        let (packed, absmax) = quantize(&values, size);
        let restored = dequantize_blocks(&packed, &absmax, values.len(), size);
        for (i, (x, restored)) in values.iter().zip(restored).enumerate() {
            // The constant is rounded up by 4e-6, which leaves room for the rounding of the quotient (two ulps of 1).
            prop_assert!((restored - x).abs() <= LARGEST_ERROR * absmax[i / size.get()], "value {i}");
        }
    }

    #[test]
    fn the_largest_of_a_block_is_restored_exactly((size, values) in matrices()) {
        let (packed, absmax) = quantize(&values, size);
        let restored = dequantize_blocks(&packed, &absmax, values.len(), size);
        for (i, (&x, restored)) in values.iter().zip(restored).enumerate() {
            let largest = absmax[i / size.get()];
            // In a partial block of zeros the scale is a floor, not a value.
            if x.abs() == largest && x != 0.0 {
                prop_assert_eq!(restored.to_bits(), x.to_bits());
            }
        }
    }

    #[test]
    fn quantising_what_was_restored_changes_nothing((size, values) in matrices()) {
        let (packed, absmax) = quantize(&values, size);
        let restored = dequantize_blocks(&packed, &absmax, values.len(), size);
        let again = quantize(&restored, size);
        prop_assert_eq!(again.0, packed);
        prop_assert_eq!(bits(&again.1), bits(&absmax));
    }

    /// Multiplying by a power of two is exact and so is its reciprocal, while nothing becomes subnormal.
    #[test]
    fn a_power_of_two_scales_the_scales_alone((size, values) in matrices(), exponent in -30..30_i32) {
        let factor = 2_f32.powi(exponent);
        let scaled: Vec<_> = values.iter().map(|x| x * factor).collect();
        let (packed, absmax) = quantize(&values, size);
        let (scaled_packed, scaled_absmax) = quantize(&scaled, size);
        prop_assert_eq!(packed, scaled_packed);
        for (absmax, scaled) in absmax.into_iter().zip(scaled_absmax) {
            let floor = absmax == 1e-38;
            prop_assert_eq!(if floor { absmax } else { absmax * factor }, scaled);
        }
    }

    #[test]
    fn codes_rise_with_the_values_of_a_block((size, values) in matrices()) {
        let (packed, _) = quantize(&values, size);
        let codes = codes(&packed, values.len());
        for (values, codes) in values.chunks(size.get()).zip(codes.chunks(size.get())) {
            let mut pairs: Vec<_> = values.iter().zip(codes).collect();
            pairs.sort_by(|a, b| a.0.total_cmp(b.0));
            prop_assert!(pairs.is_sorted_by_key(|(_, code)| *code));
        }
    }

    #[test]
    fn whole_blocks_do_not_know_their_place(
        size in prop::sample::select(&[32, 64, 128][..]),
        blocks in prop::collection::vec(prop::collection::vec(-9.0_f32..9.0, 128), 1..6),
        rotation in 0..6_usize,
    ) {
        let size = BlockSize::new(size).unwrap();
        let blocks: Vec<_> = blocks.into_iter().map(|mut block| { block.truncate(size.get()); block }).collect();
        let mut moved = blocks.clone();
        moved.rotate_left(rotation % blocks.len());
        let (mut packed, mut absmax) = quantize(&blocks.concat(), size);
        packed.rotate_left(rotation % blocks.len() * size.get() / 2);
        absmax.rotate_left(rotation % blocks.len());
        prop_assert_eq!(quantize(&moved.concat(), size), (packed, absmax));
    }

    /// Any bits at all: a weight with a NaN or an infinity is refused at the first of them, any other is quantised to
    /// scales that are finite and of the right number.
    #[test]
    fn any_bits_give_codes_or_a_named_error(
        size in block_sizes(),
        bits in prop::collection::vec(any::<u32>(), 0..300),
        finite in any::<bool>(),
    ) {
        let float = |bits: u32| match f32::from_bits(bits) {
            x if finite && !x.is_finite() => 0.0,
            x => x,
        };
        let values: Vec<_> = bits.into_iter().map(float).collect();
        let first = values.iter().position(|x| !x.is_finite());
        match (quantize_blocks("w", &values, size), first) {
            (Ok((packed, absmax)), None) => {
                prop_assert_eq!(packed.len(), values.len().div_ceil(2));
                prop_assert_eq!(absmax.len(), values.len().div_ceil(size.get()));
                prop_assert!(dequantize_blocks(&packed, &absmax, values.len(), size).iter().all(|x| x.is_finite()));
            }
            (Err(PeftError::NotFinite { tensor, index, .. }), Some(first)) => {
                prop_assert_eq!((tensor.as_str(), index), ("w", first));
            }
            (result, first) => prop_assert!(false, "{result:?} with the first bad value at {first:?}"),
        }
    }
}

#[test]
fn half_precision_has_no_other_infinities() {
    let size = BlockSize::default();
    for bits in [0x7f80, 0xff80, 0x7fc0, 0xffff] {
        let values = [bf16::ONE, bf16::from_bits(bits)];
        assert!(matches!(
            quantize_blocks("w", &values, size),
            Err(PeftError::NotFinite { index: 1, .. })
        ));
    }
    for bits in [0x7c00, 0xfc00, 0x7e00, 0xffff] {
        let values = [f16::ONE, f16::from_bits(bits)];
        assert!(matches!(
            quantize_blocks("w", &values, size),
            Err(PeftError::NotFinite { index: 1, .. })
        ));
    }
    let values = [bf16::MAX, bf16::MIN];
    assert_eq!(
        quantize_blocks("w", &values, size).unwrap(),
        (vec![0xf0], vec![bf16::MAX.to_f32()])
    );
    let values = [f16::MAX, f16::MIN];
    assert_eq!(
        quantize_blocks("w", &values, size).unwrap(),
        (vec![0xf0], vec![65504.0])
    );
}
