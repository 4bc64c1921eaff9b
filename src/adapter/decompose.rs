//! Decompositions of a weight, by faer, on the host and in f32: `M = U·diag(σ)·Vᵀ` and `M = Q·R`.
//!
//! `M [m, n]`, `k = min(m, n)`; `U [m, k]`, `V [n, k]` and `Q [m, k]` have orthonormal columns, `σ` falls, `R [k, n]` is upper
//! triangular. Signs are the library's, so nothing here may depend on them.
//!
//! The randomised SVD is algorithm 5.1 on the range found by algorithm 4.4 of Halko, Martinsson and Tropp, 2011
//! (arXiv:0909.4061), with a QR in every half step, as torch's `svd_lowrank`; unlike that it draws a few columns more than
//! it keeps.

use burn::tensor::{Device, Distribution, FloatDType, Tensor, TensorData};
use faer::{Mat, MatRef};

use super::cast;
use crate::{PeftError, Result};

/// Columns that the randomised SVD draws beyond the rank; 5 to 10 make its error a small factor of the best one's.
const OVERSAMPLING: usize = 10;

/// The singular values and vectors kept of a matrix.
pub(super) struct Svd {
    /// `U [m, k]`.
    pub u: Mat<f32>,
    /// `σ [k]`, falling.
    pub values: Vec<f32>,
    /// `V [n, k]`.
    pub v: Mat<f32>,
}

/// The matrix on the host, in f32.
///
/// # Errors
///
/// [`PeftError::NotFinite`] for what would make a decomposition meaningless; [`PeftError::DeviceRead`].
pub(super) fn to_host(name: &str, tensor: &Tensor<2>) -> Result<Mat<f32>> {
    let [rows, columns] = tensor.dims();
    let tensor = cast(tensor.clone(), FloatDType::F32).without_autodiff();
    let data = tensor.try_into_data().map_err(|error| error.to_string());
    let values = data.and_then(|data| data.try_into_vec::<f32>().map_err(|e| format!("{e:?}")));
    let values = values.map_err(|reason| PeftError::DeviceRead {
        tensor: name.into(),
        reason,
    })?;
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        return Err(PeftError::NotFinite {
            tensor: name.into(),
            index,
            value: values[index],
        });
    }
    Ok(MatRef::from_row_major_slice(&values, rows, columns).to_owned())
}

/// The matrix on a device.
pub(super) fn to_device(matrix: MatRef<f32>, device: &Device) -> Tensor<2> {
    let shape = [matrix.nrows(), matrix.ncols()];
    let rows = (0..shape[0]).flat_map(|i| (0..shape[1]).map(move |j| matrix[(i, j)]));
    let data = TensorData::new(rows.collect::<Vec<f32>>(), shape);
    Tensor::from_data(data, (device, FloatDType::F32.into()))
}

/// The thin SVD.
///
/// # Errors
///
/// [`PeftError::Decomposition`] if the iteration does not converge.
pub(super) fn svd(name: &str, matrix: MatRef<f32>) -> Result<Svd> {
    let failed = |reason: &str| PeftError::Decomposition {
        tensor: name.into(),
        reason: reason.into(),
    };
    let svd = matrix
        .thin_svd()
        .map_err(|_| failed("the SVD did not converge"))?;
    let values: Vec<f32> = svd.S().column_vector().iter().copied().collect();
    // Finite weights near the largest f32 overflow inside.
    if !values.iter().all(|value| value.is_finite()) {
        return Err(failed("its singular values are not finite"));
    }
    Ok(Svd {
        u: svd.U().to_owned(),
        values,
        v: svd.V().to_owned(),
    })
}

/// The first `rank` singular values and vectors, near enough, after `iterations` power iterations. Random numbers are those
/// of `device`.
///
/// # Errors
///
/// As [`svd`].
pub(super) fn svd_low_rank(
    name: &str,
    matrix: MatRef<f32>,
    rank: usize,
    iterations: usize,
    device: &Device,
) -> Result<Svd> {
    let (m, n) = matrix.shape();
    let columns = (rank + OVERSAMPLING).min(m).min(n);
    let draw = Tensor::<2>::random(
        [n, columns],
        Distribution::Normal(0.0, 1.0),
        (device, FloatDType::F32.into()),
    );
    let mut range = qr((matrix * to_host(name, &draw)?).as_ref()).0;
    for _ in 0..iterations {
        let back = qr((matrix.transpose() * &range).as_ref()).0;
        range = qr((matrix * &back).as_ref()).0;
    }
    let small = svd(name, (range.transpose() * matrix).as_ref())?;
    Ok(Svd {
        u: &range * &small.u,
        ..small
    })
}

/// The thin SVD of a product `A·B`, `A [m, r]` and `B [r, n]`, without the product: with `A = Q·R` and `Bᵀ = P·S` it is that of the
/// small `R·Sᵀ`, times `Q` and `P`. `k` is `min(m, n, r)`.
///
/// # Errors
///
/// As [`svd`].
pub(super) fn svd_of_product(name: &str, a: MatRef<f32>, b: MatRef<f32>) -> Result<Svd> {
    let (q, r) = qr(a);
    let (p, s) = qr(b.transpose());
    let small = svd(name, (r * s.transpose()).as_ref())?;
    Ok(Svd {
        u: q * small.u,
        values: small.values,
        v: p * small.v,
    })
}

