//! How the weight of a layer is a matrix `[d_in, d_out]` that a low-rank product can change.
//!
//! Of a convolution, `d_in` are the values under its kernel, `channels_in/groups · k_1 ⋯ k_n`, and `d_out` its output channels; of
//! an embedding, `d_in` are the tokens and `d_out` the features. Of `E` experts in one tensor, `d_out` are the outputs of all,
//! expert after expert.

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
    /// Weights of several experts in one tensor of any module.
    Experts(ExpertLayout),
}

/// How the weights of experts lie in one tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExpertLayout {
    /// `[experts, d_in, d_out]`, for `x · W_e`: as Burn's linear layers have it.
    #[default]
    InOut,
    /// `[experts, d_out, d_in]`: as PyTorch's linear layers have it.
    OutIn,
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
            Self::Experts(layout) => WeightLayout::Experts(layout),
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
    /// One matrix for each expert.
    Experts(ExpertLayout),
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
            Self::Experts(ExpertLayout::InOut) => [shape[1], shape[0] * shape[2]],
            Self::Experts(ExpertLayout::OutIn) => [shape[2], shape[0] * shape[1]],
        }
    }

    /// The weight as `[d_in, d_out]`.
    pub(crate) fn to_matrix<const D: usize>(self, weight: Tensor<D>) -> Tensor<2> {
        let [d_in, d_out] = self.dims(&weight.dims());
        match self {
            Self::Matrix => weight.reshape([d_in, d_out]),
            Self::Kernel => weight.reshape([d_out, d_in]).transpose(),
            Self::Experts(ExpertLayout::InOut) => weight.swap_dims(0, 1).reshape([d_in, d_out]),
            Self::Experts(ExpertLayout::OutIn) => weight.reshape([d_out, d_in]).transpose(),
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
            Self::Kernel | Self::Experts(ExpertLayout::OutIn) => matrix.transpose().reshape(dims),
            Self::Experts(ExpertLayout::InOut) => {
                let mut swapped = dims;
                swapped.swap(0, 1);
                matrix.reshape(swapped).swap_dims(0, 1)
            }
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
        let channel = weight.clone().narrow(0, 2, 1).reshape([24]);
        assert_eq!(column.into_data(), channel.into_data());
        let back = WeightLayout::Kernel.of_matrix(matrix, [5, 4, 3, 2]);
        assert_eq!(back.into_data(), weight.clone().into_data());

        let experts: Tensor<3> = weight.reshape([5, 4, 6]);
        for (layout, [d_in, width]) in
            [(ExpertLayout::InOut, [4, 6]), (ExpertLayout::OutIn, [6, 4])]
        {
            let as_layout = WeightLayout::Experts(layout);
            assert_eq!(as_layout.dims(&[5, 4, 6]), [d_in, 5 * width]);
            let matrix = as_layout.to_matrix(experts.clone());
            let third = matrix.clone().narrow(1, 2 * width, width);
            let own = experts.clone().narrow(0, 2, 1).reshape([4, 6]);
            let own = match layout {
                ExpertLayout::InOut => own,
                ExpertLayout::OutIn => own.transpose(),
            };
            assert_eq!(third.into_data(), own.into_data());
            let back = as_layout.of_matrix(matrix, [5, 4, 6]);
            assert_eq!(back.into_data(), experts.clone().into_data());
        }
    }
}
