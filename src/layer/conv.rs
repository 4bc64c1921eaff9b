//! Convolutions as frozen layers: `f(x; W) = x * W`, the weight seen as a matrix `[channels_in/groups·k, channels_out]`.
//!
//! A low-rank change is a convolution to `r` channels by `A`, with the layer's own stride, padding and dilation, and one of
//! kernel size 1 by `B`. (PEFT leaves out the dilation, and fails where there is one.)
//!
//! With `g` groups there are two forms. One changes the weight: the outputs of a group are `B` times `A * x` of the group's own
//! channels, the same `A` for all. PEFT's is another: its `A` sees the channels of all groups, each group has `r/g` of the `r` features
//! to itself, and that is no change of a weight which has the channels of one group only. It has to run by `forward_peft`.

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

    /// How many groups its channels are in.
    fn groups(&self) -> usize;

    /// The same convolution with another weight.
    fn with_weight(&self, weight: Tensor<D>) -> Self;

    /// The same convolution with another weight and number of groups, and no bias.
    fn convolve(&self, x: Tensor<D>, weight: Tensor<D>, groups: usize) -> Tensor<D>;

    /// The convolution with a kernel of size 1, `[channels_out, channels_in/groups, 1, …]`.
    fn pointwise(x: Tensor<D>, weight: Tensor<D>, groups: usize) -> Tensor<D>;
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

    fn groups(&self) -> usize {
        self.groups
    }

    fn with_weight(&self, weight: Tensor<3>) -> Self {
        let mut conv = self.clone();
        conv.weight = passing(weight);
        conv
    }

    fn convolve(&self, x: Tensor<3>, weight: Tensor<3>, groups: usize) -> Tensor<3> {
        let mut conv = self.clone();
        (conv.weight, conv.bias, conv.groups) = (passing(weight), None, groups);
        conv.forward(x)
    }

    fn pointwise(x: Tensor<3>, weight: Tensor<3>, groups: usize) -> Tensor<3> {
        conv1d(x, weight, None, ConvOptions::new([1], [0], [1], groups))
    }
}

impl Conv<4> for Conv2d {
    fn weight(&self) -> &Param<Tensor<4>> {
        &self.weight
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(|bias| bias.val())
    }

    fn groups(&self) -> usize {
        self.groups
    }

    fn with_weight(&self, weight: Tensor<4>) -> Self {
        let mut conv = self.clone();
        conv.weight = passing(weight);
        conv
    }

    fn convolve(&self, x: Tensor<4>, weight: Tensor<4>, groups: usize) -> Tensor<4> {
        let mut conv = self.clone();
        (conv.weight, conv.bias, conv.groups) = (passing(weight), None, groups);
        conv.forward(x)
    }

    fn pointwise(x: Tensor<4>, weight: Tensor<4>, groups: usize) -> Tensor<4> {
        conv2d(
            x,
            weight,
            None,
            ConvOptions::new([1; 2], [0; 2], [1; 2], groups),
        )
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
        self.conv
            .convolve(x, self.weight.clone(), self.conv.groups())
    }

    fn low_rank(&self, x: Tensor<D>, a: Tensor<2>, b: Tensor<2>) -> Tensor<D> {
        let x = cast(x, a.dtype().into());
        let ([d_in, _], [rank, d_out]) = (a.dims(), b.dims());
        let mut kernel = self.weight.dims();
        let [seen, groups] = [kernel[1], self.conv.groups()];
        let size = kernel[2..].iter().product::<usize>().max(1);
        (kernel[0], kernel[1]) = (rank, d_in / size);
        let mut a: Tensor<D> = WeightLayout::Kernel.of_matrix(a, kernel);
        let mut point = [1; D];
        (point[0], point[1]) = (d_out, rank);
        let b = WeightLayout::Kernel.of_matrix(b, point);
        // An `A` of the channels of one group is there for every group, whose outputs see its features alone. PEFT's sees
        // all channels, and what comes of it is for `B` to share out.
        let groups = if kernel[1] == seen { groups } else { 1 };
        if groups > 1 {
            a = Tensor::cat(vec![a; groups], 0);
        }
        C::pointwise(self.conv.convolve(x, a, groups), b, groups)
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
