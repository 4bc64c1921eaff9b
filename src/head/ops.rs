//! The loss of a head on Burn's CPU backend, and what it is under autodiff.

// `backend_extension` checks the features of this crate and of Burn in what it generates.
#![allow(unexpected_cfgs)]

use burn::backend::{
    Autodiff, AutodiffBackend, Backend, Dispatch, Flex,
    autodiff::{
        NodeId,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    tensor::FloatTensor,
};
use burn::tensor::{DType, Tensor, TensorData};

use super::flex::{Operands, Weight};
use super::{Head, HeadChunks, HeadWeight};
use crate::cpu::flex::Float;
use crate::fused::cpu::cross_entropy::Running;
use crate::fused::cpu::serves as is_served;
use crate::nf4::Nf4Tensors;

/// What is no tensor.
#[derive(Clone, Debug)]
pub(crate) struct Labelled {
    labels: Vec<usize>,
    chunks: HeadChunks,
}

/// The operations, on f32 and bf16; `u`, `b` and the bias are f32, and empty where there is none.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait HeadOps: Backend {
    /// See [`cross_entropy`](super::cross_entropy).
    fn head_dense(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        rest: Labelled,
    ) -> FloatTensor<Self>;

    /// The same with a packed weight.
    fn head_nf4(
        x: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        #[extension_type] weight: Nf4Tensors<Self>,
        rest: Labelled,
    ) -> FloatTensor<Self>;
}

/// Whether the kernels are for these.
pub(super) fn serves(x: &Tensor<2>, head: &Head) -> bool {
    let weight = match &head.weight {
        HeadWeight::Dense(weight) => is_served(weight),
        HeadWeight::Nf4(_) => true,
    };
    let low_rank = head.low_rank.iter().flatten();
    is_served(x)
        && weight
        && low_rank.into_iter().all(is_served)
        && head.bias.as_ref().is_none_or(is_served)
}

pub(super) fn cross_entropy(
    x: Tensor<2>,
    head: Head,
    labels: Vec<usize>,
    chunks: &HeadChunks,
) -> Tensor<1> {
    let rest = Labelled {
        labels,
        chunks: *chunks,
    };
    let device = x.device();
    let nothing = || Tensor::<1>::empty([0], (&device, DType::F32)).into_dispatch();
    let [u, b] = match head.low_rank {
        Some(pair) => pair.map(Tensor::into_dispatch),
        None => [nothing(), nothing()],
    };
    let bias = head.bias.map_or_else(nothing, Tensor::into_dispatch);
    let x = x.into_dispatch();
    Tensor::from_dispatch(match head.weight {
        HeadWeight::Dense(weight) => {
            let weight = weight.into_dispatch();
            <Dispatch as HeadOps>::head_dense(x, weight, u, b, bias, rest)
        }
        HeadWeight::Nf4(weight) => {
            <Dispatch as HeadOps>::head_nf4(x, u, b, bias, weight.tensors(), rest)
        }
    })
}

fn operands(x: Float, weight: Weight, [u, b, bias]: [Float; 3], rest: Labelled) -> Operands {
    let there = |tensor: Float| (tensor.layout().num_elements() > 0).then_some(tensor);
    Operands {
        x,
        weight,
        low_rank: there(u).zip(there(b)).map(|(u, b)| [u, b]),
        bias: there(bias),
        labels: rest.labels,
        chunks: rest.chunks,
    }
}

impl HeadOps for Flex {
    fn head_dense(
        x: Float,
        weight: Float,
        u: Float,
        b: Float,
        bias: Float,
        rest: Labelled,
    ) -> Float {
        let weight = Weight::Dense(weight);
        operands(x, weight, [u, b, bias], rest).forward().0
    }

    fn head_nf4(
        x: Float,
        u: Float,
        b: Float,
        bias: Float,
        weight: Nf4Tensors<Self>,
        rest: Labelled,
    ) -> Float {
        let weight = Weight::Nf4(weight);
        operands(x, weight, [u, b, bias], rest).forward().0
    }
}

impl<C: CheckpointStrategy> HeadOps for Autodiff<Flex, C> {
    fn head_dense(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        rest: Labelled,
    ) -> FloatTensor<Self> {
        tracked::<C>([x, weight, u, b, bias], None, rest)
    }

    fn head_nf4(
        x: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        weight: Nf4Tensors<Self>,
        rest: Labelled,
    ) -> FloatTensor<Self> {
        // A parent that requires no gradient, in the place of a dense weight.
        let nothing = Float::from_data(TensorData::new(Vec::<f32>::new(), [0]));
        let parents = [x, Self::from_inner(nothing), u, b, bias];
        tracked::<C>(parents, Some(weight.into_inner()), rest)
    }
}

/// The sum, whose parents are `x`, the weight (nothing if it is packed), `u`, `b` and the bias.
fn tracked<C: CheckpointStrategy>(
    parents: [FloatTensor<Autodiff<Flex, C>>; 5],
    packed: Option<Nf4Tensors<Flex>>,
    rest: Labelled,
) -> FloatTensor<Autodiff<Flex, C>> {
    let nodes = parents.each_ref().map(|tensor| tensor.node());
    let [x, dense, u, b, bias] = parents.map(|tensor| tensor.into_primitive());
    let weight = match packed {
        Some(packed) => Weight::Nf4(packed),
        None => Weight::Dense(dense),
    };
    let operands = operands(x, weight, [u, b, bias], rest);
    let (sum, running) = operands.forward();
    match HeadLoss.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish((operands, running), sum),
        OpsKind::UnTracked(prep) => prep.finish(sum),
    }
}

#[derive(Debug)]
struct HeadLoss;

impl Backward<Flex, 5> for HeadLoss {
    /// The operands, shared, and what is known of each row's logits.
    type State = (Operands, Vec<Running>);

    fn backward(
        self,
        ops: Ops<Self::State, 5>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<Flex>(&ops.node);
        let (operands, running) = &ops.state;
        let nodes: [Option<NodeId>; 5] = ops.parents.map(|node| node.map(|node| node.id));
        let gradients = operands.backward(running, &dy, nodes.map(|node| node.is_some()));
        for (node, gradient) in nodes.into_iter().zip(gradients) {
            if let (Some(node), Some(gradient)) = (node, gradient) {
                grads.register::<Flex>(node, gradient);
            }
        }
    }
}
