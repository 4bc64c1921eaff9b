//! Every public operation over operands in any order of memory and with sides of zero, against the same in f64 on contiguous ones,
//! where no kernel of this crate serves: results and gradients.

mod fused;
mod head;
mod layers;
mod packed;
mod view;

use burn::tensor::{DType, Gradients, Tensor};
use proptest::prelude::*;

use view::{Operand, View, view};

/// The dtypes that have kernels.
fn dtypes() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::BF16)]
}

/// A side of a tensor, now and then zero.
fn side(most: usize) -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(0_usize), 8 => 1..=most]
}

/// What is done to a result before it is summed, so that its gradient comes in another order of memory.
#[derive(Clone, Copy, Debug)]
enum Then {
    Nothing,
    Flip,
    Turn,
    /// The gradient is ones in one place.
    Sum,
}

fn then() -> impl Strategy<Value = Then> {
    prop_oneof![
        Just(Then::Nothing),
        Just(Then::Flip),
        Just(Then::Turn),
        Just(Then::Sum)
    ]
}

impl Then {
    /// A number whose gradients are compared; `weights` are in the order of the result.
    fn sum<const D: usize>(self, y: Tensor<D>, weights: Tensor<D>) -> Tensor<1> {
        let last = D as isize - 1;
        match self {
            // Burn's own operations panic on some empty tensors that are flipped.
            _ if y.dims().contains(&0) => y.sum(),
            Self::Nothing => (y * weights).sum(),
            Self::Flip => (y.flip([last]) * weights.flip([last])).sum(),
            Self::Turn if D > 1 => {
                let [y, weights] = [y, weights].map(|t| t.swap_dims(last - 1, last));
                (y * weights).sum()
            }
            Self::Turn | Self::Sum => y.sum(),
        }
    }
}

/// What an operation gives: its result, and the gradients of its operands.
struct Outcome {
    result: Vec<f64>,
    gradients: Vec<(&'static str, Vec<f64>)>,
}

/// A result, and how the gradients of its operands are asked for.
type Asked<'a, const D: usize> = (Tensor<D>, Vec<(&'static str, Grad<'a>)>);
type Grad<'a> = Box<dyn Fn(&Gradients) -> Option<Vec<f64>> + 'a>;

/// The gradient of an operand.
fn grad<const D: usize>(tensor: &Tensor<D>) -> Grad<'_> {
    Box::new(|gradients| {
        let gradient = tensor.grad(gradients)?;
        assert_eq!(gradient.dims(), tensor.dims(), "shape of a gradient");
        Some(values(gradient))
    })
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.cast(DType::F64).try_into_vec_as().unwrap()
}

fn outcome<const D: usize>((y, asked): Asked<D>, then: Then, weights: Tensor<D>) -> Outcome {
    assert_eq!(y.dims(), weights.dims(), "shape of a result");
    let weights = weights.detach().set_require_grad(false).cast(y.dtype());
    let gradients = then.sum(y.clone(), weights).backward();
    Outcome {
        result: values(y),
        gradients: asked
            .into_iter()
            .map(|(name, grad)| {
                let gradient = grad(&gradients);
                (
                    name,
                    gradient.unwrap_or_else(|| panic!("no gradient of {name}")),
                )
            })
            .collect(),
    }
}

/// Compares an operation with its twin in f64. `bound` is what a value may differ by, relative to the largest, or to 1.
fn compare<const D: usize>(
    name: &str,
    found: Asked<D>,
    expected: Asked<D>,
    then: Then,
    bound: f64,
) {
    let dims = expected.0.dims();
    let weights = View::plain(D).operand(dims, DType::BF16, 99);
    let found = outcome(found, then, weights.view);
    let expected = outcome(expected, then, weights.wide);
    near(
        &format!("{name}: result"),
        &found.result,
        &expected.result,
        bound,
    );
    for ((of, found), (_, expected)) in found.gradients.iter().zip(&expected.gradients) {
        near(&format!("{name}: gradient of {of}"), found, expected, bound);
    }
}

fn near(name: &str, found: &[f64], expected: &[f64], bound: f64) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let largest = expected.iter().fold(1.0_f64, |most, v| most.max(v.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let difference = (found - expected).abs();
        // NaN is not near anything.
        assert!(
            difference <= bound * largest,
            "{name}[{i}] is {found}, not {expected}"
        );
    }
}

/// Room for sums of a few hundred terms in f32, and for some roundings to bf16.
fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 0.04,
        _ => 1e-4,
    }
}
