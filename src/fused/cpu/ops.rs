//! The fused operations on Burn's CPU backend, and what they are under autodiff.

use burn::backend::{
    Autodiff, Backend, Flex,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    ops::FloatTensorOps,
    tensor::FloatTensor,
};

use super::cross_entropy::Partition;
use super::flex;
use crate::cpu::flex::{Float, contiguous, over_rows, to_rank};
use crate::fused::Visible;

/// The operations, on f32 and bf16.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait FusedOps: Backend {
    /// See [`frozen_linear`](crate::fused::frozen_linear). The weight is a constant.
    fn fused_frozen_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `x · W + scale · (x · a) · b`; the weight is a constant, the factors are f32.
    fn fused_lora_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self>;

    /// See [`swiglu`](crate::fused::swiglu).
    fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;

    /// See [`rms_norm`](crate::fused::rms_norm).
    fn fused_rms_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self>;

    /// See [`rotate`](crate::fused::rotate).
    fn fused_rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// See [`attention`](crate::fused::attention).
    fn fused_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        visible: Visible,
        scale: f64,
    ) -> FloatTensor<Self>;

    /// The sum of `−log softmax(logits[row])[label]` over `labels`, which are `(row, label)` in ascending order of rows:
    /// `[rows, vocab] -> [1]`, f32.
    fn fused_cross_entropy(
        logits: FloatTensor<Self>,
        labels: Vec<(usize, usize)>,
    ) -> FloatTensor<Self>;
}

impl FusedOps for Flex {
    fn fused_frozen_linear(x: Float, weight: Float) -> Float {
        flex::frozen_linear(&x, &weight)
    }

    fn fused_lora_linear(x: Float, weight: Float, a: Float, b: Float, scale: f64) -> Float {
        flex::lora_linear(&x, &weight, [&a, &b], scale, false).0
    }

    fn fused_swiglu(gate: Float, up: Float) -> Float {
        flex::swiglu(&gate, &up)
    }

    fn fused_rms_norm(x: Float, gamma: Float, epsilon: f64) -> Float {
        flex::rms_norm(&x, &gamma, epsilon)
    }

    fn fused_rotate(x: Float, cos: Float, sin: Float) -> Float {
        flex::rotate(x, &cos, &sin, 1.0)
    }

    fn fused_attention(q: Float, k: Float, v: Float, visible: Visible, scale: f64) -> Float {
        flex::attention([q, k, v], &visible, scale)
    }

    fn fused_cross_entropy(logits: Float, labels: Vec<(usize, usize)>) -> Float {
        flex::cross_entropy(&logits, &labels).0
    }
}

impl<C: CheckpointStrategy> FusedOps for Autodiff<Flex, C> {
    fn fused_frozen_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [x.node()];
        let weight = weight.into_primitive();
        let y = flex::frozen_linear(&x.into_primitive(), &weight);
        match FrozenLinear.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(weight, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn fused_lora_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), a.node(), b.node()];
        let a_tracked = a.is_tracked();
        let [x, weight, a, b] = [x, weight, a, b].map(|tensor| tensor.into_primitive());
        let (y, u) = flex::lora_linear(&x, &weight, [&a, &b], scale, true);
        match LoraLinear.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let state = LoraState {
                    x: a_tracked.then_some(x),
                    u,
                    weight,
                    a,
                    b,
                    scale,
                };
                prep.finish(state, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [gate.node(), up.node()];
        let (gate, up) = (gate.into_primitive(), up.into_primitive());
        let y = flex::swiglu(&gate, &up);
        match Swiglu.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish([gate, up], y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn fused_rms_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), gamma.node()];
        let (x, gamma) = (x.into_primitive(), gamma.into_primitive());
        let y = flex::rms_norm(&x, &gamma, epsilon);
        match RmsNorm.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x, gamma, epsilon), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn fused_rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let nodes = [x.node()];
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        let y = flex::rotate(x.into_primitive(), &cos, &sin, 1.0);
        match Rotate.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish([cos, sin], y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn fused_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        visible: Visible,
        scale: f64,
    ) -> FloatTensor<Self> {
        let nodes = [q.node(), k.node(), v.node()];
        let operands = [q, k, v].map(|tensor| tensor.into_primitive());
        let y = flex::attention(operands.clone(), &visible, scale);
        match Attention.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((operands, visible, scale), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn fused_cross_entropy(
        logits: FloatTensor<Self>,
        labels: Vec<(usize, usize)>,
    ) -> FloatTensor<Self> {
        let nodes = [logits.node()];
        let logits = logits.into_primitive();
        let (loss, partitions) = flex::cross_entropy(&logits, &labels);
        match CrossEntropy.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((logits, labels, partitions), loss),
            OpsKind::UnTracked(prep) => prep.finish(loss),
        }
    }
}

