//! Gradients against finite differences, against the dequantised layer, and under gradient checkpointing.

use burn::module::Param;
use burn::nn::LinearLayout;
use burn::tensor::{Device, FloatDType, Tensor};
use burn_peft::adapter::{Lora, LoraConfig};
use burn_peft::layer::{Adapted, FrozenLinear, LoraLinear, Nf4Linear, QLoraLinear};
use burn_peft::nf4::{BlockSize, Nf4Config};

use crate::layers::{device, grad, linear, lora, max_diff, random, scale, trainable, values};

const D_IN: usize = 24;
const D_OUT: usize = 18;
const ROWS: usize = 5;

fn config() -> LoraConfig {
    LoraConfig::new(3).with_alpha(5.0)
}

fn nf4() -> Nf4Config {
    Nf4Config::new().with_block_size(BlockSize::new(32).unwrap())
}

fn nf4_linear(device: &Device) -> Nf4Linear {
    let linear = linear(D_IN, D_OUT, true, LinearLayout::Row, device);
    let mut base = Nf4Linear::from_linear(linear, &nf4()).unwrap();
    base.bias = base.bias.map(trainable);
    base
}

/// A loss whose gradient with respect to the output is not constant.
fn loss(y: Tensor<2>) -> Tensor<1> {
    y.powi_scalar(2).sum() * 0.5
}

/// `(dx, dA, dB, dbias)`.
fn gradients<B: FrozenLinear>(
    layer: &Adapted<B, Lora>,
    x: &Tensor<2>,
) -> (Tensor<2>, Tensor<2>, Tensor<2>, Tensor<1>) {
    let x = x.clone().detach().require_grad();
    let gradients = loss(layer.forward(x.clone())).backward();
    (
        grad(&x, &gradients),
        grad(&layer.delta.a.val(), &gradients),
        grad(&layer.delta.b.val(), &gradients),
        grad(&layer.base.bias().unwrap(), &gradients),
    )
}

#[test]
fn finite_differences_of_a_packed_layer() {
    let device = device();
    device.seed(1);
    let base = nf4_linear(&device);
    let delta = lora(&config(), D_IN, D_OUT, &device);
    let x = random([ROWS, D_IN], &device);
    let layer = Adapted {
        base: base.clone(),
        delta: delta.clone(),
    };
    let (dx, da, db, dbias) = gradients(&layer, &x);

    let at = |x: &Tensor<2>, a: &Tensor<2>, b: &Tensor<2>, bias: &Tensor<1>| -> f64 {
        let mut base = base.clone();
        base.bias = Some(Param::from_tensor(bias.clone()));
        let delta = config().with_factors(a.clone(), b.clone()).unwrap();
        let y = Adapted { base, delta }.forward(x.clone());
        // In f64 over the outputs, so that the difference of two losses keeps its digits.
        values(&y)
            .iter()
            .map(|&y| 0.5 * f64::from(y) * f64::from(y))
            .sum()
    };
    let (a, b) = (delta.a.val().detach(), delta.b.val().detach());
    let bias = base.bias().unwrap().detach();

    // The loss is a polynomial of degree two in each of x, A, B and bias alone, so that a central difference is exact
    // but for rounding: outputs of f32 (relative 6e-8, a sum of about 30 terms) over a step of 0.25.
    fn check<const D: usize>(
        what: &str,
        point: &Tensor<D>,
        gradient: &Tensor<D>,
        f: impl Fn(&Tensor<D>) -> f64,
    ) {
        const STEP: f32 = 0.25;
        let (start, expected) = (values(point), values(gradient));
        let tolerance = 2e-4 * f64::from(scale(gradient));
        for i in (0..start.len()).step_by(7) {
            let shifted = |by: f32| {
                let mut values = start.clone();
                values[i] += by;
                let data = burn::tensor::TensorData::new(values, point.dims());
                f(&Tensor::from_data(data, &point.device()))
            };
            let difference = (shifted(STEP) - shifted(-STEP)) / (2.0 * f64::from(STEP));
            let error = (difference - f64::from(expected[i])).abs();
            assert!(
                error <= tolerance,
                "{what}[{i}]: {difference} against {}",
                expected[i]
            );
        }
    }
    check("x", &x, &dx, |x| at(x, &a, &b, &bias));
    check("A", &a, &da, |a| at(&x, a, &b, &bias));
    check("B", &b, &db, |b| at(&x, &a, b, &bias));
    check("bias", &bias, &dbias, |bias| at(&x, &a, &b, bias));
}

