//! What the factors are.

use burn_peft::adapter::{LoraConfig, LoraInit};
use burn_peft::layer::LoraLinear;
use burn_peft::{PeftError, Result};

use super::*;

/// Falling singular values with a gap after the fourth.
const SIGMA: [f32; 8] = [9.0, 7.0, 6.0, 5.0, 2.0, 1.0, 0.5, 0.25];
const RANK: usize = 4;

/// Sums of at most 48 terms of order 1 to 10, in f32, and a decomposition stable to a few units of rounding of `‖W‖`.
const CLOSE: f32 = 2e-5;

/// A subspace turns by the decomposition's error over the gap in the singular values (Wedin, 1972). Over 3200 random weights that was
/// 3e-7 in the middle, 1e-5 in one of a hundred and 7e-5 at most; of a vector that is another it is of order 1.
const ANGLE: f32 = 1e-3;

fn layer(init: LoraInit, weight: &Tensor<2>) -> LoraLinear {
    LoraLinear::from_linear(linear(weight), &config(init, RANK)).unwrap()
}

#[test]
fn pissa_takes_the_largest_singular_values_in_equal_parts() {
    for (d_in, d_out) in [(24, 48), (48, 24)] {
        let [u, v, weight] = with_singular_values(d_in, d_out, &SIGMA);
        for init in [LoraInit::Pissa, LoraInit::PissaFast { iterations: 16 }] {
            let lora = layer(init, &weight).delta;
            let (a, b) = (lora.a.val(), lora.b.val());
            let product = a.clone().matmul(b.clone()) * lora.scale();
            // The best of rank 4: what remains has the norm of the other singular values.
            let rest = SIGMA[RANK..].iter().map(|s| s * s).sum::<f32>().sqrt();
            let found = norm(&(weight.clone() - product));
            assert!(
                (found - rest).abs() < CLOSE * SIGMA[0],
                "{init:?}: {found}, not {rest}"
            );
            // Singular values by equal parts: AᵀA = BBᵀ = diag(σ/s).
            let sigma = Tensor::<1>::from_floats(&SIGMA[..RANK], &device()) / lora.scale();
            let sigma = identity(RANK) * sigma.unsqueeze();
            assert!(error(&a.clone().transpose().matmul(a.clone()), &sigma) < CLOSE);
            assert!(error(&b.clone().matmul(b.clone().transpose()), &sigma) < CLOSE);
            // No angle between the subspaces: nothing of A is outside U_r, nothing of B outside V_r.
            for (factor, basis) in [(a, &u), (b.transpose(), &v)] {
                let basis = basis.clone().narrow(1, 0, RANK);
                let inside = basis
                    .clone()
                    .matmul(basis.transpose().matmul(factor.clone()));
                let outside = error(&inside, &factor);
                assert!(outside < ANGLE, "{init:?}: {outside}");
            }
        }
    }
}

#[test]
fn olora_takes_the_first_rows_of_the_weight_with_an_orthonormal_basis() {
    for (d_in, d_out) in [(24, 48), (48, 24)] {
        let weight = random([d_in, d_out]);
        let lora = layer(LoraInit::Olora, &weight).delta;
        let (a, b) = (lora.a.val(), lora.b.val());
        let gram = b.clone().matmul(b.clone().transpose());
        assert!(error(&gram, &identity(RANK)) < CLOSE);
        // A is R's first rows, transposed: lower triangular.
        for (i, row) in values(&a).chunks(RANK).enumerate() {
            assert!(row.iter().skip(i + 1).all(|value| *value == 0.0), "row {i}");
        }
        // R's first columns have nothing below its first rows.
        let first = |matrix: Tensor<2>| matrix.narrow(0, 0, RANK);
        assert!(error(&first(a.matmul(b)), &first(weight)) < CLOSE);
    }
}

#[test]
fn orthogonal_factors_are_not_zero_and_their_product_is() {
    let (d_in, d_out, rank) = (300, 200, 8);
    let lora = config(LoraInit::Orthogonal, rank)
        .init(d_in, d_out, &device())
        .unwrap();
    let (a, b) = (lora.a.val(), lora.b.val());
    // Each is 1/10 of a normal [d, r/2] times r/2 orthonormal rows, so its squares add up to about d·(r/2)/100. The
    // relative standard deviation of such a sum is √(2/(d·r/2)), 5 % at most: 20 % is four of it.
    for (factor, d) in [(&a, d_in), (&b, d_out)] {
        let expected = (d * rank / 2) as f32 / 100.0;
        let found = norm(factor).powi(2);
        assert!(
            (found / expected - 1.0).abs() < 0.2,
            "{found}, not {expected}"
        );
    }
    let product = norm(&a.clone().matmul(b.clone()));
    // Rounding of orthogonality, times the norms.
    assert!(product < 1e-6 * norm(&a) * norm(&b), "{product}");
    let odd = config(LoraInit::Orthogonal, 5).init(d_in, d_out, &device());
    assert!(matches!(odd, Err(PeftError::Config { name, .. }) if name == "rank"));
}

#[test]
fn what_cannot_be_is_an_error_that_says_why() {
    let refused = |config: LoraConfig, weight: Tensor<2>| -> Result<LoraLinear> {
        LoraLinear::from_linear(linear(&weight), &config)
    };
    let name = |result: Result<LoraLinear>| match result {
        Err(PeftError::Config { name, .. }) => name,
        other => panic!("{other:?}"),
    };
    for init in FOLDED {
        assert_eq!(name(refused(config(init, 9), random([8, 12]))), "rank");
        assert_eq!(
            name(refused(config(init, 2).with_alpha(-1.0), random([8, 12]))),
            "alpha"
        );
        let alone = config(init, 2).init(8, 12, &device());
        assert!(matches!(alone, Err(PeftError::Config { name, .. }) if name == "init"));
        let broken = random([8, 12]).slice_fill([3..4, 5..6], f32::NAN);
        let error = refused(config(init, 2), broken);
        assert!(
            matches!(error, Err(PeftError::NotFinite { index: 41, .. })),
            "{error:?}"
        );
    }
}