#[derive(Debug)]
struct FrozenLinear;

impl Backward<Flex, 1> for FrozenLinear {
    /// The weight, shared.
    type State = Float;

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<Flex>(&ops.node);
        let dx = flex::frozen_linear_backward(&dy, &ops.state, None);
        register(grads, &ops, [dx]);
    }
}

/// `y = x·W + s·(x·A)·B`: with `u = s·x·A` and `v = s·dy·Bᵀ`, `dB = uᵀ·dy`, `dA = xᵀ·v`, `dx = dy·Wᵀ + v·Aᵀ`.
#[derive(Debug)]
struct LoraLinear;

#[derive(Clone, Debug)]
struct LoraState {
    /// For the gradient of `A`.
    x: Option<Float>,
    u: Float,
    weight: Float,
    a: Float,
    b: Float,
    scale: f64,
}

impl Backward<Flex, 3> for LoraLinear {
    type State = LoraState;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<Flex>(&ops.node);
        let state = ops.state;
        let [x, a, b] = ops.parents;
        if let Some(b) = b {
            grads.register::<Flex>(b.id, over_rows(&state.u, &dy, false));
        }
        let v = to_rank(&dy, &Flex::float_transpose(state.b), state.scale);
        if let (Some(a), Some(x)) = (a, state.x) {
            grads.register::<Flex>(a.id, over_rows(&v, &x, true));
        }
        if let Some(x) = x {
            let a = contiguous(&Flex::float_transpose(state.a));
            let dx = flex::frozen_linear_backward(&dy, &state.weight, Some((v, a)));
            grads.register::<Flex>(x.id, dx);
        }
    }
}

#[derive(Debug)]
struct Swiglu;

impl Backward<Flex, 2> for Swiglu {
    type State = [Float; 2];

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<Flex>(&ops.node);
        let [gate, up] = &ops.state;
        register(grads, &ops, flex::swiglu_backward(gate, up, &dy));
    }
}

#[derive(Debug)]
struct RmsNorm;

impl Backward<Flex, 2> for RmsNorm {
    type State = (Float, Float, f64);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<Flex>(&ops.node);
        let (x, gamma, epsilon) = ops.state;
        let [x_node, gamma_node] = ops.parents;
        if let Some(node) = gamma_node {
            let gradient = flex::rms_norm_backward_gamma(&x, &gamma, epsilon, &dy);
            grads.register::<Flex>(node.id, gradient);
        }
        if let Some(node) = x_node {
            let gradient = flex::rms_norm_backward(&x, &gamma, epsilon, &dy);
            grads.register::<Flex>(node.id, gradient);
        }
    }
}

#[derive(Debug)]
struct Rotate;

impl Backward<Flex, 1> for Rotate {
    type State = [Float; 2];

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<Flex>(&ops.node);
        let [cos, sin] = &ops.state;
        register(grads, &ops, [flex::rotate(dy, cos, sin, -1.0)]);
    }
}

#[derive(Debug)]
struct Attention;

impl Backward<Flex, 3> for Attention {
    type State = ([Float; 3], Visible, f64);

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<Flex>(&ops.node);
        let (operands, visible, scale) = ops.state.clone();
        let gradients = flex::attention_backward(operands, &visible, scale, dy);
        register(grads, &ops, gradients);
    }
}

#[derive(Debug)]
struct CrossEntropy;

impl Backward<Flex, 1> for CrossEntropy {
    type State = (Float, Vec<(usize, usize)>, Vec<Partition>);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<Flex>(&ops.node);
        let (logits, labels, partitions) = &ops.state;
        let gradient = flex::cross_entropy_backward(logits, labels, partitions, &dy);
        register(grads, &ops, [gradient]);
    }
}

/// Hands each parent that is tracked its gradient.
fn register<S, const N: usize>(grads: &mut Gradients, ops: &Ops<S, N>, gradients: [Float; N]) {
    for (parent, gradient) in ops.parents.iter().zip(gradients) {
        if let Some(parent) = parent {
            grads.register::<Flex>(parent.id, gradient);
        }
    }
}
