//! Every kernel on every instruction set of this machine, against the plain reference.

use proptest::prelude::*;

use super::codes::Codes;
use super::few_rows::{self, FewRows};
use super::packed::{Packed, Scales};
use super::precision::Precision;
use super::{dequantize::dequantize, row_norms};
use crate::cpu::matmul::element::{F32, Pairs};
use crate::cpu::matmul::low_rank::LowRank;
use crate::cpu::matmul::{many_rows, transposed};
use crate::cpu::output::over;
use crate::cpu::parallel::assert_same_in_pools;
use crate::cpu::simd::Isa;
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

/// `|y - exact| ≤ γ·Σ|terms| + ε·|y|` with `γ = (inner + 4)·u`, `u = 2^-24`: what any order of summation keeps (Higham,
/// "Accuracy and Stability of Numerical Algorithms", section 4.2), with a few roundings for scaling; then the result is
/// rounded to its dtype, which `ε` of it bounds. Operands are exact in their dtypes.
fn check<T: Copy + Into<f32>>(name: &str, isa: Isa, y: &[T], exact: &[(f64, f64)], inner: usize) {
    // Half a unit in the last of eight places.
    let epsilon = match size_of::<T>() {
        2 => 2_f64.powi(-8),
        _ => 0.0,
    };
    let gamma = (inner + 4) as f64 * f64::from(f32::EPSILON) / 2.0;
    for (i, (&y, &(exact, size))) in y.iter().zip(exact).enumerate() {
        let y = f64::from(y.into());
        let sum = gamma * size;
        assert!(
            (y - exact).abs() <= sum + epsilon * (exact.abs() + sum),
            "{name} on {isa:?}: element {i} is {y}, not {exact}"
        );
    }
}

/// The operands of the products with a weight, and their results in f64.
struct Products<'a> {
    w: Packed<'a>,
    /// `[rows, d_in]` and `[rows, d_out]`, exact in bf16 and f16.
    x: Vec<f32>,
    dy: Vec<f32>,
    forward: LowRank<'a>,
    backward: LowRank<'a>,
    y: Vec<(f64, f64)>,
    dx: Vec<(f64, f64)>,
}

impl Products<'_> {
    /// The products in one arithmetic, what is to be overwritten NaN before.
    fn check<E: Codes + FewRows>(&self, isa: Isa) {
        let (w, forward, backward) = (&self.w, self.forward, self.backward);
        let [d_out, d_in] = w.shape;
        let rows = self.x.len() / d_in;
        let values = |values: &[f32]| values.iter().map(|&v| E::round(v)).collect::<Vec<_>>();
        let nan = E::round(f32::NAN);
        if d_in.is_multiple_of(E::PER_WORD) {
            let (x, inner) = (values(&self.x), d_in + forward.rank);
            let y = over(nan, rows * d_out, |y| {
                many_rows::product::<E, _>(isa, w, &x, forward, y)
            });
            check("many rows", isa, &y, &self.y, inner);
            if rows <= few_rows::MOST {
                let y = over(nan, rows * d_out, |y| E::product(isa, w, &x, forward, y));
                check("few rows", isa, &y, &self.y, inner);
            }
        }
        if d_out.is_multiple_of(E::PER_WORD) {
            let (dy, inner) = (values(&self.dy), d_out + backward.rank);
            let dx = over(nan, rows * d_in, |dx| {
                transposed::product::<E, _>(isa, w, &dy, backward, dx)
            });
            check("transposed", isa, &dx, &self.dx, inner);
        }
    }
}

