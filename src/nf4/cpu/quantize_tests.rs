//! Quantising and dequantising on every instruction set of this machine, bit for bit against the plain reference.

use half::{bf16, f16};
use proptest::prelude::*;

use super::columns::Columns;
use super::dequantize::dequantize;
use super::packed::{Packed, Scales};
use super::quantize::{Widened, quantize};
use crate::cpu::simd::cells;
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch};
use crate::nf4::blocks::{BLOCK_SIZES, BlockSize, dequantize_blocks, quantize_blocks_into};
use crate::nf4::codebook::{self, THRESHOLDS};
use crate::nf4::double::DoubleAbsmax;

/// What quantising fills, beginning from bytes and scales that no result has.
type Quantized = (Result<(), usize>, Vec<u8>, Vec<u32>);

fn quantized(
    n: usize,
    size: BlockSize,
    f: impl FnOnce(&mut [u8], &mut [f32]) -> Result<(), usize>,
) -> Quantized {
    let mut codes = vec![0xa5; n.div_ceil(2)];
    let mut absmax = vec![-1.0; size.blocks(n)];
    let result = f(&mut codes, &mut absmax);
    match result {
        Ok(()) => (
            result,
            codes,
            absmax.into_iter().map(f32::to_bits).collect(),
        ),
        // What a failed call leaves behind is nobody's concern.
        Err(_) => (result, Vec::new(), Vec::new()),
    }
}

fn check<T: Widened>(values: &[T], size: BlockSize) {
    let expected = quantized(values.len(), size, |codes, absmax| {
        quantize_blocks_into(values, size, codes, absmax)
    });
    for isa in Isa::available() {
        let found = quantized(values.len(), size, |codes, absmax| {
            quantize(isa, values, size, codes, absmax)
        });
        assert!(
            found == expected,
            "{isa:?}, {size:?}: {:?} is not {:?}",
            found.0,
            expected.0
        );
    }
}

/// A matrix of `shape` that lies transposed, its rows `stride` apart.
fn check_columns<T: Widened>(values: &[T], stride: usize, shape: [usize; 2], size: BlockSize) {
    let [d_out, d_in] = shape;
    let n = d_out * d_in;
    let transposed: Vec<_> = (0..n)
        .map(|i| values[i % d_in * stride + i / d_in])
        .collect();
    let expected = quantized(n, size, |codes, absmax| {
        quantize_blocks_into(&transposed, size, codes, absmax)
    });
    let columns = Columns::new(values, stride, shape);
    for isa in Isa::available() {
        let found = quantized(n, size, |codes, absmax| {
            columns.quantize(isa, size, codes, absmax)
        });
        assert!(
            found == expected,
            "{isa:?}, {shape:?} of {stride}, {size:?}: {:?} is not {:?}",
            found.0,
            expected.0
        );
    }
}

fn sizes() -> impl Iterator<Item = BlockSize> {
    BLOCK_SIZES
        .into_iter()
        .map(|size| BlockSize::new(size).unwrap())
}

/// The codes that an instruction set finds for values of `[-1, 1]`.
struct Codes<'a>(&'a [f32], &'a mut [u32]);

impl Kernel for Codes<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (values, codes) in self.0.chunks(S::LANES).zip(self.1.chunks_mut(S::LANES)) {
            let mut padded = [0.0; 16];
            padded[..values.len()].copy_from_slice(values);
            let mut words = [0; 16];
            // SAFETY: no vector has more than sixteen lanes.
            unsafe { S::store_words(words.as_mut_ptr(), S::nearest(S::load(padded.as_ptr()))) };
            codes.copy_from_slice(&words[..codes.len()]);
        }
    }
}

fn check_codes(values: &[f32]) {
    let expected: Vec<_> = values
        .iter()
        .map(|&s| u32::from(codebook::nearest(s)))
        .collect();
    for isa in Isa::available() {
        let mut found = vec![99; values.len()];
        dispatch(isa, Codes(values, &mut found));
        if let Some(i) = (0..values.len()).find(|&i| found[i] != expected[i]) {
            panic!(
                "{isa:?}: the code of {:e} is {}, not {}",
                values[i], expected[i], found[i]
            );
        }
    }
}

/// `count` neighbours of `at` on either side, and itself.
fn around(at: f32, count: i32) -> impl Iterator<Item = f32> {
    // The bits of a magnitude count ulps; across zero they are mirrored.
    let rank = |x: f32| match x.is_sign_negative() {
        true => -((x.to_bits() & 0x7fff_ffff) as i32),
        false => x.to_bits() as i32,
    };
    let rank = rank(at);
    (-count..=count).map(move |by| {
        let rank = rank + by;
        f32::from_bits(rank.unsigned_abs()).copysign(rank as f32)
    })
}

