//! The log-probabilities of a head as an operation of a Burn backend, and what it is under autodiff.

// `backend_extension` checks the features of this crate and of Burn in what it generates.
#![allow(unexpected_cfgs)]
// Burn deprecates its ndarray backend; it is served for as long as Burn has it.
#![cfg_attr(feature = "ndarray", allow(deprecated))]

use burn::backend::{
    Autodiff, AutodiffBackend, Backend, Dispatch, DispatchTensorKind, TensorMetadata,
    autodiff::{
        NodeId,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    tensor::FloatTensor,
};
use burn::tensor::{DType, FloatDType, Tensor};

use super::{Head, HeadChunks, HeadWeight, portable};
use crate::nf4::{Nf4Ops, Nf4Tensors};

/// What is no tensor.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// One token for each row.
    pub(crate) labels: Vec<usize>,
    pub(crate) chunks: HeadChunks,
    /// `T`, which divides the logits.
    pub(crate) temperature: f64,
    /// Whether the statistics of [`rows`](super::rows) are computed too.
    pub(crate) statistics: bool,
    /// Whether the kernels of the CPU backend serve the operands.
    pub(super) kernels: bool,
}

/// The weight of a head on a backend.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // There is one of it at a time.
pub(super) enum Weight<B: Backend> {
    /// `[features, vocabulary]`.
    Dense(FloatTensor<B>),
    /// `[vocabulary, features]`.
    Nf4(Nf4Tensors<B>),
}

/// What the log-probabilities are computed of, on a backend.
#[derive(Clone, Debug)]
pub(super) struct Operands<B: Backend> {
    pub x: FloatTensor<B>,
    pub weight: Weight<B>,
    /// `u [rows, r]` and `B [r, vocabulary]`, f32 (f64 for an f64 `x`).
    pub low_rank: Option<[FloatTensor<B>; 2]>,
    /// `[vocabulary]`, of the same dtype.
    pub bias: Option<FloatTensor<B>>,
    pub asked: Asked,
}

/// What is asked for: the gradients of `x`, the weight, `u`, `B` and the bias.
pub(super) type Wanted = [bool; 5];

/// The two passes on a backend without autodiff: by default of the backend's own operations.
pub(super) trait HeadPasses: Nf4Ops {
    /// The [`rows`](super::rows), `[k, rows]`.
    fn forward(operands: &Operands<Self>) -> FloatTensor<Self> {
        portable::forward(operands)
    }

    /// The gradients for `dy [k, rows]`, with `values` the result of forward.
    fn backward(
        operands: &Operands<Self>,
        values: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        wanted: Wanted,
    ) -> [Option<FloatTensor<Self>>; 5] {
        portable::backward(operands, values, dy, wanted)
    }
}

#[cfg(all(feature = "flex", target_endian = "little"))]
impl HeadPasses for burn::backend::Flex {
    fn forward(operands: &Operands<Self>) -> FloatTensor<Self> {
        match operands.asked.kernels {
            true => operands.forward(),
            false => portable::forward(operands),
        }
    }

    fn backward(
        operands: &Operands<Self>,
        values: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        wanted: Wanted,
    ) -> [Option<FloatTensor<Self>>; 5] {
        match operands.asked.kernels {
            true => operands.backward(&values, &dy, wanted),
            false => portable::backward(operands, values, dy, wanted),
        }
    }
}

#[cfg(all(feature = "flex", target_endian = "big"))]
impl HeadPasses for burn::backend::Flex {}

#[cfg(feature = "ndarray")]
impl HeadPasses for burn::backend::NdArray {}

#[cfg(any(feature = "cuda", feature = "rocm", feature = "wgpu"))]
impl HeadPasses for burn::backend::Cube {}

/// The operation; `u`, `b` and the bias are empty where there is none.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "cuda", feature = "rocm", feature = "wgpu")),
    Autodiff
)]
pub(crate) trait HeadOps: Backend {
    /// See [`log_probs`](super::log_probs).
    fn head_dense(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        asked: Asked,
    ) -> FloatTensor<Self>;

    /// The same with a packed weight.
    fn head_nf4(
        x: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        #[extension_type] weight: Nf4Tensors<Self>,
        asked: Asked,
    ) -> FloatTensor<Self>;
}

/// The operation on a backend without autodiff.
macro_rules! passes {
    ($backend:ty) => {
        impl HeadOps for $backend {
            fn head_dense(
                x: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                u: FloatTensor<Self>,
                b: FloatTensor<Self>,
                bias: FloatTensor<Self>,
                asked: Asked,
            ) -> FloatTensor<Self> {
                let operands = Operands::new(x, Weight::Dense(weight), [u, b, bias], asked);
                <Self as HeadPasses>::forward(&operands)
            }

            fn head_nf4(
                x: FloatTensor<Self>,
                u: FloatTensor<Self>,
                b: FloatTensor<Self>,
                bias: FloatTensor<Self>,
                weight: Nf4Tensors<Self>,
                asked: Asked,
            ) -> FloatTensor<Self> {
                let operands = Operands::new(x, Weight::Nf4(weight), [u, b, bias], asked);
                <Self as HeadPasses>::forward(&operands)
            }
        }
    };
}

