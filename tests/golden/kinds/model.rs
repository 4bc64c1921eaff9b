//! The small model of `model.py`, in Burn.
//!
//! Both ways of computing: Burn's own layers, which compose what is attached to a weight, and `forward_peft`. The experts are
//! composed in both.

use std::path::Path;

use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig};
use burn::nn::{
    Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, PaddingConfig1d,
    PaddingConfig2d,
};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::Result;
use burn_peft::format::SafetensorsFile;
use burn_peft::model::PeftForward;

/// Two tensors of four experts, `[E, out, in]`, or `[E, in, out]` if they are transposed.
#[derive(Module, Debug)]
pub struct Experts {
    pub weight: Param<Tensor<3>>,
    pub gate: Param<Tensor<3>>,
    pub transposed: bool,
}

impl Experts {
    /// `x + 1/E · Σ_e tanh(gate_e · x) ⊙ (weight_e · x)`, `x [batch, length, features]`.
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let product = |parameter: &Param<Tensor<3>>| {
            let weight = match self.transposed {
                true => parameter.val(),
                false => parameter.val().swap_dims(1, 2),
            };
            x.clone().unsqueeze_dim::<4>(1).matmul(weight.unsqueeze())
        };
        let mixed = product(&self.gate).tanh() * product(&self.weight);
        x.clone() + mixed.mean_dim(1).squeeze_dim(1)
    }
}

/// A layer of every kind.
#[derive(Module, Debug)]
pub struct Kinds {
    pub embed: Embedding,
    pub conv1: Conv1d,
    pub grouped: Conv1d,
    pub up: Linear,
    pub norm: LayerNorm,
    pub experts: Experts,
    pub conv2: Conv2d,
    pub head: Linear,
}

impl Kinds {
    /// The model with the weights of `base.safetensors`.
    pub fn load(dir: &Path, transposed: bool, device: &Device) -> Result<Self> {
        let file = SafetensorsFile::open(dir.join("base.safetensors"), 1 << 20)?;
        let conv = |from: usize, to: usize, groups: usize| {
            Conv1dConfig::new(from, to, 3)
                .with_padding(PaddingConfig1d::Explicit(1, 1))
                .with_groups(groups)
                .init(device)
        };
        let zeros = || Param::from_tensor(Tensor::<3>::zeros([4, 16, 16], device));
        let mut model = Self {
            embed: EmbeddingConfig::new(11, 8).init(device),
            conv1: conv(8, 12, 1),
            grouped: conv(12, 12, 3),
            up: LinearConfig::new(12, 16).init(device),
            norm: LayerNormConfig::new(16).with_epsilon(1e-5).init(device),
            experts: Experts {
                weight: zeros(),
                gate: zeros(),
                transposed,
            },
            conv2: Conv2dConfig::new([1, 6], [3, 2])
                .with_stride([2, 1])
                .with_padding(PaddingConfig2d::Explicit(1, 0, 1, 0))
                .init(device),
            head: LinearConfig::new(360, 5).init(device),
        };
        let read = |name: &str| file.read(name);
        fn set<const D: usize>(param: &mut Param<Tensor<D>>, data: TensorData, device: &Device) {
            *param = Param::from_tensor(Tensor::from_data(data, device));
        }
        set(&mut model.embed.weight, read("embed.weight")?, device);
        set(&mut model.conv1.weight, read("conv1.weight")?, device);
        set(&mut model.grouped.weight, read("grouped.weight")?, device);
        set(&mut model.conv2.weight, read("conv2.weight")?, device);
        set(&mut model.norm.gamma, read("norm.weight")?, device);
        for (bias, name) in [
            (&mut model.conv1.bias, "conv1.bias"),
            (&mut model.grouped.bias, "grouped.bias"),
            (&mut model.up.bias, "up.bias"),
            (&mut model.norm.beta, "norm.bias"),
            (&mut model.conv2.bias, "conv2.bias"),
            (&mut model.head.bias, "head.bias"),
        ] {
            set(bias.as_mut().expect("a bias"), read(name)?, device);
        }
        for (linear, name) in [
            (&mut model.up, "up.weight"),
            (&mut model.head, "head.weight"),
        ] {
            let weight = Tensor::<2>::from_data(read(name)?, device).transpose();
            // Contiguous, as a layer of Burn's own has it.
            set(&mut linear.weight, weight.into_data(), device);
        }
        for (param, name) in [
            (&mut model.experts.weight, "experts.weight"),
            (&mut model.experts.gate, "experts.gate"),
        ] {
            let weight = Tensor::<3>::from_data(read(name)?, device);
            let weight = match transposed {
                true => weight.swap_dims(1, 2),
                false => weight,
            };
            set(param, weight.into_data(), device);
        }
        Ok(model)
    }

    /// `[batch, 7]` to `[batch, 5]`, by Burn's layers.
    #[allow(dead_code)] // Whatever takes the model by its path uses one of the two ways, or both.
    pub fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<2> {
        let x = self.embed.forward(tokens).swap_dims(1, 2);
        let x = self.grouped.forward(self.conv1.forward(x).tanh()).tanh();
        let x = self.up.forward(x.swap_dims(1, 2));
        let x = self.experts.forward(self.norm.forward(x));
        let x = self.conv2.forward(x.unsqueeze_dim(1)).tanh();
        self.head.forward(x.flatten::<2>(1, 3))
    }

    /// The same with the one word.
    pub fn forward_peft(&self, tokens: Tensor<2, Int>) -> Tensor<2> {
        let x = self.embed.forward_peft(tokens).swap_dims(1, 2);
        let x = self.conv1.forward_peft(x).tanh();
        let x = self.grouped.forward_peft(x).tanh();
        let x = self.up.forward_peft(x.swap_dims(1, 2));
        let x = self.experts.forward(self.norm.forward(x));
        let x = self.conv2.forward_peft(x.unsqueeze_dim(1)).tanh();
        self.head.forward_peft(x.flatten::<2>(1, 3))
    }
}
