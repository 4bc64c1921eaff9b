//! Every kernel on every instruction set of this machine, against the plain reference.

use proptest::prelude::*;

use super::packed::{Packed, Scales};
use super::simd::Isa;
use super::{dequantize::dequantize, few_rows, many_rows, transposed};
use crate::nf4::blocks::{BLOCK_SIZES, BlockSize};
use crate::nf4::{Nf4Config, Nf4Data, Nf4Scales};

/// Numbers of no structure, of a magnitude between `2^-7` and 1, reproducible.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let bits = (state >> 40) as f32 / (1 << 24) as f32;
            (bits - 0.5) * [0.015625, 0.5, 2.0][(state & 255) as usize % 3]
        })
        .collect()
}

fn weight(shape: [usize; 2], block_size: usize, double_quant: bool, seed: u64) -> Nf4Data {
    let config = Nf4Config::new()
        .with_block_size(BlockSize::new(block_size).unwrap())
        .with_double_quant(double_quant);
    Nf4Data::quantize("w", &noise(shape[0] * shape[1], seed), shape, &config).unwrap()
}

fn packed(data: &Nf4Data) -> Packed<'_> {
    let scales = match data.scales() {
        Nf4Scales::Plain(absmax) => Scales::Plain(absmax),
        Nf4Scales::Double(double) => {
            Scales::Double(double.codes(), double.absmax(), double.offset())
        }
    };
    Packed::new(data.codes(), scales, data.shape(), data.block_size().get())
}

/// `a [rows, inner] · b [columns, inner]ᵀ` in f64, and for each element the sum of magnitudes.
fn reference(
    a: &[f32],
    b: impl Fn(usize, usize) -> f32,
    [rows, columns, inner]: [usize; 3],
) -> Vec<(f64, f64)> {
    (0..rows * columns)
        .map(|i| {
            let (row, column) = (i / columns, i % columns);
            (0..inner)
                .map(|k| f64::from(a[row * inner + k]) * f64::from(b(column, k)))
                .fold((0.0, 0.0), |(sum, size), term| {
                    (sum + term, size + term.abs())
                })
        })
        .collect()
}

/// `|y - exact| ≤ γ·Σ|terms|` with `γ = (inner + 4)·u`, `u = 2^-24`: what any order of summation keeps (Higham,
/// "Accuracy and Stability of Numerical Algorithms", section 4.2), with a few roundings for scaling.
fn check(name: &str, isa: Isa, y: &[f32], exact: &[(f64, f64)], inner: usize) {
    let gamma = (inner + 4) as f64 * f64::from(f32::EPSILON) / 2.0;
    for (i, (&y, &(exact, size))) in y.iter().zip(exact).enumerate() {
        let error = (f64::from(y) - exact).abs();
        assert!(
            error <= gamma * size,
            "{name} on {isa:?}: element {i} is {y}, not {exact}"
        );
    }
}

/// All kernels with a weight of this shape. What is to be overwritten is NaN before.
fn check_all(shape: [usize; 2], block_size: usize, double_quant: bool, rows: usize, seed: u64) {
    let [d_out, d_in] = shape;
    let data = weight(shape, block_size, double_quant, seed);
    let w = packed(&data);
    let dense = data.dequantize();
    let x = noise(rows * d_in, seed + 1);
    let dy = noise(rows * d_out, seed + 2);
    let y_exact = reference(&x, |o, i| dense[o * d_in + i], [rows, d_out, d_in]);
    let x_exact = reference(&dy, |i, o| dense[o * d_in + i], [rows, d_in, d_out]);
    for isa in Isa::available() {
        let mut values = vec![f32::NAN; d_out * d_in];
        dequantize(isa, &w, &mut values);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&values), bits(&dense), "dequantised on {isa:?}");

        let mut y = vec![f32::NAN; rows * d_out];
        many_rows::product(isa, &w, &x, &mut y);
        check("many rows", isa, &y, &y_exact, d_in);
        if rows <= few_rows::MOST {
            y.fill(f32::NAN);
            few_rows::product(isa, &w, &x, &mut y);
            check("few rows", isa, &y, &y_exact, d_in);
        }
        let mut dx = vec![f32::NAN; rows * d_in];
        transposed::product(isa, &w, &dy, &mut dx);
        check("transposed", isa, &dx, &x_exact, d_out);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn kernels_agree_with_the_reference(
        shape in prop_oneof![
            (1_usize..200, 1_usize..200),
            (1_usize..24, prop_oneof![Just(64_usize), Just(128), Just(576), Just(640), Just(1024), Just(1096)]),
            (Just(600_usize), 1_usize..70),
        ],
        block in 0_usize..BLOCK_SIZES.len(),
        double_quant: bool,
        rows in prop_oneof![1_usize..12, 12_usize..150],
        seed in 0_u64..1000,
    ) {
        check_all([shape.0, shape.1], BLOCK_SIZES[block], double_quant, rows, seed);
    }
}

#[test]
fn every_count_of_rows_up_to_beyond_a_tile() {
    for rows in 1..=70 {
        check_all([50, 160], 32, rows % 2 == 0, rows, rows as u64);
    }
}

#[test]
fn more_rows_than_are_taken_at_a_time() {
    check_all([30, 70], 64, false, 1100, 1);
}

/// Large enough for the pool.
#[test]
fn threads_share_nothing() {
    for rows in [1, 8, 40] {
        check_all([777, 1088], 64, true, rows, 3);
    }
}
