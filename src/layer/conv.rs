//! Convolutions as frozen layers: `f(x; W) = x * W`, the weight seen as a matrix `[channels_in/groups·k, channels_out]`.
//!
//! A low-rank change is a convolution to `r` channels by `A`, with the layer's own stride, padding and dilation, and one of
//! kernel size 1 by `B`.

use burn::module::{Param, ParamId};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Int, Tensor, module::conv1d, module::conv2d};

use super::base::DenseMap;
use super::layout::WeightLayout;
use crate::adapter::{FrozenLayer, FrozenMap, Lora, cast};

/// A convolution of Burn's, of inputs and weights of `D` axes.
pub(crate) trait Conv<const D: usize>: Clone {
    /// Its weight.
    fn weight(&self) -> &Param<Tensor<D>>;

    /// Its bias.
    fn bias(&self) -> Option<Tensor<1>>;

    /// The same convolution with another weight, and no bias.
    fn convolve(&self, x: Tensor<D>, weight: Tensor<D>) -> Tensor<D>;

    /// The convolution with a kernel of size 1, `[channels_out, channels_in, 1, …]`.
    fn pointwise(x: Tensor<D>, weight: Tensor<D>) -> Tensor<D>;
}

/// A parameter for the moment of a call: Burn's own forward pass is what knows paddings.
fn passing<const D: usize>(weight: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(ParamId::new(), weight)
}

impl Conv<3> for Conv1d {
    fn weight(&self) -> &Param<Tensor<3>> {
        &self.weight
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(|bias| bias.val())
    }

    fn convolve(&self, x: Tensor<3>, weight: Tensor<3>) -> Tensor<3> {
        let mut conv = self.clone();
        (conv.weight, conv.bias) = (passing(weight), None);
        conv.forward(x)
    }

    fn pointwise(x: Tensor<3>, weight: Tensor<3>) -> Tensor<3> {
        conv1d(x, weight, None, ConvOptions::new([1], [0], [1], 1))
    }
}

impl Conv<4> for Conv2d {
    fn weight(&self) -> &Param<Tensor<4>> {
        &self.weight
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(|bias| bias.val())
    }

    fn convolve(&self, x: Tensor<4>, weight: Tensor<4>) -> Tensor<4> {
        let mut conv = self.clone();
        (conv.weight, conv.bias) = (passing(weight), None);
        conv.forward(x)
    }

    fn pointwise(x: Tensor<4>, weight: Tensor<4>) -> Tensor<4> {
        conv2d(x, weight, None, ConvOptions::new([1; 2], [0; 2], [1; 2], 1))
    }
}

/// A convolution with its frozen weight.
pub(crate) struct ConvLayer<'a, C, const D: usize> {
    pub conv: &'a C,
    pub weight: Tensor<D>,
}

impl<C: Conv<D>, const D: usize> FrozenLayer<D> for ConvLayer<'_, C, D> {
    type Input = Tensor<D>;

    fn apply(&self, x: Tensor<D>) -> Tensor<D> {
        self.conv.convolve(x, self.weight.clone())
    }

    fn low_rank(&self, x: Tensor<D>, a: Tensor<2>, b: Tensor<2>) -> Tensor<D> {
        let x = cast(x, a.dtype().into());
        let [rank, d_out] = b.dims();
        let mut kernel = self.weight.dims();
        kernel[0] = rank;
        let a = WeightLayout::Kernel.of_matrix(a, kernel);
        let mut point = [1; D];
        (point[0], point[1]) = (d_out, rank);
        let b = WeightLayout::Kernel.of_matrix(b, point);
        C::pointwise(self.conv.convolve(x, a), b)
    }

    fn dropped(&self, x: &Tensor<D>, lora: &Lora) -> Option<Tensor<D>> {
        lora.drops(x).then(|| lora.dropout.forward(x.clone()))
    }

    fn column_norms(&self, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<1> {
        let weight = WeightLayout::Kernel.to_matrix(self.weight.clone());
        DenseMap { weight, bias: None }.column_norms(a, b, scale)
    }

    fn along_outputs(&self, values: Tensor<1>) -> Tensor<D> {
        let mut dims = [1; D];
        dims[1] = values.dims()[0];
        values.reshape(dims)
    }

    fn rows(x: &Tensor<D>, rows: Tensor<1, Int>) -> Tensor<D> {
        x.clone().select(0, rows)
    }
}
