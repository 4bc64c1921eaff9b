//! The loss in chunks and its gradients, by the kernels and composed, against the plain one in f64, which holds all logits.
//!
//! With `δz = (d + r + 8)·2⁻²⁴·Σ|terms|`, what f32 sums leave a logit to be wrong by, every probability is wrong by `2δz` of itself
//! and what `e^z` and its sum over the vocabulary add: `ε = 2δz + 3·(v + rows + 16)·2⁻²⁴` in all, for sums over a row's
//! probabilities, which are 1. Where `dz`, and results, are rounded to bf16, that adds `2⁻⁸` for each time.

use burn::tensor::{DType, Device, Distribution, FloatDType, Int, Tensor};
use proptest::prelude::*;

use super::*;
use crate::nf4::{BlockSize, Nf4Config};

const HALF_ULP: f64 = 1.0 / (1 << 24) as f64;
const HALF_ULP_BF16: f64 = 1.0 / 256.0;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// `[features, vocabulary]` as it lies.
    Rows,
    /// The transpose of `[vocabulary, features]`.
    Turned,
    Nf4 {
        double: bool,
    },
}

#[derive(Clone, Debug)]
struct Case {
    kind: Kind,
    rows: usize,
    features: usize,
    vocabulary: usize,
    rank: usize,
    bias: bool,
    trained: bool,
    chunks: [usize; 2],
    x: DType,
    weight: DType,
}

fn cases() -> impl Strategy<Value = Case> {
    let kind = prop_oneof![
        3 => Just(Kind::Rows),
        3 => Just(Kind::Turned),
        1 => Just(Kind::Nf4 { double: false }),
        1 => Just(Kind::Nf4 { double: true }),
    ];
    let dtype = || prop_oneof![Just(DType::F32), Just(DType::BF16)];
    let sizes = (1_usize..70, 1_usize..90, 1_usize..300, 0_usize..5);
    let chunks = (1_usize..80, 1_usize..320);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (kind, sizes, chunks, flags, dtype(), dtype()).prop_map(
        |(kind, (rows, features, vocabulary, rank), chunks, (bias, trained, even), x, weight)| {
            let even = if even { 2 } else { 1 };
            Case {
                kind,
                rows,
                features: even * features,
                vocabulary: even * vocabulary,
                rank,
                bias,
                trained,
                chunks: [chunks.0, chunks.1],
                x,
                weight,
            }
        },
    )
}

fn random<const D: usize>(shape: [usize; D], size: f64, dtype: DType) -> Tensor<D> {
    let device = Device::default().autodiff();
    Tensor::<D>::random(shape, Distribution::Normal(0.0, size), &device).cast(dtype)
}

/// A leaf, tracked.
fn leaf<const D: usize>(tensor: &Tensor<D>) -> Tensor<D> {
    tensor.clone().detach().require_grad()
}

/// The same values in f64, a leaf.
fn wide<const D: usize>(tensor: &Tensor<D>) -> Tensor<D> {
    leaf(&tensor.clone().detach().cast(DType::F64))
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.cast(DType::F64).try_into_vec_as().unwrap()
}

fn largest<const D: usize>(tensor: &Tensor<D>) -> f64 {
    let values = values(tensor.clone());
    values.iter().fold(0.0, |most, value| most.max(value.abs()))
}

fn assert_near<const D: usize>(name: &str, found: Tensor<D>, expected: Tensor<D>, bound: f64) {
    assert_eq!(found.dims(), expected.dims(), "{name}");
    let pairs = values(found).into_iter().zip(values(expected));
    for (i, (found, expected)) in pairs.enumerate() {
        let difference = (found - expected).abs();
        // NaN is not near anything.
        assert!(
            difference <= bound,
            "{name}[{i}]: {found}, not {expected}: {difference:e} above {bound:e}"
        );
    }
}

/// The loss with all logits in memory.
fn plain(
    x: &Tensor<2>,
    weight: &Tensor<2>,
    low_rank: Option<&[Tensor<2>; 2]>,
    bias: Option<&Tensor<1>>,
    labels: &[usize],
) -> Tensor<1> {
    let mut z = x.clone().matmul(weight.clone());
    if let Some([u, b]) = low_rank {
        z = z + u.clone().matmul(b.clone());
    }
    if let Some(bias) = bias {
        z = z + bias.clone().unsqueeze();
    }
    let labels = labels.iter().copied().enumerate().collect();
    crate::fused::cross_entropy(z, labels)
}