#[test]
fn a_packed_layer_equals_a_dense_one_over_its_dequantised_weight() {
    let device = device();
    device.seed(2);
    let base = nf4_linear(&device);
    let delta = lora(&config(), D_IN, D_OUT, &device);
    let x = random([ROWS, D_IN], &device);
    let mut dense = base.dequantize(FloatDType::F32);
    dense.bias = dense.bias.map(trainable);
    let packed: QLoraLinear = Adapted {
        base,
        delta: delta.clone(),
    };
    let dense: LoraLinear = Adapted { base: dense, delta };

    // The same f32 products in a sum of another order: 24 terms, relative to the largest value.
    let close = |diff: f32, scale: f32| assert!(diff <= 4e-6 * scale, "{diff:e} against {scale:e}");
    let (y, expected) = (packed.forward(x.clone()), dense.forward(x.clone()));
    close(max_diff(&y, &expected), scale(&expected));
    let (left, right) = (gradients(&packed, &x), gradients(&dense, &x));
    close(max_diff(&left.0, &right.0), scale(&right.0));
    close(max_diff(&left.1, &right.1), scale(&right.1));
    close(max_diff(&left.2, &right.2), scale(&right.2));
    close(max_diff(&left.3, &right.3), scale(&right.3));
}

#[test]
fn checkpointing_gives_the_same_gradients() {
    let plain = device();
    let checkpointed = Device::default().autodiff().gradient_checkpointing();
    // Drawn once: the generator is shared with other tests, so that a seed does not give the same numbers twice.
    let draw = |shape| random(shape, &plain).into_data();
    let (weight, a, b) = (draw([D_IN, D_OUT]), draw([D_IN, 3]), draw([3, D_OUT]));
    let (bias, x) = (draw([1, D_OUT]), draw([ROWS, D_IN]));
    let run = |device: &Device| {
        let on = |data: &burn::tensor::TensorData| Tensor::<2>::from_data(data.clone(), device);
        let base = burn::nn::Linear {
            weight: Param::from_tensor(on(&weight)).set_require_grad(false),
            bias: Some(Param::from_tensor(on(&bias).squeeze_dim::<1>(0))),
        };
        let delta = config().with_factors(on(&a), on(&b)).unwrap();
        let mut nf4 = Nf4Linear::from_linear(base.clone(), &nf4()).unwrap();
        nf4.bias = nf4.bias.map(trainable);
        let packed = Adapted {
            base: nf4,
            delta: delta.clone(),
        };
        let dense = Adapted { base, delta };
        (gradients(&packed, &on(&x)), gradients(&dense, &on(&x)))
    };
    let (left, right) = (run(&plain), run(&checkpointed));
    for (left, right) in [(left.0, right.0), (left.1, right.1)] {
        // The same operations on the same numbers, only later.
        assert_eq!(values(&left.0), values(&right.0));
        assert_eq!(values(&left.1), values(&right.1));
        assert_eq!(values(&left.2), values(&right.2));
        assert_eq!(values(&left.3), values(&right.3));
        assert!(scale(&left.0) > 1.0, "the gradients are not all zero");
    }
}

#[test]
fn the_transposed_product_is_the_other_ones_backward() {
    let device = device();
    device.seed(4);
    let weight = nf4_linear(&device).weight;
    let y = random([ROWS, D_OUT], &device).require_grad();
    let upstream = random([ROWS, D_IN], &device);
    let x = weight.matmul_transposed(y.clone());
    let expected = y
        .clone()
        .detach()
        .matmul(weight.dequantize(FloatDType::F32));
    assert!(max_diff(&x, &expected) <= 4e-6 * scale(&expected));
    let gradients = (x * upstream.clone()).sum().backward();
    let expected = weight.matmul(upstream);
    assert!(max_diff(&grad(&y, &gradients), &expected) <= 4e-6 * scale(&expected));
}