/// `factor·(Mᵀ·M + δ·I)⁺` of `M [m, n]`, `[n, n]`, in f64 on the host, then f32 on the device of `M`. Singular values below `n·ε` of the
/// largest, `ε` that of f32, count as zero.
///
/// # Errors
///
/// As [`to_host`] and [`svd`].
#[cfg(feature = "optim")]
pub(crate) fn gram_inverse(
    name: &str,
    matrix: &Tensor<2>,
    delta: f64,
    factor: f64,
) -> Result<Tensor<2>> {
    let host = to_host(name, matrix)?;
    let n = host.ncols();
    let wide = Mat::from_fn(host.nrows(), n, |i, j| f64::from(host[(i, j)]));
    let gram = wide.transpose() * &wide;
    let eigen =
        gram.self_adjoint_eigen(faer::Side::Lower)
            .map_err(|_| PeftError::Decomposition {
                tensor: name.into(),
                reason: "the eigenvalues of its Gram matrix did not converge".into(),
            })?;
    let values: Vec<f64> = eigen
        .S()
        .column_vector()
        .iter()
        .map(|v| v + delta)
        .collect();
    let largest = values.iter().copied().fold(0.0, f64::max);
    let least = largest * n as f64 * f64::from(f32::EPSILON);
    let vectors = eigen.U();
    let inverse = Mat::from_fn(n, n, |i, j| {
        let kept = (0..n).filter(|&k| values[k] > least);
        let sum: f64 = kept
            .map(|k| vectors[(i, k)] * vectors[(j, k)] / values[k])
            .sum();
        (factor * sum) as f32
    });
    Ok(to_device(inverse.as_ref(), &matrix.device()))
}

/// `Q [m, k]` and `R [k, n]`.
pub(super) fn qr(matrix: MatRef<f32>) -> (Mat<f32>, Mat<f32>) {
    let qr = matrix.qr();
    (qr.compute_thin_Q(), qr.thin_R().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(m: usize, n: usize) -> Mat<f32> {
        let any = Distribution::Normal(0.0, 1.0);
        let tensor = Tensor::<2>::random([m, n], any, &Device::default());
        to_host("test", &tensor).unwrap()
    }

    fn diff(left: &Mat<f32>, right: &Mat<f32>) -> f32 {
        (left - right).norm_max()
    }

    /// Values are of order 1 and sums have at most 40 terms: far below 1e-4 in f32, far above it if an axis is mixed up.
    const CLOSE: f32 = 1e-4;

    #[test]
    fn products_give_the_matrix_back_and_columns_are_orthonormal() {
        for (m, n) in [(40, 17), (17, 40), (9, 9), (5, 1)] {
            let matrix = random(m, n);
            let k = m.min(n);
            let Svd { u, values, v } = svd("test", matrix.as_ref()).unwrap();
            assert_eq!((u.shape(), values.len(), v.shape()), ((m, k), k, (n, k)));
            assert!(values.windows(2).all(|pair| pair[0] >= pair[1]));
            let scaled = Mat::from_fn(m, k, |i, j| u[(i, j)] * values[j]);
            assert!(diff(&(scaled * v.transpose()), &matrix) < CLOSE);
            let (q, r) = qr(matrix.as_ref());
            assert!(diff(&(&q * r), &matrix) < CLOSE);
            for columns in [&u, &v, &q] {
                let gram = columns.transpose() * columns;
                assert!(diff(&gram, &Mat::identity(k, k)) < CLOSE);
            }
        }
    }

    #[test]
    fn a_product_is_decomposed_by_its_factors() {
        for (m, r, n) in [(30, 4, 20), (20, 4, 30), (6, 9, 30), (6, 9, 5)] {
            let (a, b) = (random(m, r), random(r, n));
            let matrix = &a * &b;
            let k = m.min(n).min(r);
            let Svd { u, values, v } = svd_of_product("test", a.as_ref(), b.as_ref()).unwrap();
            assert_eq!((u.shape(), values.len(), v.shape()), ((m, k), k, (n, k)));
            let direct = svd("test", matrix.as_ref()).unwrap().values;
            let scaled = Mat::from_fn(m, k, |i, j| u[(i, j)] * values[j]);
            assert!(diff(&(scaled * v.transpose()), &matrix) < CLOSE);
            for (value, direct) in values.iter().zip(&direct) {
                assert!((value - direct).abs() < CLOSE);
            }
            for columns in [&u, &v] {
                let gram = columns.transpose() * columns;
                assert!(diff(&gram, &Mat::identity(k, k)) < CLOSE);
            }
        }
    }

    #[test]
    fn the_randomised_svd_nears_the_exact_one_with_its_iterations() {
        // Singular values that fall slowly, which is what the iterations are for.
        let exact = svd("test", random(80, 60).as_ref()).unwrap();
        let scaled = Mat::from_fn(80, 60, |i, j| exact.u[(i, j)] * 0.97_f32.powi(j as i32));
        let matrix = scaled * exact.v.transpose();
        let device = Device::default();
        let missed = |iterations| {
            let Svd { u, .. } =
                svd_low_rank("test", matrix.as_ref(), 8, iterations, &device).unwrap();
            let u = u.get(.., 0..8);
            (&matrix - u * (u.transpose() * &matrix)).norm_l2()
        };
        // What is left without the first 8 of σ = 0.97^j.
        let best = (8..60).map(|j| 0.97_f32.powi(2 * j)).sum::<f32>().sqrt();
        let (few, many) = (missed(0), missed(16));
        assert!(many < 1.0005 * best, "{many} against {best}");
        assert!(few > 1.01 * best, "{few} against {best}");
    }

    #[test]
    fn what_is_not_finite_is_named() {
        let tensor = Tensor::<2>::from_data([[1.0, 2.0], [f32::NAN, 3.0]], &Device::default());
        let error = to_host("blocks.0.up", &tensor).unwrap_err();
        assert!(
            matches!(&error, PeftError::NotFinite { tensor, index: 2, .. } if tensor == "blocks.0.up")
        );
    }
}
