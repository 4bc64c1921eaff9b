//! Every operation, forward and backward, against the composed one in f64.

use std::ops::Range;

use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};
use proptest::prelude::*;

use super::*;

/// Random values of a shape, rounded to `dtype`, then in f64; and the same in `dtype`, tracked.
fn pair<const D: usize>(shape: [usize; D], dtype: DType) -> (Tensor<D>, Tensor<D>) {
    let device = Device::default().autodiff();
    let x = Tensor::<D>::random(shape, Distribution::Normal(0.0, 1.5), &device).cast(dtype);
    (
        x.clone().cast(DType::F64).detach().require_grad(),
        x.detach().require_grad(),
    )
}

/// Tokens before heads in memory, as a linear layer leaves them.
fn by_token([batch, heads, seq, d]: [usize; 4], dtype: DType) -> (Tensor<4>, Tensor<4>) {
    pair([batch, seq, heads, d], dtype)
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.cast(DType::F64).try_into_vec_as().unwrap()
}

/// The largest magnitude, 0.001 at least.
fn largest<const D: usize>(tensor: Tensor<D>) -> f64 {
    let values = values(tensor);
    values
        .iter()
        .fold(1e-3, |most, value| most.max(value.abs()))
}

/// The largest difference, relative to the largest value.
fn difference<const D: usize>(found: Tensor<D>, expected: Tensor<D>) -> f64 {
    let size = largest(expected.clone());
    difference_to(size, found, expected)
}

/// The largest difference, relative to `size`.
fn difference_to<const D: usize>(size: f64, found: Tensor<D>, expected: Tensor<D>) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (values(found), values(expected));
    let differences = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    // NaN is not passed over.
    differences.fold(0.0, |most, d| if d <= most { most } else { d }) / size
}

/// What a result or a gradient may differ by, relative to the size of its terms.
fn bound(dtype: DType) -> f64 {
    match dtype {
        // A rounding or two.
        DType::BF16 => 2.0 * 2f64.powi(-8),
        // Sums of a few hundred terms.
        _ => 64.0 * f64::from(f32::EPSILON),
    }
}

/// Compares results and gradients of an operation with those of its twin, `weights` being the gradient of the result.
fn check<const D: usize, const N: usize>(
    found: (Tensor<D>, [Tensor<D>; N]),
    expected: (Tensor<D>, [Tensor<D>; N]),
    dtype: DType,
) {
    check_terms(0.0, found, expected, dtype);
}

/// The same for gradients that are sums of terms of the size `terms`, which may cancel.
fn check_terms<const D: usize, const N: usize>(
    terms: f64,
    found: (Tensor<D>, [Tensor<D>; N]),
    expected: (Tensor<D>, [Tensor<D>; N]),
    dtype: DType,
) {
    let bound = bound(dtype);
    assert_eq!(found.0.dtype(), dtype);
    assert!(
        difference(found.0.clone(), expected.0.clone()) < bound,
        "result"
    );
    let weights = pair(found.0.dims(), dtype);
    let found_gradients = (found.0 * weights.1.detach()).sum().backward();
    let expected_gradients = (expected.0 * weights.0.detach()).sum().backward();
    for (i, (found, expected)) in found.1.iter().zip(&expected.1).enumerate() {
        let found = found.grad(&found_gradients).unwrap();
        let expected = expected.grad(&expected_gradients).unwrap();
        let size = largest(expected.clone()).max(terms);
        let difference = difference_to(size, found, expected);
        assert!(difference < bound, "gradient {i}: {difference:e}");
    }
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::BF16)]
}

