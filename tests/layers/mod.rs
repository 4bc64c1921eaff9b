//! Adapted layers: values, gradients, training, merging.

mod golden;
mod gradients;
mod merging;
mod properties;
mod training;

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig, LinearLayout};
use burn::tensor::{Device, Distribution, Tensor};
use burn_peft::adapter::{Lora, LoraConfig};

/// The CPU, with autodiff.
fn device() -> Device {
    Device::default().autodiff()
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

fn linear(d_in: usize, d_out: usize, bias: bool, layout: LinearLayout, device: &Device) -> Linear {
    LinearConfig::new(d_in, d_out)
        .with_bias(bias)
        .with_layout(layout)
        .init(device)
}

/// Factors with `B` not zero, which a fresh adapter would hide behind, and a magnitude if it is DoRA.
fn lora(config: &LoraConfig, d_in: usize, d_out: usize, device: &Device) -> Lora {
    let a = random([d_in, config.rank], device);
    let b = random([config.rank, d_out], device);
    let lora = config.with_factors(a, b).unwrap();
    match config.dora {
        false => lora,
        true => {
            let any = Distribution::Uniform(0.5, 2.0);
            let magnitude = Tensor::random([d_out], any, device);
            lora.with_magnitude(magnitude).unwrap()
        }
    }
}

fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor.to_data().try_into_vec::<f32>().unwrap()
}

fn max_diff<const D: usize>(left: &Tensor<D>, right: &Tensor<D>) -> f32 {
    assert_eq!(left.dims(), right.dims());
    values(left)
        .iter()
        .zip(values(right))
        .map(|(l, r)| (l - r).abs())
        .fold(0.0, f32::max)
}

/// Largest absolute value, at least 1: what a tolerance is relative to.
fn scale<const D: usize>(tensor: &Tensor<D>) -> f32 {
    values(tensor)
        .iter()
        .fold(1.0, |max: f32, value| max.max(value.abs()))
}

fn trainable<const D: usize>(param: Param<Tensor<D>>) -> Param<Tensor<D>> {
    param.set_require_grad(true)
}

fn grad<const D: usize>(tensor: &Tensor<D>, gradients: &burn::tensor::Gradients) -> Tensor<D> {
    tensor
        .grad(gradients)
        .expect("the gradient of a tensor that requires one")
}

fn num_params(module: &impl Module) -> usize {
    module.num_params()
}
