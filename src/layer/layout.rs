//! How the weight of a layer is a matrix `[d_in, d_out]` that a low-rank product can change.
//!
//! Of a convolution, `d_in` are the values under its kernel, `channels_in/groups · k_1 ⋯ k_n`, and `d_out` its output channels; of
//! an embedding, `d_in` are the tokens and `d_out` the features.

use burn::tensor::Tensor;

/// A layer of Burn's whose weight an adapter can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LayerKind {
    /// `Linear`.
    Linear,
    /// `Embedding`.
    Embedding,
    /// `Conv1d` or `Conv2d`.
    Conv,
}

impl LayerKind {
    /// The kind of the layer whose type, as Burn's derive calls it, holds a parameter of this name and number of axes.
    pub(crate) fn of(holder: &str, name: &str, axes: usize) -> Option<Self> {
        match (holder, name, axes) {
            ("Linear", "weight", 2) => Some(Self::Linear),
            ("Embedding", "weight", 2) => Some(Self::Embedding),
            ("Conv1d", "weight", 3) | ("Conv2d", "weight", 4) => Some(Self::Conv),
            _ => None,
        }
    }

    /// How its weight is a matrix.
    pub(crate) fn layout(self) -> WeightLayout {
        match self {
            Self::Linear | Self::Embedding => WeightLayout::Matrix,
            Self::Conv => WeightLayout::Kernel,
        }
    }
}

/// The layout of a weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum WeightLayout {
    /// `[d_in, d_out]` as it is: Burn's linear layers and embeddings.
    #[default]
    Matrix,
    /// `[d_out, channels_in/groups, k_1, …, k_n]`: Burn's convolutions.
    Kernel,
}

impl WeightLayout {
    /// `[d_in, d_out]` of a weight of this shape.
    ///
    /// # Panics
    ///
    /// Panics if the shape has fewer than two axes.
    pub(crate) fn dims(self, shape: &[usize]) -> [usize; 2] {
        match self {
            Self::Matrix => [shape[0], shape[1]],
            Self::Kernel => [shape[1..].iter().product(), shape[0]],
        }
    }

    /// The weight as `[d_in, d_out]`.
    pub(crate) fn to_matrix<const D: usize>(self, weight: Tensor<D>) -> Tensor<2> {
        let [d_in, d_out] = self.dims(&weight.dims());
        match self {
            Self::Matrix => weight.reshape([d_in, d_out]),
            Self::Kernel => weight.reshape([d_out, d_in]).transpose(),
        }
    }

    /// The weight of shape `dims` that is this matrix.
    pub(crate) fn of_matrix<const D: usize>(
        self,
        matrix: Tensor<2>,
        dims: [usize; D],
    ) -> Tensor<D> {
        match self {
            Self::Matrix => matrix.reshape(dims),
            Self::Kernel => matrix.transpose().reshape(dims),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Int};

    use super::*;

    #[test]
    fn a_weight_comes_back_from_its_matrix() {
        let device = Device::flex();
        let weight = Tensor::<1, Int>::arange(0..120, &device).float();
        let weight: Tensor<4> = weight.reshape([5, 4, 3, 2]);
        let matrix = WeightLayout::Kernel.to_matrix(weight.clone());
        assert_eq!(matrix.dims(), [24, 5]);
        assert_eq!(WeightLayout::Kernel.dims(&[5, 4, 3, 2]), [24, 5]);
        // A column holds what one output channel sees.
        let column = matrix.clone().slice([0..24, 2..3]).reshape([24]);
        let channel = weight.clone().slice([2..3]).reshape([24]);
        assert_eq!(column.into_data(), channel.into_data());
        let back = WeightLayout::Kernel.of_matrix(matrix, [5, 4, 3, 2]);
        assert_eq!(back.into_data(), weight.into_data());
    }
}
