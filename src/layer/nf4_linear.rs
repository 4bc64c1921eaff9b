//! A frozen linear layer packed in NF4: `y = x·Wᵀ + b`, `W [d_out, d_in]` in NF4.
//!
//! Source: QLoRA, arXiv:2305.14314, section 3.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, FloatDType, Tensor, assert_shape};

use super::base::{FrozenLinear, Nf4Map};
use crate::Result;
use crate::adapter::FrozenMap;
use crate::nf4::{Nf4Config, Nf4Weight};

/// Configuration of a randomly initialised [`Nf4Linear`].
#[derive(Config, Debug)]
pub struct Nf4LinearConfig {
    /// Number of input features.
    pub d_input: usize,
    /// Number of output features.
    pub d_output: usize,
    /// Whether a bias is added. Default: true.
    #[config(default = true)]
    pub bias: bool,
}

impl Nf4LinearConfig {
    /// Initialises a dense layer as Burn does, then quantises it.
    ///
    /// # Errors
    ///
    /// None for finite initial values; see [`Nf4Linear::from_linear`].
    pub fn init(&self, nf4: &Nf4Config, device: &Device) -> Result<Nf4Linear> {
        let linear = LinearConfig::new(self.d_input, self.d_output).with_bias(self.bias);
        Nf4Linear::from_linear(linear.init(device), nf4)
    }
}

/// A frozen linear layer whose weight is packed in NF4.
///
/// # Memory
///
/// The packed weight and a dense bias. Between forward and backward it keeps nothing but a reference to the packed
/// weight; neither pass forms a gradient of the weight.
#[derive(Module, Debug)]
pub struct Nf4Linear {
    /// The packed weight `[d_out, d_in]`.
    pub weight: Nf4Weight,
    /// The bias `[d_out]`; requires no gradient unless it is asked to.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Nf4Linear {
    /// Quantises a dense layer and freezes it.
    ///
    /// # Errors
    ///
    /// [`PeftError::NotFinite`](crate::PeftError::NotFinite) if the weight holds a NaN or an infinity.
    pub fn from_linear(linear: Linear, config: &Nf4Config) -> Result<Self> {
        Ok(Self {
            weight: Nf4Weight::quantize("weight", linear.weight.val(), config)?,
            bias: linear.bias.map(|bias| bias.set_require_grad(false)),
        })
    }

    /// The layer's output.
    ///
    /// # Shapes
    ///
    /// `[..., d_in] -> [..., d_out]`, in the dtype of `x`.
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `x` is not `d_in`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let [d_in, _] = FrozenLinear::dims(self);
        assert_shape!(x, [.., d_in]);
        self.frozen_map().apply(x)
    }

    /// A dense layer with the dequantised weight, rounded once to `dtype`, as frozen as this one.
    pub fn dequantize(&self, dtype: FloatDType) -> Linear {
        let weight = self.weight.dequantize(dtype).transpose();
        Linear {
            weight: Param::from_tensor(weight).set_require_grad(false),
            bias: self.bias.clone(),
        }
    }
}

impl FrozenLinear for Nf4Linear {
    fn frozen_map(&self) -> impl FrozenMap {
        Nf4Map {
            weight: &self.weight,
            bias: FrozenLinear::bias(self),
        }
    }

    fn dims(&self) -> [usize; 2] {
        let [d_out, d_in] = self.weight.shape();
        [d_in, d_out]
    }

    fn dense_weight(&self) -> Tensor<2> {
        self.weight.dequantize(FloatDType::F32).transpose()
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(|bias| bias.val())
    }

    fn dense_dtype(&self) -> FloatDType {
        self.bias
            .as_ref()
            .map_or(FloatDType::F32, |bias| bias.val().dtype().into())
    }
}
