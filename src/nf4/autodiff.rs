//! The products with a packed weight under autodiff.
//!
//! The two products are each other's backward. What is kept between forward and backward is the packed weight alone
//! (shared, not copied): neither `x` nor a dense weight, and no gradient of the weight is ever computed. This is the
//! memory contract of QLoRA (arXiv:2305.14314, section 3) and of bitsandbytes' `MatMul4Bit`.
//!
//! `y = x·(Wᵀ + s·A·B)` is one operation, so that the outputs of the parts are never in memory by themselves. With
//! `u = s·x·A` and `v = s·dy·Bᵀ`: `dB = uᵀ·dy`, `dA = xᵀ·v`, `dx = dy·W + v·Aᵀ`. Kept are `x`, for `dA`, and `u`.

use burn::backend::{
    Autodiff, AutodiffBackend, Backend,
    autodiff::{
        NodeId,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind, unary},
    },
    tensor::FloatTensor,
};
use burn::tensor::FloatDType;

use super::ops::{Nf4Ops, Nf4ScaleTensors, Nf4Tensors};

impl<B: Nf4Ops, C: CheckpointStrategy> Nf4Ops for Autodiff<B, C> {
    fn nf4_dequantize(weight: Nf4Tensors<Self>, dtype: FloatDType) -> FloatTensor<Self> {
        Autodiff::<B, C>::from_inner(B::nf4_dequantize(weight.into_inner(), dtype))
    }

    fn nf4_row_norms_squared(weight: Nf4Tensors<Self>) -> FloatTensor<Self> {
        Autodiff::<B, C>::from_inner(B::nf4_row_norms_squared(weight.into_inner()))
    }

    fn nf4_matmul(x: FloatTensor<Self>, weight: Nf4Tensors<Self>) -> FloatTensor<Self> {
        Product::<false>::tracked::<B, C>(x, weight)
    }

    fn nf4_matmul_transposed(y: FloatTensor<Self>, weight: Nf4Tensors<Self>) -> FloatTensor<Self> {
        Product::<true>::tracked::<B, C>(y, weight)
    }

    fn nf4_matmul_low_rank(
        x: FloatTensor<Self>,
        weight: Nf4Tensors<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self> {
        low_rank::<B, C>(x, weight, a, b, scale)
    }
}

/// The product `x · Wᵀ`, or `y · W` if transposed; each is the other's backward.
#[derive(Debug)]
struct Product<const TRANSPOSED: bool>;

impl<const TRANSPOSED: bool> Product<TRANSPOSED> {
    fn forward<B: Nf4Ops>(x: FloatTensor<B>, weight: Nf4Tensors<B>) -> FloatTensor<B> {
        match TRANSPOSED {
            false => B::nf4_matmul(x, weight),
            true => B::nf4_matmul_transposed(x, weight),
        }
    }

    fn tracked<B: Nf4Ops, C: CheckpointStrategy>(
        x: FloatTensor<Autodiff<B, C>>,
        weight: Nf4Tensors<Autodiff<B, C>>,
    ) -> FloatTensor<Autodiff<B, C>> {
        let weight = weight.into_inner();
        match Self.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let output = Self::forward::<B>(x.into_primitive(), weight.clone());
                prep.finish(weight, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(Self::forward::<B>(x.into_primitive(), weight)),
        }
    }
}

impl<B: Nf4Ops, const TRANSPOSED: bool> Backward<B, 1> for Product<TRANSPOSED> {
    /// The packed weight, shared: neither `x` nor a dense weight.
    type State = Nf4Tensors<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        unary::<B, _>(ops.parents, ops.node, grads, |grad| match TRANSPOSED {
            false => Product::<true>::forward::<B>(grad, ops.state),
            true => Product::<false>::forward::<B>(grad, ops.state),
        });
    }
}

fn low_rank<B: Nf4Ops, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    weight: Nf4Tensors<Autodiff<B, C>>,
    a: FloatTensor<Autodiff<B, C>>,
    b: FloatTensor<Autodiff<B, C>>,
    scale: f64,
) -> FloatTensor<Autodiff<B, C>> {
    let weight = weight.into_inner();
    let nodes = [x.node(), a.node(), b.node()];
    match LowRank.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let x_state = a.is_tracked().then(|| prep.checkpoint(&x));
            let b_tracked = b.is_tracked();
            let (x, a, b) = (x.into_primitive(), a.into_primitive(), b.into_primitive());
            let u = B::low_rank_input(x.clone(), a.clone(), scale);
            let y = B::nf4_matmul_add(x, weight.clone(), u.clone(), b.clone());
            let state = LowRankState {
                x: x_state,
                u: b_tracked.then_some(u),
                weight,
                a,
                b,
                scale,
            };
            prep.finish(state, y)
        }
        OpsKind::UnTracked(prep) => prep.finish(B::nf4_matmul_low_rank(
            x.into_primitive(),
            weight,
            a.into_primitive(),
            b.into_primitive(),
            scale,
        )),
    }
}

/// `x · (Wᵀ + s·A·B)`.
#[derive(Debug)]
struct LowRank;

#[derive(Clone, Debug)]
struct LowRankState<B: Backend> {
    /// For the gradient of `A`.
    x: Option<NodeId>,
    /// `s·x·A`, for the gradient of `B`.
    u: Option<FloatTensor<B>>,
    weight: Nf4Tensors<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    scale: f64,
}

impl<B: Nf4Ops> Backward<B, 3> for LowRank {
    type State = LowRankState<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let state = ops.state;
        let [x, a, b] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        if let (Some(b), Some(u)) = (b, state.u) {
            grads.register::<B>(b.id, B::low_rank_gradient_b(u, dy.clone()));
        }
        let v = B::low_rank_input(dy.clone(), B::float_transpose(state.b), state.scale);
        if let (Some(a), Some(x)) = (a, state.x) {
            let x = checkpointer.retrieve_node_output::<FloatTensor<B>>(x);
            grads.register::<B>(a.id, B::low_rank_gradient_a(x, v.clone()));
        }
        if let Some(x) = x {
            let a = B::float_transpose(state.a);
            let dx = B::nf4_matmul_transposed_add(dy, state.weight, v, a);
            grads.register::<B>(x.id, dx);
        }
    }
}

impl<B: Backend, C: CheckpointStrategy> Nf4Tensors<Autodiff<B, C>> {
    /// The same tensors seen by the inner backend: autodiff does not wrap integers.
    pub(crate) fn into_inner(self) -> Nf4Tensors<B> {
        Nf4Tensors {
            codes: self.codes,
            scales: match self.scales {
                Nf4ScaleTensors::Plain(bits) => Nf4ScaleTensors::Plain(bits),
                Nf4ScaleTensors::Double(codes, nested) => Nf4ScaleTensors::Double(codes, nested),
            },
            shape: self.shape,
            block_size: self.block_size,
        }
    }
}