/// A range of keys for each query: causal, or anything, nothing too.
fn ranges(queries: usize, keys: usize) -> impl Strategy<Value = Vec<Range<usize>>> {
    let any = (0..=keys, 0..=keys).prop_map(|(a, b)| a.min(b)..a.max(b));
    let causal = (0..queries).map(|query| 0..(query + 1 + keys.saturating_sub(queries)).min(keys));
    prop_oneof![
        Just(causal.collect::<Vec<_>>()),
        prop::collection::vec(any, queries),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn frozen_weights(
        (batch, seq) in (1_usize..3, 1_usize..60),
        (d_in, d_out, rank) in (1_usize..150, 1_usize..150, 1_usize..20),
        turned in any::<bool>(),
        dtype in dtypes(),
    ) {
        let x = pair([batch, seq, d_in], dtype);
        let weight = pair(if turned { [d_out, d_in] } else { [d_in, d_out] }, dtype);
        let weight = [weight.0, weight.1].map(|weight| match turned {
            true => constant(weight).transpose(),
            false => constant(weight),
        });
        let found = frozen_linear(x.1.clone(), weight[1].clone());
        let expected = linear(x.0.clone(), weight[0].clone(), None);
        check((found, [x.1.clone()]), (expected, [x.0.clone()]), dtype);

        // Factors of another dtype than the rest.
        let (a, b) = (pair([d_in, rank], DType::F32), pair([rank, d_out], DType::F32));
        let x = pair([batch, seq, d_in], dtype);
        let found = lora_linear(&x.1, &weight[1], [&a.1, &b.1], 0.5).unwrap();
        let expected = linear(x.0.clone(), weight[0].clone(), None);
        let change = linear(linear(x.0.clone(), a.0.clone(), None), b.0.clone(), None);
        check((found, [x.1]), (expected + change * 0.5, [x.0]), dtype);
    }

    #[test]
    fn factors_of_a_low_rank_change(
        (rows, d_in, d_out, rank) in (1_usize..60, 1_usize..150, 1_usize..150, 1_usize..20),
        dtype in dtypes(),
    ) {
        let x = pair([rows, d_in], dtype);
        let weight = pair([d_in, d_out], dtype);
        let (a, b) = (pair([d_in, rank], DType::F32), pair([rank, d_out], DType::F32));
        let found = lora_linear(&x.1, &constant(weight.1), [&a.1, &b.1], 0.5).unwrap();
        let change = x.0.clone().matmul(a.0.clone()).matmul(b.0.clone()) * 0.5;
        let expected = x.0.clone().matmul(weight.0.detach()) + change;
        let weights = pair([rows, d_out], dtype);
        let found = (found * weights.1.detach()).sum().backward();
        let expected = (expected * weights.0.detach()).sum().backward();
        for (found, expected) in [
            (a.1.grad(&found), a.0.grad(&expected)),
            (b.1.grad(&found), b.0.grad(&expected)),
        ] {
            // Activations and their gradients are the same numbers on both sides, of either dtype.
            prop_assert!(difference(found.unwrap(), expected.unwrap()) < 1e-4);
        }
    }

    #[test]
    fn gates(rows in 1_usize..40, columns in 1_usize..900, dtype in dtypes()) {
        let (gate, up) = (pair([rows, columns], dtype), pair([rows, columns], dtype));
        let found = swiglu(gate.1.clone(), up.1.clone());
        let expected = composed::swiglu(gate.0.clone(), up.0.clone());
        check((found, [gate.1, up.1]), (expected, [gate.0, up.0]), dtype);
    }

    #[test]
    fn norms(rows in 1_usize..40, n in 1_usize..900, dtype in dtypes()) {
        let (x, gamma) = (pair([rows, n], dtype), pair([n], dtype));
        let found = rms_norm(x.1.clone(), gamma.1.clone(), 1e-5);
        let expected = composed::rms_norm(x.0.clone(), gamma.0.clone(), 1e-5);
        prop_assert_eq!(found.dtype(), dtype);
        prop_assert!(difference(found.clone(), expected.clone()) < bound(dtype), "result");
        let weights = pair([rows, n], dtype);
        let gradients = (found * weights.1.clone().detach()).sum().backward();
        let twin = (expected * weights.0.clone().detach()).sum().backward();
        let most = if dtype == DType::BF16 { 2f64.powi(-7) } else { 1e-5 };
        let found_gamma = gamma.1.grad(&gradients).unwrap();
        // A sum over rows of products of two such values, which may cancel.
        let expected_gamma = gamma.0.grad(&twin).unwrap();
        let size = largest(expected_gamma.clone()).max(1.0);
        prop_assert!(difference_to(size, found_gamma, expected_gamma) < most);

        // The gradient of `x` is a difference of two terms, of which nothing is left in a row of one value.
        let x_inner = constant(x.0.clone());
        let inverse = (x_inner.square().mean_dim(1) + 1e-5).sqrt().recip();
        let gain = constant(gamma.0).unsqueeze::<2>();
        let size = largest(constant(weights.0) * gain * inverse);
        let expected = x.0.grad(&twin).unwrap();
        let found = x.1.grad(&gradients).unwrap();
        let error = difference_to(size, found.clone(), expected);
        prop_assert!(error < bound(dtype), "gradient of x: {error:e}");

        // The same with a `gamma` that is not trained.
        let x_only = rms_norm(x.1.clone(), constant(gamma.1), 1e-5);
        let gradients = (x_only * weights.1.detach()).sum().backward();
        prop_assert_eq!(values(x.1.grad(&gradients).unwrap()), values(found));
    }

    #[test]
    fn rotations(
        batch in 1_usize..3,
        heads in 1_usize..4,
        seq in 1_usize..70,
        half in 1_usize..40,
        own in any::<bool>(),
        dtype in dtypes(),
    ) {
        let x = by_token([batch, heads, seq, 2 * half], dtype);
        let angles = pair([if own { batch } else { 1 }, 1, seq, half], DType::F32);
        let (cos, sin) = (angles.1.clone().cos(), angles.1.sin());
        let found = rotate(x.1.clone().swap_dims(1, 2), cos.clone(), sin.clone());
        let [cos, sin] = [cos, sin].map(|t| t.detach().cast(DType::F64));
        let expected = composed::rotate(x.0.clone().swap_dims(1, 2), cos, sin);
        check((found, [x.1]), (expected, [x.0]), dtype);
    }

    #[test]
    fn attentions(
        (batch, kv_heads, group) in (1_usize..3, 1_usize..3, 1_usize..3),
        (queries, ranges) in (1_usize..110, 1_usize..130).prop_flat_map(|(queries, keys)| {
            (Just(queries), ranges(queries, keys))
        }),
        d in 1_usize..70,
        dtype in dtypes(),
    ) {
        let keys = ranges.iter().map(|range| range.end).max().unwrap().max(1);
        let visible = Visible::from_ranges(&ranges, queries, keys);
        let q = by_token([batch, kv_heads * group, queries, d], dtype);
        let k = by_token([batch, kv_heads, keys, d], dtype);
        let v = by_token([batch, kv_heads, keys, d], dtype);
        let scale = 1.0 / (d as f64).sqrt();
        let turned = |t: &Tensor<4>| t.clone().swap_dims(1, 2);
        let found = attention(turned(&q.1), turned(&k.1), turned(&v.1), &visible, scale);
        let expected =
            composed::attention(turned(&q.0), turned(&k.0), turned(&v.0), &visible, scale);
        // Differences of products of three such values, of which nothing is left where one key is visible.
        let terms = 1.0;
        check_terms(terms, (found, [q.1, k.1, v.1]), (expected, [q.0, k.0, v.0]), dtype);
    }

    #[test]
    fn cross_entropies(
        vocab in 1_usize..700,
        labels in prop::collection::vec(prop::option::of(0_usize..700), 1..40),
        dtype in dtypes(),
    ) {
        let rows = labels.len();
        let labels: Vec<_> = labels
            .into_iter()
            .enumerate()
            .filter_map(|(row, label)| Some((row, label? % vocab)))
            .collect();
        prop_assume!(!labels.is_empty());
        let logits = pair([rows, vocab], dtype);
        let found = cross_entropy(logits.1.clone(), labels.clone());
        let expected = composed::cross_entropy(logits.0.clone(), &labels);
        prop_assert_eq!(found.dtype(), DType::F32);
        prop_assert!(difference(found.clone(), expected.clone()) < 1e-5);
        let found = logits.1.grad(&(found * 0.5).backward()).unwrap();
        let expected = logits.0.grad(&(expected * 0.5).backward()).unwrap();
        let bound = if dtype == DType::BF16 { 2f64.powi(-8) } else { 1e-5 };
        prop_assert!(difference(found, expected) < bound);
    }
}

/// A result and gradients, as bits, of an operation large enough for the pool.
fn bits<const D: usize, const N: usize>(y: Tensor<D>, operands: [&Tensor<D>; N]) -> Vec<u64> {
    let gradients = y.clone().sin().sum().backward();
    let of = |tensor: &Tensor<D>| values(tensor.grad(&gradients).unwrap());
    let all = operands.into_iter().flat_map(of);
    values(y).into_iter().chain(all).map(f64::to_bits).collect()
}

#[test]
#[cfg(feature = "flex")]
fn the_number_of_threads_changes_no_bit() {
    use crate::cpu::parallel::assert_same_in_pools;
    for dtype in [DType::F32, DType::BF16] {
        let [(_, q), (_, k), (_, v)] = [4, 2, 2].map(|heads| by_token([2, heads, 130, 16], dtype));
        let visible = Visible::causal(130, 0);
        assert_same_in_pools("attention", || {
            let [q, k, v] = [&q, &k, &v].map(|t| t.clone().swap_dims(1, 2));
            let [q, k, v] = [q, k, v].map(|t| t.detach().require_grad());
            let y = attention(q.clone(), k.clone(), v.clone(), &visible, 0.3);
            bits(y, [&q, &k, &v])
        });
        let [(_, x), (_, up), (_, weight)] =
            [[300, 400], [300, 400], [400, 302]].map(|shape| pair(shape, dtype));
        let (_, gamma) = pair([400], dtype);
        assert_same_in_pools("swiglu", || bits(swiglu(x.clone(), up.clone()), [&x, &up]));
        assert_same_in_pools("rms_norm", || {
            let norm = || rms_norm(x.clone(), gamma.clone(), 1e-5);
            let gradients = norm().sin().sum().backward();
            let of_gamma = values(gamma.grad(&gradients).unwrap());
            let of_gamma = of_gamma.into_iter().map(f64::to_bits);
            let all = bits(norm(), [&x]).into_iter().chain(of_gamma);
            all.collect::<Vec<_>>()
        });
        assert_same_in_pools("frozen_linear", || {
            bits(frozen_linear(x.clone(), constant(weight.clone())), [&x])
        });
        assert_same_in_pools("cross_entropy", || {
            let labels = (0..300).map(|row| (row, row)).collect();
            let loss = cross_entropy(x.clone(), labels);
            let gradient = values(x.grad(&loss.clone().backward()).unwrap());
            let all = values(loss).into_iter().chain(gradient);
            all.map(f64::to_bits).collect::<Vec<_>>()
        });
        let (_, heads) = by_token([2, 8, 130, 64], dtype);
        let (_, angles) = pair([1, 1, 130, 32], DType::F32);
        let angles = constant(angles);
        assert_same_in_pools("rotate", || {
            let x = heads.clone().swap_dims(1, 2).detach().require_grad();
            bits(
                rotate(x.clone(), angles.clone().cos(), angles.clone().sin()),
                [&x],
            )
        });
    }
}

#[test]
fn what_is_visible() {
    let visible = Visible::left_padded(&[0, 2], 2, 1);
    assert_eq!(
        (visible.rows(), visible.queries(), visible.keys()),
        (2, 2, 3)
    );
    assert_eq!(visible.of_row(0), [0..2, 0..3]);
    assert_eq!(visible.of_row(1), [0..0, 2..3]);
    assert_eq!(Visible::causal(3, 0).of_row(5), [0..1, 0..2, 0..3]);
}

#[test]
fn other_dtypes_are_composed() {
    let (_, x) = pair([3, 8], DType::F16);
    let (_, gamma) = pair([8], DType::F16);
    assert_eq!(rms_norm(x.clone(), gamma, 1e-5).dtype(), DType::F16);
    assert_eq!(swiglu(x.clone(), x).dtype(), DType::F16);
}

/// What is no finite number goes where Burn's operations take it, and nowhere else.
#[cfg(feature = "flex")]
mod not_finite {
    use super::*;

    const BAD: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];

    /// Random, with values that are no finite numbers at these places.
    fn with<const D: usize>(shape: [usize; D], bad: &[(usize, f32)]) -> Tensor<D> {
        let values = pair(shape, DType::F32).1.into_data();
        let mut values: Vec<f32> = values.try_into_vec().unwrap();
        for &(at, value) in bad {
            values[at] = value;
        }
        let data = TensorData::new(values, shape);
        Tensor::<D>::from_data(data, &Device::default().autodiff()).require_grad()
    }

    /// Both NaN, or the same infinity, or near each other.
    fn assert_alike<const D: usize>(name: &str, found: Tensor<D>, expected: Tensor<D>) {
        for (i, (found, expected)) in values(found).into_iter().zip(values(expected)).enumerate() {
            let alike = match (found.is_finite(), expected.is_finite()) {
                (true, true) => (found - expected).abs() <= 1e-4 * expected.abs().max(1.0),
                (false, false) => found.is_nan() == expected.is_nan() && !(found == -expected),
                _ => false,
            };
            assert!(alike, "{name}[{i}]: {found}, not {expected}");
        }
    }

    #[test]
    fn gates() {
        for dtype in [DType::F32, DType::BF16] {
            for bad in BAD.into_iter().chain([1e38, -1e38]) {
                for of_gate in [true, false] {
                    let places = [(2, bad), (50, bad)];
                    let [gate, up] = [of_gate, !of_gate]
                        .map(|here| if here { places.as_slice() } else { &[] })
                        .map(|bad| with([3, 40], bad).cast(dtype));
                    let found = swiglu(gate.clone(), up.clone());
                    let expected = composed::swiglu(gate.cast(DType::F32), up.cast(DType::F32));
                    let expected = expected.cast(dtype);
                    let bound = if dtype == DType::BF16 { 0.02 } else { 1e-5 };
                    let pairs = values(found).into_iter().zip(values(expected));
                    for (i, (found, expected)) in pairs.enumerate() {
                        let same = found.is_nan() && expected.is_nan() || found == expected;
                        let near = (found - expected).abs() <= bound * expected.abs().max(1.0);
                        assert!(
                            same || near,
                            "{bad} of gate {of_gate}: [{i}] {found}, not {expected}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn norms() {
        for bad in BAD {
            let x = with([4, 37], &[(37 + 5, bad)]);
            let gamma = with([37], &[(3, bad)]);
            for gamma in [gamma, with([37], &[])] {
                let found = rms_norm(x.clone(), gamma.clone(), 1e-5);
                let expected = composed::rms_norm(x.clone(), gamma.clone(), 1e-5);
                assert_alike("result", found.clone(), expected.clone());
                let (found, expected) = (found.sum().backward(), expected.sum().backward());
                let [found, expected] =
                    [found, expected].map(|gradients| x.grad(&gradients).unwrap());
                // Rows do not know of each other.
                for row in [0, 2, 3] {
                    let [found, expected] =
                        [&found, &expected].map(|t| t.clone().narrow(0, row, 1));
                    assert_alike("gradient", found, expected);
                }
            }
        }
    }

    #[test]
    fn attentions() {
        let shape = [1, 2, 60, 8];
        let visible = Visible::causal(60, 0);
        // Of head 1, token 20.
        let at = 8 * (60 + 20) + 3;
        for bad in BAD {
            for operand in 0..3 {
                let bad_in = |i| {
                    if i == operand {
                        vec![(at, bad)]
                    } else {
                        vec![]
                    }
                };
                let [q, k, v] = [0, 1, 2].map(|i| with(shape, &bad_in(i)));
                let found = attention(q.clone(), k.clone(), v.clone(), &visible, 0.4);
                let expected = composed::attention(q, k, v, &visible, 0.4);
                let head = |t: &Tensor<4>, head, first, tokens| {
                    t.clone().narrow(1, head, 1).narrow(2, first, tokens)
                };
                assert_alike(
                    "other head",
                    head(&found, 0, 0, 60),
                    head(&expected, 0, 0, 60),
                );
                // A hidden value counts nothing, but zero times infinity is no number, here as there.
                let first = if operand == 2 { 20 } else { 0 };
                let name = format!("{bad} in operand {operand}");
                assert_alike(
                    &name,
                    head(&found, 1, first, 60 - first),
                    head(&expected, 1, first, 60 - first),
                );
                if operand < 2 {
                    assert!(
                        values(head(&found, 1, 0, 20))
                            .iter()
                            .all(|value| value.is_finite())
                    );
                }
            }
        }
    }
}