#[cfg(feature = "flex")]
passes!(burn::backend::Flex);
#[cfg(feature = "ndarray")]
passes!(burn::backend::NdArray);
#[cfg(any(feature = "cuda", feature = "rocm", feature = "wgpu"))]
passes!(burn::backend::Cube);

/// Whether this crate was built with an implementation of [`HeadOps`] for the backend of `x`. See `nf4::ops`.
pub(super) fn has_implementation(x: &Tensor<2>) -> bool {
    fn of(kind: &DispatchTensorKind) -> bool {
        match kind {
            #[cfg(feature = "flex")]
            DispatchTensorKind::Flex(_) => true,
            #[cfg(feature = "ndarray")]
            DispatchTensorKind::NdArray(_) => true,
            #[cfg(any(feature = "cuda", feature = "rocm", feature = "wgpu"))]
            DispatchTensorKind::Cube(_) => true,
            DispatchTensorKind::Autodiff(inner) => of(inner),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }
    of(&x.clone().into_dispatch().kind)
}

/// Whether the kernels of the CPU backend are for these.
#[cfg(all(feature = "flex", target_endian = "little"))]
pub(super) fn kernels_serve(x: &Tensor<2>, head: &Head) -> bool {
    use crate::fused::cpu::serves;
    let weight = match &head.weight {
        HeadWeight::Dense(weight) => serves(weight),
        HeadWeight::Nf4(_) => true,
    };
    let low_rank = head.low_rank.iter().flatten();
    serves(x) && weight && low_rank.into_iter().all(serves) && head.bias.as_ref().is_none_or(serves)
}

#[cfg(not(all(feature = "flex", target_endian = "little")))]
pub(super) fn kernels_serve(_x: &Tensor<2>, _head: &Head) -> bool {
    false
}

pub(super) fn log_probs(x: Tensor<2>, head: Head, asked: Asked) -> Tensor<2> {
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
            <Dispatch as HeadOps>::head_dense(x, weight, u, b, bias, asked)
        }
        HeadWeight::Nf4(weight) => {
            <Dispatch as HeadOps>::head_nf4(x, u, b, bias, weight.tensors(), asked)
        }
    })
}

impl<B: Backend> Operands<B> {
    fn new(
        x: FloatTensor<B>,
        weight: Weight<B>,
        [u, b, bias]: [FloatTensor<B>; 3],
        asked: Asked,
    ) -> Self {
        let there = |tensor: FloatTensor<B>| (tensor.shape().num_elements() > 0).then_some(tensor);
        Self {
            x,
            weight,
            low_rank: there(u).zip(there(b)).map(|(u, b)| [u, b]),
            bias: there(bias),
            asked,
        }
    }
}

impl<B: HeadPasses, C: CheckpointStrategy> HeadOps for Autodiff<B, C> {
    fn head_dense(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        asked: Asked,
    ) -> FloatTensor<Self> {
        tracked::<B, C>([x, weight, u, b, bias], None, asked)
    }

    fn head_nf4(
        x: FloatTensor<Self>,
        u: FloatTensor<Self>,
        b: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        weight: Nf4Tensors<Self>,
        asked: Asked,
    ) -> FloatTensor<Self> {
        // A parent that requires no gradient, in the place of a dense weight.
        let device = x.primitive().device();
        let nothing = B::float_empty([0].into(), &device, FloatDType::F32);
        let parents = [x, Self::from_inner(nothing), u, b, bias];
        tracked::<B, C>(parents, Some(weight.into_inner()), asked)
    }
}

/// The values, whose parents are `x`, the weight (nothing if it is packed), `u`, `b` and the bias.
fn tracked<B: HeadPasses, C: CheckpointStrategy>(
    parents: [FloatTensor<Autodiff<B, C>>; 5],
    packed: Option<Nf4Tensors<B>>,
    asked: Asked,
) -> FloatTensor<Autodiff<B, C>> {
    let nodes = parents.each_ref().map(|tensor| tensor.node());
    let [x, dense, u, b, bias] = parents.map(|tensor| tensor.into_primitive());
    let weight = match packed {
        Some(packed) => Weight::Nf4(packed),
        None => Weight::Dense(dense),
    };
    let operands = Operands::<B>::new(x, weight, [u, b, bias], asked);
    let values = B::forward(&operands);
    match HeadLogProbs.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish((operands, values.clone()), values),
        OpsKind::UnTracked(prep) => prep.finish(values),
    }
}

#[derive(Debug)]
struct HeadLogProbs;

impl<B: HeadPasses> Backward<B, 5> for HeadLogProbs {
    /// The operands, shared, and the values of each row.
    type State = (Operands<B>, FloatTensor<B>);

    fn backward(
        self,
        ops: Ops<Self::State, 5>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<B>(&ops.node);
        let (operands, values) = ops.state;
        let nodes: [Option<NodeId>; 5] = ops.parents.map(|node| node.map(|node| node.id));
        let wanted = nodes.map(|node| node.is_some());
        let gradients = B::backward(&operands, values, dy, wanted);
        for (node, gradient) in nodes.into_iter().zip(gradients) {
            if let (Some(node), Some(gradient)) = (node, gradient) {
                grads.register::<B>(node, gradient);
            }
        }
    }
}
