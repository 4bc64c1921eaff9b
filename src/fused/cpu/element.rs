//! Arithmetic that compilers turn into vectors.
//!
//! Everything here is plain code, `#[inline(always)]` into kernels that are compiled for each instruction set.

use crate::cpu::value::Value;

/// `e^x` to about two ulps; zero below −87 and infinity above 88, a little before f32's own limits.
///
/// `e^x = 2^n · e^r` with `n = round(x / ln 2)`; the polynomial for `e^r` is that of the Cephes library.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// `1.5 · 2^23`: added to a small number, the sum's low bits are that number, rounded.
    const ROUNDER: f32 = 12_582_912.0;
    /// `ln 2` in two parts, of which the first times any `n` is exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const POLYNOMIAL: [f32; 6] = [
        1.987_569_1e-4,
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ];
    let shifted = x * std::f32::consts::LOG2_E + ROUNDER;
    let n = shifted - ROUNDER;
    let r = x - n * LN_2[0] - n * LN_2[1];
    let mut p = POLYNOMIAL[0];
    for coefficient in &POLYNOMIAL[1..] {
        p = p * r + coefficient;
    }
    let p = p * r * r + r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    let y = p * power;
    let y = if x < -87.0 { 0.0 } else { y };
    if x > 88.0 { f32::INFINITY } else { y }
}

/// `1 / (1 + e^−x)`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Partial results that are kept apart, so that they fit in vectors.
pub(super) const LANES: usize = 16;

/// `Σ_i f(a_i, b_i, …)`, of arrays of one length.
#[inline(always)]
pub(super) fn sum<V: Value, const N: usize>(arrays: [&[V]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    let len = arrays[0].len();
    let arrays = arrays.map(|array| array[..len].as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for i in 0..len / LANES {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += f(arrays.map(|(chunks, _)| chunks[i][lane].into()));
        }
    }
    let rest = (0..len % LANES).map(|i| f(arrays.map(|(_, rest)| rest[i].into())));
    sums.into_iter().chain(rest).sum()
}

/// The largest value; NaN is passed over.
#[inline(always)]
pub(super) fn max<V: Value>(values: &[V]) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut largest = [f32::NEG_INFINITY; LANES];
    for values in chunks {
        for lane in 0..LANES {
            let value: f32 = values[lane].into();
            largest[lane] = if value > largest[lane] {
                value
            } else {
                largest[lane]
            };
        }
    }
    let rest = rest.iter().map(|&value| value.into());
    largest
        .into_iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_right_to_two_ulps() {
        for step in -87_000..=88_000 {
            let x = step as f32 / 1000.0;
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            // Two ulps of f32.
            assert!(
                (found / expected - 1.0).abs() < 2.0 * f64::from(f32::EPSILON),
                "e^{x}: {found}"
            );
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(
            [exp(-88.0), exp(f32::NEG_INFINITY), exp(f32::MIN)],
            [0.0; 3]
        );
        assert_eq!([exp(89.0), exp(f32::INFINITY)], [f32::INFINITY; 2]);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(
            [sigmoid(-1000.0), sigmoid(0.0), sigmoid(1000.0)],
            [0.0, 0.5, 1.0]
        );
    }

    #[test]
    fn sums_and_maxima_of_any_length() {
        for n in 0..70 {
            let values: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let expected = (0..n).map(|i| i * i).sum::<usize>() as f32;
            assert_eq!(sum([&values, &values], |[a, b]| a * b), expected);
            assert_eq!(
                max(&values),
                values.last().copied().unwrap_or(f32::NEG_INFINITY)
            );
        }
    }
}