#[test]
fn codes_are_exact_around_every_threshold_border_and_end() {
    let borders = (-16..16).map(|k| (k as f32 + 0.5) / cells::SCALE);
    let points: Vec<_> = THRESHOLDS
        .into_iter()
        .chain(borders.filter(|border| border.abs() <= 1.0))
        .chain(codebook::CODEBOOK)
        .collect();
    for point in points {
        let values: Vec<_> = around(point, 5000).filter(|s| s.abs() <= 1.0001).collect();
        check_codes(&values);
    }
}

/// Every 251st f32 of `[-1, 1]`: eight million.
#[test]
fn codes_are_exact_all_over() {
    let one = 1_f32.to_bits();
    let values: Vec<_> = (0..=one)
        .step_by(251)
        .chain([one])
        .flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)])
        .collect();
    check_codes(&values);
}

/// Minutes without optimisation, so not by default: `cargo test --release --lib -- --ignored every_f32`.
#[test]
#[ignore = "two billion values"]
fn codes_are_exact_for_every_f32() {
    let one = 1_f32.to_bits() + 8;
    for first in (0..=one).step_by(1 << 20) {
        let magnitudes = (first..=one.min(first + (1 << 20) - 1)).map(f32::from_bits);
        check_codes(&magnitudes.flat_map(|x| [x, -x]).collect::<Vec<_>>());
    }
}

/// Values whose products with the reciprocal fall on thresholds and their neighbours, for many scales.
#[test]
fn blocks_are_exact_around_thresholds_at_every_scale() {
    for exponent in -149..128 {
        for significand in [1.0, 1.000_000_1, 1.333_333_4, 1.75, 1.999_999_9] {
            let scale = (significand * 2_f64.powi(exponent)) as f32;
            if scale == 0.0 || !scale.is_finite() {
                continue;
            }
            let values: Vec<_> = THRESHOLDS
                .iter()
                .flat_map(|&t| around(t * scale, 3))
                .filter(|x| x.abs() <= scale)
                .collect();
            // One block of 32 for each 31 values, with its scale in front, alternating in sign.
            let blocks = values.chunks(31).enumerate();
            let values: Vec<_> = blocks
                .flat_map(|(i, values)| {
                    let mut block = vec![if i % 2 == 0 { scale } else { -scale }];
                    block.extend(values);
                    block.resize(32, 0.0);
                    block
                })
                .collect();
            check(&values, BlockSize::new(32).unwrap());
            check(&values[..values.len() - 5], BlockSize::new(64).unwrap());
        }
    }
}

/// All 65536 values of 16 bits: those that are finite in blocks of one magnitude and in blocks of all, and the others
/// one by one.
#[test]
fn every_value_of_sixteen_bits() {
    fn check_all<T: Widened>(of_bits: impl Fn(u16) -> T) {
        let (finite, bad): (Vec<_>, Vec<_>) = (0..=u16::MAX)
            .map(of_bits)
            .partition(|&x| x.into().is_finite());
        // Far apart values side by side.
        let stride = 40_503;
        let mixed: Vec<_> = (0..finite.len())
            .map(|i| finite[i * stride % finite.len()])
            .collect();
        for size in sizes() {
            check(&finite, size);
            check(&mixed, size);
        }
        for (i, &bad) in bad.iter().enumerate() {
            let mut values = finite[..4200].to_vec();
            values[i % 4200] = bad;
            check(&values, BlockSize::new(BLOCK_SIZES[i % 8]).unwrap());
        }
    }
    check_all(bf16::from_bits);
    check_all(f16::from_bits);
}

/// Numbers of any magnitude, among them zeros and subnormals.
fn any_number() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -1.0_f32..1.0,
        4 => any::<f32>().prop_map(|x| if x.is_finite() { x } else { 0.0 }),
        2 => prop_oneof![Just(0.0_f32), Just(-0.0)],
        2 => (0_u32..0x0090_0000, any::<bool>())
            .prop_map(|(bits, negative)| f32::from_bits(bits | u32::from(negative) << 31)),
    ]
}