/// Compares the loss in chunks, computed by `run`, with the plain one.
fn check(case: &Case, composed: bool) {
    let &Case {
        rows,
        features,
        vocabulary,
        rank,
        ..
    } = case;
    let x = random([rows, features], 1.5, case.x);
    let packed = match case.kind {
        Kind::Nf4 { double } => {
            let config = Nf4Config::new()
                .with_block_size(BlockSize::new(64).unwrap())
                .with_double_quant(double);
            let dense = random([features, vocabulary], 0.2, DType::F32);
            Some(Nf4Weight::quantize("w", dense, &config).unwrap())
        }
        _ => None,
    };
    let held = match (&packed, case.kind) {
        (Some(packed), _) => {
            // As a product of bf16 takes it.
            packed.dequantize(FloatDType::from(case.x))
        }
        (None, Kind::Rows) => random([features, vocabulary], 0.2, case.weight),
        (None, _) => random([vocabulary, features], 0.2, case.weight),
    };
    let turned = |held: Tensor<2>| match case.kind {
        Kind::Rows => held,
        _ => held.transpose(),
    };
    let trained = case.trained && packed.is_none();
    let held = [
        match trained {
            true => leaf(&held),
            false => held.clone().detach().set_require_grad(false),
        },
        wide(&held),
    ];
    let low_rank = (rank > 0).then(|| {
        [
            random([rows, rank], 1.0, DType::F32),
            random([rank, vocabulary], 0.2, DType::F32),
        ]
    });
    let bias = case.bias.then(|| random([vocabulary], 1.0, DType::F32));
    let labels: Vec<usize> = values(random([rows], 1.0, DType::F32))
        .iter()
        .map(|value| (value.abs() * 1e4) as usize % vocabulary)
        .collect();

    let (found_x, expected_x) = (leaf(&x), wide(&x));
    let found_low = low_rank.as_ref().map(|pair| pair.each_ref().map(leaf));
    let expected_low = low_rank.as_ref().map(|pair| pair.each_ref().map(wide));
    let found_bias = bias.as_ref().map(leaf);
    let expected_bias = bias.as_ref().map(wide);
    let head = Head {
        weight: match &packed {
            Some(packed) => HeadWeight::Nf4(packed),
            None => HeadWeight::Dense(turned(held[0].clone())),
        },
        low_rank: found_low.clone(),
        bias: found_bias.clone(),
    };
    let chunks = HeadChunks::new(case.chunks[0], case.chunks[1]).unwrap();
    let found = match composed {
        false => cross_entropy(found_x.clone(), head, labels.clone(), &chunks),
        true => composed::cross_entropy(found_x.clone(), head, &labels, &chunks),
    };
    let weight = turned(held[1].clone());
    let expected = plain(
        &expected_x,
        &weight,
        expected_low.as_ref(),
        expected_bias.as_ref(),
        &labels,
    );

    // What a logit is a sum of.
    let mut terms = expected_x.clone().abs().matmul(weight.clone().abs());
    if let Some([u, b]) = &expected_low {
        terms = terms + u.clone().abs().matmul(b.clone().abs());
    }
    let bias_size = bias.as_ref().map_or(0.0, largest);
    let dz = (features + rank + 8) as f64 * HALF_ULP * (largest(&terms) + bias_size);
    let narrow = case.x == DType::BF16 || case.weight == DType::BF16;
    let row_chunks = rows.div_ceil(case.chunks[0]);
    let eps = 2.0 * dz + 3.0 * (vocabulary + rows + 16) as f64 * HALF_ULP;
    let eps_rounded = match narrow {
        true => eps + 2.0 * (1 + row_chunks) as f64 * HALF_ULP_BF16,
        false => eps,
    };
    let many = rows as f64;
    let size = largest(&expected);
    assert_near(
        "loss",
        found.clone(),
        expected.clone(),
        many * eps + 2.0 * HALF_ULP * size,
    );

    let dy = 0.5;
    let found = (found * dy).backward();
    let expected = (expected * dy).backward();
    let grad = |t: &Tensor<2>, of: &burn::tensor::Gradients| t.grad(of).unwrap();
    let w = largest(&weight);
    assert_near(
        "dx",
        grad(&found_x, &found),
        grad(&expected_x, &expected),
        2.0 * w * eps_rounded,
    );
    assert_eq!(grad(&found_x, &found).dtype(), case.x);
    if trained {
        let bound = many * largest(&x) * eps_rounded;
        assert_near(
            "dW",
            grad(&held[0], &found),
            grad(&held[1], &expected),
            bound,
        );
    } else {
        assert!(held[0].grad(&found).is_none());
    }
    if let (Some([u, b]), Some([u_wide, b_wide])) = (&found_low, &expected_low) {
        let bound = 2.0 * largest(b) * eps;
        assert_near("du", grad(u, &found), grad(u_wide, &expected), bound);
        let bound = many * largest(u) * eps;
        assert_near("dB", grad(b, &found), grad(b_wide, &expected), bound);
    }
    if let (Some(bias), Some(wide)) = (&found_bias, &expected_bias) {
        let (found, expected) = (bias.grad(&found).unwrap(), wide.grad(&expected).unwrap());
        assert_near("dbias", found, expected, many * eps);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    #[cfg(feature = "flex")]
    fn chunks_give_the_plain_loss(case in cases()) {
        check(&case, false);
    }

    #[test]
    fn what_is_composed_does_too(case in cases()) {
        // Burn's products round logits to bf16.
        let case = Case { x: DType::F32, weight: DType::F32, ..case };
        check(&case, true);
    }
}

#[test]
#[cfg(feature = "flex")]
fn the_number_of_threads_changes_no_bit() {
    for dtype in [DType::F32, DType::BF16] {
        let x = random([80, 64], 1.0, dtype);
        let weight = random([500, 64], 0.3, dtype);
        let [u, b] = [[80, 5], [5, 500]].map(|shape| random(shape, 0.3, DType::F32));
        let labels: Vec<usize> = (0..80).map(|row| row * 6).collect();
        let chunks = HeadChunks::new(50, 200).unwrap();
        crate::cpu::parallel::assert_same_in_pools("head", || {
            let operands = [leaf(&x), leaf(&weight), leaf(&u), leaf(&b)];
            let [x, weight, u, b] = operands.clone();
            let head = Head {
                weight: HeadWeight::Dense(weight.transpose()),
                low_rank: Some([u, b]),
                bias: None,
            };
            let loss = cross_entropy(x, head, labels.clone(), &chunks);
            let gradients = loss.clone().backward();
            let of = |tensor: &Tensor<2>| values(tensor.grad(&gradients).unwrap());
            let all: Vec<f64> = operands.iter().flat_map(of).chain(values(loss)).collect();
            all.into_iter().map(f64::to_bits).collect::<Vec<_>>()
        });
    }
}

#[test]
fn a_label_is_found_in_every_chunk() {
    let (vocabulary, features) = (11, 6);
    let weight = random([features, vocabulary], 1.0, DType::F32);
    let x = random([vocabulary, features], 1.0, DType::F32);
    for dtype in [DType::F32, DType::F64] {
        let [x, weight] = [&x, &weight].map(|t| t.clone().cast(dtype));
        for label in 0..vocabulary {
            let labels: Vec<usize> = (label..label + vocabulary)
                .map(|y| y % vocabulary)
                .collect();
            let expected = plain(&x, &weight, None, None, &labels);
            for (rows, tokens) in [(1, 2), (3, 4), (20, 6), (4, 20)] {
                let head = Head {
                    weight: HeadWeight::Dense(weight.clone()),
                    low_rank: None,
                    bias: None,
                };
                let chunks = HeadChunks::new(rows, tokens).unwrap();
                let found = cross_entropy(x.clone(), head, labels.clone(), &chunks);
                assert_eq!(found.dtype(), dtype);
                // A handful of roundings of a sum of eleven losses of a few nats each.
                assert_near("loss", found, expected.clone(), 1e-4);
            }
        }
    }
}

#[test]
fn extreme_logits_stay_finite() {
    let device = Device::default().autodiff();
    let x = Tensor::<2>::from_data([[1e19_f32], [1e19]], &device).require_grad();
    // Of logits 1e38, -1e38, -1e38, 9e37 and no probability at all: each in a chunk of its own, or two.
    let weight =
        Tensor::<2>::from_data([[1e19_f32, -1e19, -1e19, 9e18, f32::NEG_INFINITY]], &device);
    for composed in [false, true] {
        for tokens in [4, 5] {
            // The last token has no finite gradient, and what is composed has gradients in its loss.
            let x = match composed && tokens == 5 {
                true => crate::tensor::constant(x.clone()),
                false => x.clone(),
            };
            let loss = loss(
                composed,
                &x,
                &weight.clone().narrow(1, 0, tokens),
                None,
                &[1, 0],
                2,
            );
            // The wrong token costs the whole distance, the right one nothing.
            assert_eq!(values(loss.clone()), [f64::from(2e38_f32)]);
            if x.is_tracked() {
                let dx = values(x.grad(&loss.backward()).unwrap());
                if tokens == 4 {
                    // Of the first row: what its token should have and has not.
                    assert_eq!(dx, [f64::from(2e19_f32), 0.0]);
                }
            }
        }
    }
}

/// Tokens that a bias of -∞ rules out, whole chunks of them at the beginning, in the middle and at the end.
#[test]
fn tokens_that_are_ruled_out_count_for_nothing() {
    let device = Device::default().autodiff();
    let (features, vocabulary) = (6, 16);
    let allowed = [4, 5, 6, 10, 11];
    let bias: Vec<f32> = (0..vocabulary)
        .map(|token| match allowed.contains(&token) {
            true => token as f32 / 10.0,
            false => f32::NEG_INFINITY,
        })
        .collect();
    let bias = Tensor::<1>::from_floats(bias.as_slice(), &device);
    let x = random([3, features], 1.0, DType::F32);
    let weight = random([features, vocabulary], 1.0, DType::F32);
    let places = Tensor::<1, Int>::from_data([4_i64, 5, 6, 10, 11], &device);
    let [x_wide, weight_wide] = [wide(&x), wide(&weight)];
    let bias_wide = wide(&bias);
    let expected = plain(
        &x_wide,
        &weight_wide.clone().select(1, places.clone()),
        None,
        Some(&bias_wide.clone().select(0, places)),
        &[0, 3, 4],
    );
    let gradients = expected.backward();
    let [dx, dw] = [&x_wide, &weight_wide].map(|t| t.grad(&gradients).unwrap());
    let d_bias = bias_wide.grad(&gradients).unwrap();
    for composed in [false, true] {
        let (x, weight, bias) = (leaf(&x), leaf(&weight), leaf(&bias));
        let loss = loss(composed, &x, &weight, Some(&bias), &[4, 10, 11], 2);
        // A handful of roundings of a sum of three losses of a few nats each.
        assert_near("loss", loss.clone(), expected.clone(), 1e-5);
        let gradients = loss.backward();
        assert_near("dx", x.grad(&gradients).unwrap(), dx.clone(), 1e-5);
        assert_near("dW", weight.grad(&gradients).unwrap(), dw.clone(), 1e-5);
        assert_near(
            "dbias",
            bias.grad(&gradients).unwrap(),
            d_bias.clone(),
            1e-5,
        );
    }
}

/// The loss of a dense head in chunks of one row by so many tokens.
fn loss(
    composed: bool,
    x: &Tensor<2>,
    weight: &Tensor<2>,
    bias: Option<&Tensor<1>>,
    labels: &[usize],
    tokens: usize,
) -> Tensor<1> {
    let head = Head {
        weight: HeadWeight::Dense(weight.clone()),
        low_rank: None,
        bias: bias.cloned(),
    };
    let chunks = HeadChunks::new(1, tokens).unwrap();
    match composed {
        true => composed::cross_entropy(x.clone(), head, labels, &chunks),
        false => cross_entropy(x.clone(), head, labels.to_vec(), &chunks),
    }
}

#[test]
fn other_dtypes_are_composed() {
    let x = random([5, 8], 1.0, DType::F16);
    let head = Head {
        weight: HeadWeight::Dense(random([8, 12], 0.2, DType::F16)),
        low_rank: None,
        bias: None,
    };
    let x = leaf(&x);
    let chunks = HeadChunks::new(2, 4).unwrap();
    let loss = cross_entropy(x.clone(), head, vec![0, 11, 4, 5, 3], &chunks);
    assert_eq!(loss.dtype(), DType::F32);
    assert_eq!(x.grad(&loss.backward()).unwrap().dtype(), DType::F16);
}
