//! The operations of [`burn_peft::fused`].

use burn::tensor::{DType, Tensor};
use burn_peft::fused::{Visible, attention, frozen_linear, rms_norm, rotate, swiglu};
use proptest::prelude::*;

use super::{bound, compare, dtypes, grad, side, then, view};

/// Without a gradient.
fn constant<const D: usize>(tensor: &Tensor<D>) -> Tensor<D> {
    tensor.clone().detach().set_require_grad(false)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn frozen_weights(
        (batch, seq, d_in, d_out) in (side(3), side(24), side(40), side(40)),
        views in (view(3), view(2)),
        trains in prop::bool::weighted(0.2),
        (dtype, then) in (dtypes(), then()),
    ) {
        let x = views.0.operand([batch, seq, d_in], dtype, 1);
        let weight = views.1.operand([d_in, d_out], dtype, 2);
        let of = |x: &Tensor<3>, weight: &Tensor<2>| match trains {
            true => frozen_linear(x.clone(), weight.clone()),
            false => frozen_linear(x.clone(), constant(weight)),
        };
        let (found, expected) = (of(&x.view, &weight.view), of(&x.wide, &weight.wide));
        let mut asked = [vec![("x", grad(&x.view))], vec![("x", grad(&x.wide))]];
        if trains {
            asked[0].push(("weight", grad(&weight.view)));
            asked[1].push(("weight", grad(&weight.wide)));
        }
        let [of_found, of_expected] = asked;
        compare("frozen_linear", (found, of_found), (expected, of_expected), then, bound(dtype));
    }

    #[test]
    fn gates(
        shape in [side(3), side(5), side(40)],
        views in (view(3), view(3)),
        (dtype, then) in (dtypes(), then()),
    ) {
        let gate = views.0.operand(shape, dtype, 1);
        let up = views.1.operand(shape, dtype, 2);
        let found = swiglu(gate.view.clone(), up.view.clone());
        let expected = swiglu(gate.wide.clone(), up.wide.clone());
        compare(
            "swiglu",
            (found, vec![("gate", grad(&gate.view)), ("up", grad(&up.view))]),
            (expected, vec![("gate", grad(&gate.wide)), ("up", grad(&up.wide))]),
            then,
            bound(dtype),
        );
    }

    #[test]
    fn norms(
        shape in [side(3), side(40), side(40)],
        views in (view(3), view(1)),
        (dtype, then) in (dtypes(), then()),
    ) {
        let x = views.0.operand(shape, dtype, 1);
        let gamma = views.1.operand([shape[2]], dtype, 2);
        let found = rms_norm(x.view.clone(), gamma.view.clone(), 1e-2);
        let expected = rms_norm(x.wide.clone(), gamma.wide.clone(), 1e-2);
        compare(
            "rms_norm",
            (found, vec![("x", grad(&x.view)), ("gamma", grad(&gamma.view))]),
            (expected, vec![("x", grad(&x.wide)), ("gamma", grad(&gamma.wide))]),
            then,
            bound(dtype),
        );
    }

    #[test]
    fn rotations(
        (batch, heads, seq, half) in (side(3), side(3), side(9), side(9)),
        own in any::<bool>(),
        views in (view(4), view(4), view(4)),
        (dtype, then) in (dtypes(), then()),
    ) {
        let x = views.0.operand([batch, heads, seq, 2 * half], dtype, 1);
        let angles = [if own { batch } else { 1 }, 1, seq, half];
        // Any numbers will do for a sine.
        let cos = views.1.operand(angles, DType::F32, 2);
        let sin = views.2.operand(angles, DType::F32, 3);
        let found = || rotate(x.view.clone(), cos.view.clone(), sin.view.clone());
        let expected = || rotate(x.wide.clone(), cos.wide.clone(), sin.wide.clone());
        for tensor in [found(), expected()] {
            let gradients = tensor.sum().backward();
            for angles in [&cos.view, &sin.view, &cos.wide, &sin.wide] {
                prop_assert!(angles.grad(&gradients).is_none());
            }
        }
        compare(
            "rotate",
            (found(), vec![("x", grad(&x.view))]),
            (expected(), vec![("x", grad(&x.wide))]),
            then,
            bound(dtype),
        );
    }

    #[test]
    fn attentions(
        (batch, kv_heads, group) in (side(2), 1_usize..3, 1_usize..3),
        (queries, keys, d) in (side(60), side(60), side(20)),
        views in (view(4), view(4), view(4)),
        causal in any::<bool>(),
        (dtype, then) in (dtypes(), then()),
    ) {
        let visible = match causal {
            true => Visible::causal(queries, keys.saturating_sub(queries)),
            false => {
                let range = |query: usize| query * 7 % (keys + 1)..keys - query * 5 % (keys + 1);
                let ranges: Vec<_> = (0..queries).map(range).collect();
                Visible::from_ranges(&ranges, queries, keys)
            }
        };
        let keys = visible.keys();
        let q = views.0.operand([batch, kv_heads * group, queries, d], dtype, 1);
        let k = views.1.operand([batch, kv_heads, keys, d], dtype, 2);
        let v = views.2.operand([batch, kv_heads, keys, d], dtype, 3);
        let of = |q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>| {
            attention(q.clone(), k.clone(), v.clone(), &visible, 0.4)
        };
        let (found, expected) = (of(&q.view, &k.view, &v.view), of(&q.wide, &k.wide, &v.wide));
        compare(
            "attention",
            (found, vec![("q", grad(&q.view)), ("k", grad(&k.view)), ("v", grad(&v.view))]),
            (expected, vec![("q", grad(&q.wide)), ("k", grad(&k.wide)), ("v", grad(&v.wide))]),
            then,
            bound(dtype),
        );
    }
}