/// Several tasks, the last one partial.
#[test]
fn large_transposed_weights() {
    for shape in [[300, 1024], [1000, 200], [70_000, 1], [1, 70_000]] {
        let [d_out, d_in] = shape;
        let mut values: Vec<_> = (0..d_in * d_out).map(|i| (i as f32 * 0.7).sin()).collect();
        check_columns(&values, d_out, shape, BlockSize::default());
        for index in [5, values.len() / 2 + 3, values.len() - 1] {
            values[index] = f32::INFINITY;
            check_columns(&values, d_out, shape, BlockSize::default());
        }
    }
    check_columns::<f32>(&[], 0, [0, 5], BlockSize::default());
    check_columns::<f32>(&[], 5, [5, 0], BlockSize::default());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn quantising_agrees_with_the_reference(
        numbers in prop::collection::vec(any_number(), 1..500),
        n in prop_oneof![0_usize..300, 300_usize..20_000],
        block in 0_usize..BLOCK_SIZES.len(),
        bad in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..3), 0..3),
        any_bad in 0_u32..4,
    ) {
        let mut values: Vec<_> = (0..n).map(|i| numbers[i * i % numbers.len()]).collect();
        if any_bad == 0 && n > 0 {
            for (at, kind) in bad {
                values[at.index(n)] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][kind];
            }
        }
        let size = BlockSize::new(BLOCK_SIZES[block]).unwrap();
        check(&values, size);
        check(&values.iter().copied().map(bf16::from_f32).collect::<Vec<_>>(), size);
        check(&values.iter().copied().map(f16::from_f32).collect::<Vec<_>>(), size);
    }

    #[test]
    fn quantising_a_transposed_weight_agrees_with_the_reference(
        numbers in prop::collection::vec(any_number(), 1..500),
        block in 0_usize..BLOCK_SIZES.len(),
        // Whole blocks a row, or any length.
        (d_in, aligned) in prop_oneof![(1_usize..4, Just(true)), (1_usize..200, Just(false))],
        d_out in prop_oneof![1_usize..40, 40_usize..300],
        beside in prop_oneof![Just(0_usize), 1_usize..20],
        bad in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..3), 0..3),
        any_bad in 0_u32..4,
    ) {
        let size = BlockSize::new(BLOCK_SIZES[block]).unwrap();
        let (d_in, d_out) = match aligned {
            true => (d_in * size.get(), d_out.min(200_000 / size.get())),
            false => (d_in, d_out),
        };
        let stride = d_out + beside;
        let n = d_in * stride;
        let mut values: Vec<_> = (0..n).map(|i| numbers[i * i % numbers.len()]).collect();
        if any_bad == 0 {
            for (at, kind) in bad {
                values[at.index(n)] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][kind];
            }
        }
        let shape = [d_out, d_in];
        check_columns(&values, stride, shape, size);
        check_columns(&values.iter().copied().map(bf16::from_f32).collect::<Vec<_>>(), stride, shape, size);
        check_columns(&values.iter().copied().map(f16::from_f32).collect::<Vec<_>>(), stride, shape, size);
    }

    /// f32 as the reference has it; bf16 and f16 as `half` rounds that, to the bit, subnormals and infinities included.
    #[test]
    fn dequantising_agrees_with_the_reference(
        codes in prop::collection::vec(any::<u8>(), 1..300),
        scales in prop::collection::vec(any_number(), 1..300),
        n in prop_oneof![0_usize..300, 300_usize..20_000, Just(200_001_usize)],
        block in 0_usize..BLOCK_SIZES.len(),
        double_quant: bool,
    ) {
        let size = BlockSize::new(BLOCK_SIZES[block]).unwrap();
        let codes: Vec<_> = (0..n.div_ceil(2)).map(|i| codes[i * i % codes.len()]).collect();
        let scales: Vec<_> = (0..size.blocks(n)).map(|i| scales[i % scales.len()].abs() / 4.0).collect();
        let double = DoubleAbsmax::quantize(&scales);
        let (w, scales) = match double_quant {
            false => (Scales::Plain(&scales), scales.clone()),
            true => (Scales::Double(&double.codes, &double.absmax, double.offset), double.dequantize()),
        };
        let w = Packed::new(&codes, w, [1, n], size.get());
        let expected = dequantize_blocks(&codes, &scales, n, size);
        for isa in Isa::available() {
            let mut f32s = vec![f32::NAN; n];
            dequantize(isa, &w, &mut f32s);
            let mut f64s = vec![f64::NAN; n];
            dequantize(isa, &w, &mut f64s);
            let mut bf16s = vec![bf16::NAN; n];
            dequantize(isa, &w, &mut bf16s);
            let mut f16s = vec![f16::NAN; n];
            dequantize(isa, &w, &mut f16s);
            for (i, &x) in expected.iter().enumerate() {
                prop_assert_eq!(f32s[i].to_bits(), x.to_bits(), "f32 {} on {:?}", i, isa);
                prop_assert_eq!(f64s[i].to_bits(), f64::from(x).to_bits(), "f64 {} on {:?}", i, isa);
                prop_assert_eq!(bf16s[i].to_bits(), bf16::from_f32(x).to_bits(), "bf16 {} on {:?}", i, isa);
                prop_assert_eq!(f16s[i].to_bits(), f16::from_f32(x).to_bits(), "f16 {} on {:?}", i, isa);
            }
        }
    }
}
