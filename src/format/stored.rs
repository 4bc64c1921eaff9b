//! The tensors that a file has of a low-rank change, in PyTorch's layout.

use burn::module::Param;
use burn::tensor::{Tensor, TensorData};

use super::adapter::LoraTensors;
use super::elements::reshaped;
use crate::adapter::Lora;
use crate::layer::{LayerKind, WeightLayout};
use crate::model::Parameter;
use crate::{PeftError, Result};

impl LoraTensors {
    /// Of this change of this parameter, under the module path `path` of the file.
    ///
    /// What begins with a part of the weight is converted as PEFT does it, since the file is to be right on the untouched base,
    /// and slices become plain factors with zeros. Experts keep factors of their own, and groups PEFT's form: an `A` of all
    /// channels.
    pub(super) fn of(lora: &Lora, path: String, parameter: &Parameter) -> Result<Self> {
        match parameter.layer.map(LayerKind::layout) {
            Some(WeightLayout::Experts(_)) => of_experts(lora, path, parameter),
            Some(WeightLayout::Kernel) => of_kernel(lora, path, parameter),
            _ => {
                let lora = lora.converted();
                let mut tensors = plain(&lora, path)?;
                tensors.embedding = parameter.layer == Some(LayerKind::Embedding);
                Ok(tensors)
            }
        }
    }
}

/// Matrices and vectors as they are, transposed.
fn plain(lora: &Lora, path: String) -> Result<LoraTensors> {
    let matrix = |factor: &Param<Tensor<2>>| {
        let factor = factor.val().without_autodiff();
        host(factor.transpose(), &path)
    };
    let vector = |vector: &Option<Param<Tensor<1>>>| {
        let vector = vector.as_ref().map(|vector| vector.val());
        vector
            .map(|vector| host(vector.without_autodiff(), &path))
            .transpose()
    };
    let mut tensors = LoraTensors::new(path.clone(), matrix(&lora.a)?, matrix(&lora.b)?);
    tensors.bias = vector(&lora.bias)?;
    tensors.magnitude = vector(&lora.magnitude)?;
    Ok(tensors)
}

/// `A [E·r, d_in]` expert by expert, as it is kept here, and `B [d_out, r·E]` rank by rank.
fn of_experts(lora: &Lora, path: String, parameter: &Parameter) -> Result<LoraTensors> {
    let (experts, rank) = (parameter.shape[0], lora.rank());
    let mut tensors = plain(lora, path.clone())?;
    let b = lora.b.val().without_autodiff();
    let width = b.dims()[1] / experts.max(1);
    let by_expert: Tensor<3> = b.reshape([rank, experts, width]);
    let by_rank = by_expert
        .permute([2, 0, 1])
        .reshape([width, rank * experts]);
    tensors.b = host(by_rank, &path)?;
    tensors.experts = true;
    Ok(tensors)
}

/// Kernels in place of matrices. A change of the weight of a convolution of `g` groups becomes PEFT's, whose `A` sees all
/// channels: that of a group has the group's features, and zeros for the channels of others.
fn of_kernel(lora: &Lora, path: String, parameter: &Parameter) -> Result<LoraTensors> {
    let [_, seen, kernel @ ..] = &parameter.shape[..] else {
        unreachable!("a convolution's weight has axes");
    };
    let size = kernel.iter().product::<usize>();
    let mixes = lora.dims()[0] != seen * size;
    let groups = match lora.config().slices.all_equal() {
        Some(groups) if mixes => groups,
        _ => parameter.groups,
    };
    if groups > 1 && lora.magnitude.is_some() {
        return Err(PeftError::config(
            format!("dora of `{path}`"),
            "true",
            "false on a convolution of several groups, whose norms PEFT takes of another weight",
        ));
    }
    let lora = if mixes {
        lora.clone()
    } else {
        lora.converted()
    };
    let mut tensors = plain(&lora, path.clone())?;
    let rank = lora.rank();
    if !mixes && groups > 1 {
        let a = lora.a.val().without_autodiff().transpose();
        let zeros = |channels: usize| {
            Tensor::<2>::zeros([rank, channels * seen * size], (&a.device(), a.dtype()))
        };
        let of_group = |group: usize| {
            let parts = [(group > 0).then(|| zeros(group)), Some(a.clone())];
            let after = groups - 1 - group;
            let parts = parts.into_iter().chain([(after > 0).then(|| zeros(after))]);
            Tensor::cat(parts.flatten().collect(), 1)
        };
        let a = Tensor::cat((0..groups).map(of_group).collect(), 0);
        tensors.a = host(a, &path)?;
    }
    let d_out = lora.dims()[1];
    let shape = |of: [usize; 2], rest: &[usize]| [&of[..], rest].concat();
    let point = vec![1; kernel.len()];
    tensors.a = reshaped(tensors.a, &shape([rank * groups, seen * groups], kernel));
    tensors.b = reshaped(tensors.b, &shape([d_out, rank], &point));
    let magnitude = tensors.magnitude.take();
    tensors.magnitude = magnitude.map(|magnitude| reshaped(magnitude, &shape([1, d_out], &point)));
    Ok(tensors)
}

/// Values of a device, on the host.
pub(super) fn host<const D: usize>(values: Tensor<D>, path: &str) -> Result<TensorData> {
    values
        .try_into_data()
        .map_err(|error| PeftError::DeviceRead {
            tensor: path.to_owned(),
            reason: error.to_string(),
        })
}
