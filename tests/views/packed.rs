//! Weights packed in NF4: quantising a view, and products with views.

use burn::tensor::{DType, Tensor};
use burn_peft::nf4::{BlockSize, Nf4Config, Nf4Weight};
use proptest::prelude::*;

use super::{Operand, bound, compare, dtypes, grad, side, then, values, view};

fn config(double: bool, block: usize) -> Nf4Config {
    Nf4Config::new()
        .with_double_quant(double)
        .with_block_size(BlockSize::new(block).unwrap())
}

/// `[d_out, d_in]`, packed, and what a product with operands of `dtype` takes: the values rounded to it.
fn weight([d_out, d_in]: [usize; 2], config: &Nf4Config, dtype: DType) -> (Nf4Weight, Tensor<2>) {
    let dense = super::View::plain(2)
        .operand([d_in, d_out], DType::F32, 7)
        .view;
    let packed = Nf4Weight::quantize("w", dense.inner(), config).unwrap();
    let device = burn::tensor::Device::default().autodiff();
    let dense = packed.dequantize(dtype.into()).cast(DType::F64).into_data();
    (packed, Tensor::from_data(dense, (&device, DType::F64)))
}

/// `a · b` of f64, of which any side may be zero.
fn product(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    // By sums, which Burn computes of nothing too.
    let [m, k] = a.dims();
    let n = b.dims()[1];
    match [m, k, n].contains(&0) {
        true => a.sum_dim(1) + b.sum_dim(0),
        false => a.matmul(b),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn quantising(
        (d_in, d_out) in (side(80), side(40)),
        view in view(2),
        double in any::<bool>(),
        dtype in dtypes(),
    ) {
        let weight = view.operand([d_in, d_out], dtype, 3);
        let config = config(double, 32);
        let found = Nf4Weight::quantize("w", weight.view.inner(), &config).unwrap();
        let plain = weight.wide.inner().cast(DType::F32);
        let expected = Nf4Weight::quantize("w", plain, &config).unwrap();
        prop_assert_eq!(found.to_data(), expected.to_data());
        prop_assert_eq!(found.shape(), [d_out, d_in]);
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let dense = found.dequantize(dtype.into());
            prop_assert_eq!(dense.dims(), [d_out, d_in]);
        }
        let norms = values(found.row_norms_squared());
        let squares = values(found.dequantize(DType::F64.into()).square());
        for (row, norm) in norms.iter().enumerate() {
            let expected: f64 = squares[row * d_in..(row + 1) * d_in].iter().sum();
            prop_assert!((norm - expected).abs() <= 1e-5 * expected);
        }
    }

    #[test]
    fn products(
        (rows, d_in, d_out) in (side(40), side(140), side(80)),
        views in (view(2), view(2)),
        (double, block) in (any::<bool>(), prop_oneof![Just(32), Just(64), Just(128)]),
        (dtype, then) in (dtypes(), then()),
    ) {
        let (packed, dense) = weight([d_out, d_in], &config(double, block), dtype);
        let x = views.0.operand([rows, d_in], dtype, 1);
        compare(
            "matmul",
            (packed.matmul(x.view.clone()), vec![("x", grad(&x.view))]),
            (product(x.wide.clone(), dense.clone().transpose()), vec![("x", grad(&x.wide))]),
            then,
            bound(dtype),
        );
        let y = views.1.operand([rows, d_out], dtype, 2);
        compare(
            "matmul_transposed",
            (packed.matmul_transposed(y.view.clone()), vec![("y", grad(&y.view))]),
            (product(y.wide.clone(), dense), vec![("y", grad(&y.wide))]),
            then,
            bound(dtype),
        );
    }

    #[test]
    fn products_with_a_low_rank_change(
        (rows, d_in, d_out, rank) in (side(40), side(140), side(80), side(20)),
        views in (view(2), view(2), view(2)),
        double in any::<bool>(),
        (dtype, factors, then) in (dtypes(), dtypes(), then()),
    ) {
        let (packed, dense) = weight([d_out, d_in], &config(double, 64), dtype);
        let x = views.0.operand([rows, d_in], dtype, 1);
        let a = views.1.operand([d_in, rank], factors, 2);
        let b = views.2.operand([rank, d_out], factors, 3);
        let found = packed.matmul_low_rank(x.view.clone(), a.view.clone(), b.view.clone(), 0.5);
        let change = product(product(x.wide.clone(), a.wide.clone()), b.wide.clone()) * 0.5;
        let expected = product(x.wide.clone(), dense.transpose()) + change;
        let asked = |x, a, b| vec![("x", grad(x)), ("a", grad(a)), ("b", grad(b))];
        let bound = bound(dtype).max(bound(factors));
        compare(
            "matmul_low_rank",
            (found, asked(&x.view, &a.view, &b.view)),
            (expected, asked(&x.wide, &a.wide, &b.wide)),
            then,
            bound,
        );
    }
}

/// What the review found: a factor that is a column slice of a wider one.
#[test]
fn a_factor_that_is_a_column_slice() {
    let (packed, dense) = weight([64, 64], &config(false, 64), DType::F32);
    let both: Operand<2> = super::View::plain(2).operand([64, 16], DType::F32, 5);
    let x: Operand<2> = super::View::plain(2).operand([9, 64], DType::F32, 6);
    let b: Operand<2> = super::View::plain(2).operand([8, 64], DType::F32, 7);
    for first in [0, 3, 8] {
        let [a, a_wide] = [&both.view, &both.wide].map(|t| t.clone().narrow(1, first, 8));
        let found = packed.matmul_low_rank(x.view.clone(), a, b.view.clone(), 1.0);
        let change = x.wide.clone().matmul(a_wide).matmul(b.wide.clone());
        let expected = x.wide.clone().matmul(dense.clone().transpose()) + change;
        super::near("y", &values(found), &values(expected), 1e-5);
    }
}

/// Sampling takes a row at a time, a loss many: both multiply the same weight, that of bitsandbytes, rounded to the dtype of `x`.
///
/// `|y - exact| ≤ γ·Σ|terms| + ε·|y|`: `γ` for sums in f32 in any order, `ε` for the result's own rounding. A weight that is rounded
/// elsewhere, or not at all, is beyond that.
#[test]
fn a_row_alone_and_among_many_meet_one_weight() {
    let (d_out, d_in) = (48, 512);
    for (dtype, epsilon) in [
        (DType::F32, 0.0),
        (DType::BF16, 2f64.powi(-8)),
        (DType::F16, 2f64.powi(-11)),
    ] {
        for double in [false, true] {
            let (packed, dense) = weight([d_out, d_in], &config(double, 64), dtype);
            let weight = values(dense);
            let x: Operand<2> = super::View::plain(2).operand([40, d_in], DType::BF16, 9);
            let x = x.view.cast(dtype);
            let rows = values(x.clone());
            for count in [1, 2, 8, 9, 40] {
                let y = values(packed.matmul(x.clone().narrow(0, 40 - count, count)));
                for (i, found) in y.into_iter().enumerate() {
                    let (row, o) = (40 - count + i / d_out, i % d_out);
                    let terms = (0..d_in).map(|k| rows[row * d_in + k] * weight[o * d_in + k]);
                    let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| {
                        (sum + term, size + f64::abs(term))
                    });
                    let of_sums = (d_in + 4) as f64 * 2f64.powi(-24) * size;
                    let bound = of_sums + epsilon * (f64::abs(sum) + of_sums);
                    assert!(
                        (found - sum).abs() <= bound,
                        "{dtype:?}, {count} rows: {found}, not {sum}"
                    );
                }
            }
        }
    }
}
