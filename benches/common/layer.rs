//! One linear layer in every way it can be trained here: frozen, with our adapters, with Burn's.

use std::hint::black_box;

use burn::module::{Lora, Module, Param, QLora, Quantizer};
use burn::nn::Linear;
use burn::tensor::quantization::{Calibration, QuantValue};
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_peft::adapter::LoraConfig;
use burn_peft::layer::{LoraLinear, QLoraLinear};
use burn_peft::nf4::Nf4Config;

/// What is done to the layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Nothing: a dense frozen layer.
    Frozen,
    /// `LoraLinear`.
    Lora,
    /// `QLoraLinear`, scales in f32.
    QLora,
    /// `QLoraLinear`, scales quantised too.
    QLoraDouble,
    /// DoRA over a dense base.
    Dora,
    /// DoRA over a packed base, scales in f32.
    QDora,
    /// Burn's `apply_lora`.
    BurnLora,
    /// Burn's `apply_qlora` to four bits, symmetric.
    BurnQLora,
}

/// A layer without bias on an autodiff device, ready to train.
pub enum Layer {
    /// A layer of Burn's, with or without one of Burn's adapters.
    Linear(Linear),
    /// Ours over a dense base.
    Lora(LoraLinear),
    /// Ours over a packed base.
    QLora(QLoraLinear),
}

impl Layer {
    /// A layer of `[d_in, d_out]` with adapters of rank `rank`; the dense weight is freed if the method packs it.
    pub fn new(method: Method, [d_in, d_out]: [usize; 2], rank: usize, device: &Device) -> Self {
        let linear = Linear {
            weight: Param::from_tensor(super::weight([d_in, d_out], DType::F32, device)),
            bias: None,
        }
        .no_grad();
        let config = LoraConfig::new(rank).with_alpha(rank as f64);
        let burn_lora = Lora::new(rank, rank as f64).set_dtype(FloatDType::F32);
        let dora = config.clone().with_dora(true);
        let packed = |nf4, config| {
            Self::QLora(QLoraLinear::from_linear(linear.clone(), &nf4, config).unwrap())
        };
        match method {
            Method::Frozen => Self::Linear(linear),
            Method::Lora => Self::Lora(LoraLinear::from_linear(linear, &config).unwrap()),
            Method::QLora => packed(Nf4Config::new(), &config),
            Method::QLoraDouble => packed(Nf4Config::new().with_double_quant(true), &config),
            Method::Dora => Self::Lora(LoraLinear::from_linear(linear, &dora).unwrap()),
            Method::QDora => packed(Nf4Config::new(), &dora),
            Method::BurnLora => Self::Linear(linear.apply_lora(burn_lora)),
            Method::BurnQLora => {
                let scheme = device.settings().quantization.scheme;
                let quantizer =
                    Quantizer::new(Calibration::MinMax, scheme.with_value(QuantValue::Q4S));
                Self::Linear(linear.apply_qlora(QLora::new(burn_lora, quantizer)))
            }
        }
    }

    /// `[tokens, d_in] -> [tokens, d_out]`, by the forward of the layer itself.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Linear(layer) => layer.forward(x),
            Self::Lora(layer) => layer.forward(x),
            Self::QLora(layer) => layer.forward(x),
        }
    }

    /// Forward and backward as in the middle of a model: gradients of the factors and of the input.
    pub fn forward_backward(&self, x: &Tensor<2>) {
        let x = x.clone().require_grad();
        black_box(self.forward(x).backward());
    }
}
