//! Log-probabilities and statistics in chunks and their gradients, by the kernels and of a backend's own operations, against the plain ones
//! in f64, which hold all logits.
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
    temperature: f64,
    statistics: bool,
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
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let temperature = prop_oneof![Just(1.0), Just(0.7), Just(2.0)];
    (kind, sizes, chunks, flags, dtype(), dtype(), temperature).prop_map(
        |(
            kind,
            (rows, features, vocabulary, rank),
            chunks,
            (bias, trained, even, statistics),
            x,
            weight,
            temperature,
        )| {
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
                temperature,
                statistics,
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

/// The values with all logits in memory.
fn plain(
    x: &Tensor<2>,
    weight: &Tensor<2>,
    low_rank: Option<&[Tensor<2>; 2]>,
    bias: Option<&Tensor<1>>,
    labels: &[usize],
    options: &Options,
) -> Tensor<2> {
    let mut z = x.clone().matmul(weight.clone());
    if let Some([u, b]) = low_rank {
        z = z + u.clone().matmul(b.clone());
    }
    if let Some(bias) = bias {
        z = z + bias.clone().unsqueeze();
    }
    of_logits(z, labels.to_vec(), options)
}

/// Options for chunks of so many rows and tokens.
fn options(rows: usize, tokens: usize) -> Options {
    Options::new(&HeadChunks::new(rows, tokens).unwrap())
}

fn row(values: &Tensor<2>, place: usize) -> Tensor<2> {
    values.clone().narrow(0, place, 1)
}

/// `Σ −log p`.
fn loss_of(values: &Tensor<2>) -> Tensor<1> {
    row(values, rows::LOG_PROB).sum().neg()
}

/// Compares the values in chunks, by the kernels or not, with the plain ones.
fn check(case: &Case, kernels: bool) {
    let &Case {
        rows: count,
        features,
        vocabulary,
        rank,
        temperature,
        statistics,
        ..
    } = case;
    let x = random([count, features], 1.5, case.x);
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
            random([count, rank], 1.0, DType::F32),
            random([rank, vocabulary], 0.2, DType::F32),
        ]
    });
    let bias = case.bias.then(|| random([vocabulary], 1.0, DType::F32));
    let labels: Vec<usize> = values(random([count], 1.0, DType::F32))
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
    let options = Options {
        temperature,
        statistics,
        ..options(case.chunks[0], case.chunks[1])
    };
    let found = run(found_x.clone(), head, labels.clone(), &options, kernels);
    let weight = turned(held[1].clone());
    let expected = plain(
        &expected_x,
        &weight,
        expected_low.as_ref(),
        expected_bias.as_ref(),
        &labels,
        &options,
    );

    // What a logit is a sum of.
    let mut terms = expected_x.clone().abs().matmul(weight.clone().abs());
    if let Some([u, b]) = &expected_low {
        terms = terms + u.clone().abs().matmul(b.clone().abs());
    }
    let bias_size = bias.as_ref().map_or(0.0, largest);
    let dz = (features + rank + 8) as f64 * HALF_ULP * (largest(&terms) + bias_size) / temperature;
    let narrow = case.x == DType::BF16 || case.weight == DType::BF16;
    let row_chunks = count.div_ceil(case.chunks[0]);
    let eps = 2.0 * dz + 3.0 * (vocabulary + count + 16) as f64 * HALF_ULP;
    // Of probabilities an entropy takes the logarithms too, the largest of which are the range of the logits.
    let eps = match statistics {
        true => {
            eps * (4.0
                + 2.0 * largest(&row(&expected, rows::MEAN))
                + 2.0 * (vocabulary as f64).ln())
        }
        false => eps,
    };
    let eps_rounded = match narrow {
        true => {
            eps + 2.0 * (1 + row_chunks) as f64 * HALF_ULP_BF16 * if statistics { 8.0 } else { 1.0 }
        }
        false => eps,
    };
    let (eps, eps_rounded) = (
        eps / temperature.min(1.0),
        eps_rounded / temperature.min(1.0),
    );
    let many = count as f64;
    let compared = match statistics {
        true => vec![rows::LOG_PROB, rows::ENTROPY, rows::MEAN, rows::LOG_SUM_SQ],
        false => vec![rows::LOG_PROB],
    };
    assert_eq!(found.dims(), [rows::count(statistics), count]);
    for &place in &compared {
        let size = largest(&row(&expected, place));
        let bound = eps + 4.0 * HALF_ULP * size;
        assert_near(
            &format!("value {place}"),
            row(&found, place),
            row(&expected, place),
            bound,
        );
    }

    // A gradient of its own for each row and value; those of values without a gradient count for nothing.
    let dims = [rows::count(statistics), count];
    let dy = Tensor::<2>::random(dims, Distribution::Uniform(-0.5, 0.5), &x.device());
    let found = (found * dy.clone()).sum().backward();
    let differentiable = [rows::LOG_PROB, rows::ENTROPY, rows::MEAN];
    let expected = compared
        .into_iter()
        .filter(|place| differentiable.contains(place))
        .map(|place| (row(&expected, place) * row(&dy, place).cast(DType::F64)).sum())
        .reduce(|sum, part| sum + part)
        .unwrap()
        .backward();
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
    fn chunks_give_the_plain_values(case in cases()) {
        check(&case, true);
    }

    #[test]
    fn a_backends_own_operations_do_too(case in cases()) {
        // Burn's products round logits to bf16.
        let case = Case { x: DType::F32, weight: DType::F32, ..case };
        check(&case, false);
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
        let options = Options {
            statistics: true,
            ..options(50, 200)
        };
        crate::cpu::parallel::assert_same_in_pools("head", || {
            let operands = [leaf(&x), leaf(&weight), leaf(&u), leaf(&b)];
            let [x, weight, u, b] = operands.clone();
            let head = Head {
                weight: HeadWeight::Dense(weight.transpose()),
                low_rank: Some([u, b]),
                bias: None,
            };
            let rows = log_probs(x, head, labels.clone(), &options);
            let gradients = rows.clone().sum().backward();
            let of = |tensor: &Tensor<2>| values(tensor.grad(&gradients).unwrap());
            let all: Vec<f64> = operands.iter().flat_map(of).chain(values(rows)).collect();
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
            let expected = plain(&x, &weight, None, None, &labels, &options(1, 2));
            for (rows, tokens) in [(1, 2), (3, 4), (20, 6), (4, 20)] {
                let head = Head {
                    weight: HeadWeight::Dense(weight.clone()),
                    low_rank: None,
                    bias: None,
                };
                let options = options(rows, tokens);
                let found = log_probs(x.clone(), head, labels.clone(), &options);
                assert_eq!(found.dtype(), dtype);
                // A handful of roundings of a few nats.
                assert_near("log p", row(&found, 0), row(&expected, 0), 1e-5);
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
    for kernels in [true, false] {
        for tokens in [4, 5] {
            let loss = loss(
                kernels,
                &x,
                &weight.clone().narrow(1, 0, tokens),
                None,
                &[1, 0],
                2,
            );
            // The wrong token costs the whole distance, the right one nothing.
            assert_eq!(values(loss.clone()), [f64::from(2e38_f32)]);
            // The last token has no finite gradient.
            if tokens == 4 {
                let dx = values(x.grad(&loss.backward()).unwrap());
                // Of the first row: what its token should have and has not.
                assert_eq!(dx, [f64::from(2e19_f32), 0.0]);
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
        &options(1, 2),
    );
    let expected = loss_of(&expected);
    let gradients = expected.backward();
    let [dx, dw] = [&x_wide, &weight_wide].map(|t| t.grad(&gradients).unwrap());
    let d_bias = bias_wide.grad(&gradients).unwrap();
    for kernels in [true, false] {
        let (x, weight, bias) = (leaf(&x), leaf(&weight), leaf(&bias));
        let loss = loss(kernels, &x, &weight, Some(&bias), &[4, 10, 11], 2);
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
    kernels: bool,
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
    // The statistics too: what they are computed of may be infinite.
    let options = Options {
        statistics: true,
        ..options(1, tokens)
    };
    loss_of(&run(x.clone(), head, labels.to_vec(), &options, kernels))
}

#[test]
fn other_dtypes_are_served_too() {
    let x = random([5, 8], 1.0, DType::F16);
    let head = Head {
        weight: HeadWeight::Dense(random([8, 12], 0.2, DType::F16)),
        low_rank: None,
        bias: None,
    };
    let x = leaf(&x);
    let values = log_probs(x.clone(), head, vec![0, 11, 4, 5, 3], &options(2, 4));
    assert_eq!(values.dtype(), DType::F32);
    assert_eq!(
        x.grad(&loss_of(&values).backward()).unwrap().dtype(),
        DType::F16
    );
}
