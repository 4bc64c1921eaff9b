//! Initialisations that decompose a matrix: invariants in place of signs, which are the library's.

mod delta;
mod eva;
mod fresh;
mod peft;
mod slices;
mod weight;

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig, LinearLayout};
use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use burn_peft::adapter::{LoraConfig, LoraInit};

/// Those that take a part of the weight.
const FOLDED: [LoraInit; 3] = [
    LoraInit::Pissa,
    LoraInit::PissaFast { iterations: 4 },
    LoraInit::Olora,
];

/// The CPU, with autodiff.
fn device() -> Device {
    Device::default().autodiff()
}

fn random(shape: [usize; 2]) -> Tensor<2> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device())
}

fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor.to_data().try_into_vec::<f32>().unwrap()
}

fn norm(tensor: &Tensor<2>) -> f32 {
    let square = |value: f32| f64::from(value) * f64::from(value);
    values(tensor).into_iter().map(square).sum::<f64>().sqrt() as f32
}

/// Largest difference, relative to the largest value of `right`.
fn error<const D: usize>(left: &Tensor<D>, right: &Tensor<D>) -> f32 {
    assert_eq!(left.dims(), right.dims());
    let (left, right) = (values(left), values(right));
    let largest = right
        .iter()
        .fold(0.0, |max: f32, value| max.max(value.abs()));
    let pairs = left.iter().zip(&right);
    pairs.fold(0.0, |max: f32, (l, r)| max.max((l - r).abs())) / largest
}

fn identity(n: usize) -> Tensor<2> {
    Tensor::eye(n, &device())
}

/// `[n, k]` with orthonormal columns: a product of reflections `I - 2·v·vᵀ`, cut. In f64, since in f32 the errors of `n` of them
/// would be those that tests look for.
fn orthonormal(n: usize, k: usize) -> Tensor<2> {
    let reflection = |q: Tensor<2>, _| {
        let v = random([n, 1]).cast(FloatDType::F64);
        let v = v.clone() / v.square().sum().sqrt().unsqueeze();
        q.clone() - v.clone().matmul(v.transpose().matmul(q)) * 2.0
    };
    let q = (0..n).fold(identity(n).cast(FloatDType::F64), reflection);
    q.narrow(1, 0, k).cast(FloatDType::F32)
}

/// `U [d_in, k]`, `V [d_out, k]` and the weight `[d_in, d_out]` of these singular values.
fn with_singular_values(d_in: usize, d_out: usize, sigma: &[f32]) -> [Tensor<2>; 3] {
    let (u, v) = (
        orthonormal(d_in, sigma.len()),
        orthonormal(d_out, sigma.len()),
    );
    let sigma = Tensor::<1>::from_floats(sigma, &device());
    let weight = (u.clone() * sigma.unsqueeze()).matmul(v.clone().transpose());
    [u, v, weight]
}

fn linear(weight: &Tensor<2>) -> Linear {
    let [d_in, d_out] = weight.dims();
    let mut linear = LinearConfig::new(d_in, d_out)
        .with_layout(LinearLayout::Row)
        .init(&device());
    linear.weight = Param::from_tensor(weight.clone()).no_grad();
    linear
}

fn config(init: LoraInit, rank: usize) -> LoraConfig {
    LoraConfig::new(rank).with_alpha(6.0).with_init(init)
}