/// All kernels with a weight of this shape. What is to be overwritten is NaN before.
fn check_all(shape: [usize; 2], block_size: usize, double_quant: bool, rows: usize, seed: u64) {
    let [d_out, d_in] = shape;
    let data = weight(shape, block_size, double_quant, seed);
    let w = packed(&data);
    let dense = data.dequantize();
    // Seven bits of them, which every dtype holds.
    let operand = |n, seed| {
        let short = |value: f32| f32::from_bits(value.to_bits() & 0xfffe_0000);
        noise(n, seed).into_iter().map(short).collect::<Vec<_>>()
    };
    let x = operand(rows * d_in, seed + 1);
    let dy = operand(rows * d_out, seed + 2);
    // No term, or one of a rank that is no multiple of anything.
    let rank = [0, 3, 17][seed as usize % 3];
    let [u, v, v_back] = [rows * rank, rank * d_out, rank * d_in].map(|n| noise(n, seed + 3));
    // The inner dimension goes on with the rank.
    let widen = |x: &[f32], n: usize| -> Vec<f32> {
        (0..rows)
            .flat_map(|r| [&x[r * n..(r + 1) * n], &u[r * rank..(r + 1) * rank]].concat())
            .collect()
    };
    let [x_wide, dy_wide] = [widen(&x, d_in), widen(&dy, d_out)];
    let products = |precision: Precision| {
        let dense: Vec<_> = dense.iter().map(|&value| precision.round(value)).collect();
        let forward = |o: usize, k: usize| match k < d_in {
            true => dense[o * d_in + k],
            false => v[(k - d_in) * d_out + o],
        };
        let backward = |i: usize, k: usize| match k < d_out {
            true => dense[k * d_in + i],
            false => v_back[(k - d_out) * d_in + i],
        };
        Products {
            w: w.rounded_to(precision),
            x: x.clone(),
            dy: dy.clone(),
            forward: LowRank { rank, u: &u, v: &v },
            backward: LowRank {
                rank,
                u: &u,
                v: &v_back,
            },
            y: reference(&x_wide, forward, [rows, d_out, d_in + rank]),
            dx: reference(&dy_wide, backward, [rows, d_in, d_out + rank]),
        }
    };
    let precisions = [Precision::F32, Precision::Bf16, Precision::F16].map(products);
    let squares: Vec<_> = dense
        .chunks(d_in)
        .map(|row| row.iter().map(|&v| f64::from(v).powi(2)).sum())
        .map(|sum: f64| (sum, sum))
        .collect();
    for isa in Isa::available() {
        let mut values = vec![f32::NAN; d_out * d_in];
        dequantize(isa, &w, &mut values);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&values), bits(&dense), "dequantised on {isa:?}");
        let mut norms = vec![f32::NAN; d_out];
        row_norms::squared(isa, &w, &mut norms);
        check("row norms", isa, &norms, &squares, d_in);
        for products in &precisions {
            products.check::<F32>(isa);
        }
        precisions[1].check::<Pairs>(isa);
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
fn the_number_of_threads_changes_no_bit() {
    fn check<E: Codes + FewRows>(w: &Packed) {
        let [d_out, d_in] = w.shape;
        let isa = Isa::best();
        for rows in [1, 8, 40] {
            let operand = |n| noise(n, 3).into_iter().map(E::round).collect::<Vec<_>>();
            let (x, dy) = (operand(rows * d_in), operand(rows * d_out));
            let wide = |values: Vec<E::Value>| values.into_iter().map(|v| v.into()).collect();
            let nan = E::round(f32::NAN);
            assert_same_in_pools("many rows", || -> Vec<f32> {
                wide(over(nan, rows * d_out, |y| {
                    many_rows::product::<E, _>(isa, w, &x, LowRank::NONE, y)
                }))
            });
            if rows <= few_rows::MOST {
                assert_same_in_pools("few rows", || -> Vec<f32> {
                    wide(over(nan, rows * d_out, |y| {
                        E::product(isa, w, &x, LowRank::NONE, y)
                    }))
                });
            }
            assert_same_in_pools("transposed", || -> Vec<f32> {
                wide(over(nan, rows * d_in, |dx| {
                    transposed::product::<E, _>(isa, w, &dy, LowRank::NONE, dx)
                }))
            });
        }
    }
    let data = weight([402, 576], 64, true, 4);
    let w = packed(&data);
    check::<F32>(&w);
    check::<F32>(&w.rounded_to(Precision::F16));
    check::<Pairs>(&w.rounded_to(Precision::Bf16));
    assert_same_in_pools("row norms", || {
        let mut norms = vec![f32::NAN; 402];
        row_norms::squared(Isa::best(), &w, &mut norms);
        norms
    });
}

/// Large enough for the pool.
#[test]
fn threads_share_nothing() {
    for rows in [1, 8, 40] {
        check_all([777, 1088], 64, true, rows, 3);
    }
}
