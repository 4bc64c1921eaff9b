//! Layers under an adapter: linear ones over any base, embeddings, convolutions.

use burn::module::Param;
use burn::nn::conv::{Conv1d, Conv1dConfig};
use burn::nn::{Embedding, Linear};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_peft::adapter::{Lora, LoraConfig};
use burn_peft::layer::{Adapted, Nf4Linear};
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig, TiedHead};
use burn_peft::nf4::Nf4Config;
use proptest::prelude::*;

use super::{View, bound, compare, dtypes, grad, side, then, values, view};

#[derive(burn::module::Module, Debug)]
struct Model {
    linear: Linear,
    embed: Embedding,
    conv: Conv1d,
}

const SIDES: [usize; 2] = [64, 12];
const VOCABULARY: usize = 20;

fn constant<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    tensor.detach().set_require_grad(false)
}

fn plain<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
    constant(View::plain(D).operand(shape, DType::F32, seed).view)
}

/// A model with LoRA on all three layers, packed or dense.
fn model(packed: bool, dora: bool) -> PeftModel<Model> {
    let device = Device::default().autodiff();
    let [d_in, d_out] = SIDES;
    let model = Model {
        linear: Linear {
            weight: Param::from_tensor(plain([d_in, d_out], 1)),
            bias: Some(Param::from_tensor(plain([d_out], 2))),
        },
        embed: Embedding {
            weight: Param::from_tensor(plain([VOCABULARY, d_out], 3)),
        },
        conv: Conv1dConfig::new(6, 10, 3).init(&device),
    };
    let mut model = PeftModel::new(model);
    if packed {
        let config = Nf4Config::new().with_double_quant(true);
        model
            .quantize_nf4(&TargetConfig::list(["linear"]), &config)
            .unwrap();
    }
    let lora = LoraConfig::new(4).with_dora(dora);
    let config = PeftConfig::new(lora, TargetConfig::list(["linear", "embed", "conv"]));
    model.add_adapter("default", &config).unwrap();
    model
}

/// The gradients of all factors are there and zero.
fn all_zero(model: &PeftModel<Model>, gradients: &burn::tensor::Gradients) {
    use burn::module::{Module, ModuleVisitor};
    struct Check<'a>(&'a burn::tensor::Gradients, usize);
    impl ModuleVisitor for Check<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val();
            if let Some(gradient) = value.grad(self.0) {
                self.1 += 1;
                assert_eq!(gradient.dims(), value.dims());
                assert!(values(gradient).iter().all(|value| *value == 0.0));
            }
        }
    }
    let mut check = Check(gradients, 0);
    model.visit(&mut check);
    assert!(check.1 >= 2, "{} gradients", check.1);
}

/// The shapes of the reports: no row, no sequence, no batch.
#[test]
fn a_layer_of_no_rows_gives_nothing_and_gradients_of_zero() {
    let device = Device::default().autodiff();
    let [d_in, d_out] = SIDES;
    for (packed, dora) in [(false, false), (true, false), (false, true), (true, true)] {
        let model = model(packed, dora);
        let layer = model.module();
        for dims in [[2, 0, d_in], [0, 3, d_in], [0, 0, d_in]] {
            let x = Tensor::<3>::zeros(dims, &device).require_grad();
            let y = layer.linear.forward_peft(x.clone());
            assert_eq!(y.dims(), [dims[0], dims[1], d_out]);
            let gradients = y.sum().backward();
            assert_eq!(x.grad(&gradients).unwrap().dims(), dims);
            all_zero(&model, &gradients);
        }
        let x = Tensor::<2>::zeros([0, d_in], &device);
        assert_eq!(layer.linear.forward_peft(x).dims(), [0, d_out]);
        for dims in [[2, 0], [0, 3], [0, 0]] {
            let tokens = Tensor::<2, Int>::zeros(dims, &device);
            let y = layer.embed.forward_peft(tokens);
            assert_eq!(y.dims(), [dims[0], dims[1], d_out]);
            all_zero(&model, &y.sum().backward());
        }
        let x = Tensor::<3>::zeros([2, 0, d_out], &device);
        if !dora {
            assert_eq!(layer.embed.attend_peft(x).dims(), [2, 0, VOCABULARY]);
        }
    }
}

/// Nothing attached: Burn's own layers crash on some of these.
#[test]
fn a_bare_layer_of_no_rows_gives_nothing() {
    let device = Device::default().autodiff();
    let [d_in, d_out] = SIDES;
    let linear = Linear {
        weight: Param::from_tensor(plain([d_in, d_out], 1)),
        bias: Some(Param::from_tensor(plain([d_out], 2))),
    };
    for dims in [[2, 0, d_in], [0, 3, d_in]] {
        let x = Tensor::<3>::zeros(dims, &device);
        let y = linear.forward_peft(x);
        assert_eq!(y.dims(), [dims[0], dims[1], d_out]);
    }
    let mut model = model(true, false);
    model.disable_adapters();
    let x = Tensor::<3>::zeros([0, 3, d_in], &device);
    assert_eq!(model.module().linear.forward_peft(x).dims(), [0, 3, d_out]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn linear_layers(
        (batch, seq, d_in, d_out, rank) in (side(3), side(20), 1_usize..70, 1_usize..40, 1_usize..20),
        views in (view(3), view(2), view(2), view(2), view(1)),
        (packed, dora) in (any::<bool>(), prop::bool::weighted(0.3)),
        (dtype, factors, then) in (dtypes(), dtypes(), then()),
    ) {
        let x = views.0.operand([batch, seq, d_in], dtype, 1);
        let weight = views.1.operand([d_in, d_out], dtype, 2);
        let a = views.2.operand([d_in, rank], factors, 3);
        let b = views.3.operand([rank, d_out], factors, 4);
        let bias = views.4.operand([d_out], dtype, 5);
        let config = LoraConfig::new(rank).with_dtype(factors.into());
        let delta = |a: &Tensor<2>, b: &Tensor<2>| -> Lora {
            let lora = config.with_factors(a.clone(), b.clone()).unwrap();
            match dora {
                false => lora,
                true => {
                    let magnitude = plain([d_out], 6) + 2.0;
                    lora.with_magnitude(magnitude.cast(a.dtype())).unwrap()
                }
            }
        };
        let base = |weight: Tensor<2>, bias: &Tensor<1>| Linear {
            weight: Param::from_tensor(constant(weight)),
            bias: Some(Param::from_tensor(constant(bias.clone()))),
        };
        let (delta, scale) = (delta(&a.view, &b.view), delta(&a.view, &b.view).scale());
        let own = base(weight.view.clone(), &bias.view);
        let (found, dense) = match packed {
            false => {
                let layer = Adapted { base: own, delta };
                (layer.forward(x.view.clone()), constant(weight.wide))
            }
            true => {
                let base = Nf4Linear::from_linear(own, &Nf4Config::new()).unwrap();
                let dense = base.weight.dequantize(dtype.into()).transpose();
                let layer = Adapted { base, delta };
                let found = layer.forward(x.view.clone());
                let dense = dense.cast(DType::F64).into_data();
                let device = Device::default().autodiff();
                (found, Tensor::from_data(dense, (&device, DType::F64)))
            }
        };
        let change = a.wide.clone().matmul(b.wide.clone()) * scale;
        let squares = |of: &Tensor<2>| values(constant(of.clone()).square().sum_dim(0));
        let parts: Vec<f64> = squares(&dense).iter().zip(squares(&change)).map(|(w, c)| w + c).collect();
        let sum = dense + change;
        let sum = match dora {
            false => sum,
            true => {
                let norms = constant(sum.clone()).square().sum_dim(0).sqrt().clamp_min(1e-30);
                let magnitude = (plain([d_out], 6) + 2.0).cast(factors).cast(DType::F64);
                sum * (magnitude.unsqueeze::<2>() / norms)
            }
        };
        // DoRA divides by the norm of a column. Where the change cancels most of the column, that multiplies the roundings.
        let cancelled = dora && squares(&sum).iter().zip(parts).any(|(sum, parts)| *sum < 0.5 || *sum < parts / 4.0);
        prop_assume!(!cancelled && (!dora || d_in > 4));
        // Sums over rows, which Burn computes of nothing too.
        let expected = match batch * seq {
            0 => {
                let nothing = Tensor::zeros([1, 1, d_out], (&x.wide.device(), DType::F64));
                x.wide.clone().sum_dim(2) + nothing
            }
            _ => x.wide.clone().matmul(sum.unsqueeze()) + constant(bias.wide).unsqueeze(),
        };
        let bound = 4.0 * bound(dtype).max(bound(factors));
        let asked = |x| vec![("x", grad(x))];
        compare("layer", (found, asked(&x.view)), (expected, asked(&x.wide)), then, bound);
    }

    /// An embedding whose tables and factors are views, and the head that is tied to it.
    #[test]
    fn embeddings(
        (batch, length, d, rank) in (side(3), side(6), 1_usize..20, 1_usize..6),
        views in (view(2), view(2), view(2), view(3)),
        then in then(),
    ) {
        let device = Device::default().autodiff();
        let weight = views.0.operand([VOCABULARY, d], DType::F32, 1);
        let a = views.1.operand([VOCABULARY, rank], DType::F32, 2);
        let b = views.2.operand([rank, d], DType::F32, 3);
        #[derive(burn::module::Module, Debug)]
        struct Table {
            embed: Embedding,
        }
        let embed = Embedding { weight: Param::from_tensor(constant(weight.view.clone())) };
        let mut model = PeftModel::new(Table { embed });
        // The head is tied to the changed embedding, as PEFT ties it if asked to.
        let config = PeftConfig::new(LoraConfig::new(rank), TargetConfig::list(["embed"]))
            .with_ensure_weight_tying(true);
        model.add_adapter("default", &config).unwrap();
        let lora = LoraConfig::new(rank).with_factors(a.view.clone(), b.view.clone()).unwrap();
        let scale = lora.scale();
        model.swap_adapter("default", &config, vec![("embed".to_owned(), lora)]).unwrap();
        let layer = &model.module().embed;

        let n = batch * length;
        let tokens: Vec<i64> = (0..n).map(|i| (i * 7 % VOCABULARY) as i64).collect();
        let data = TensorData::new(tokens.clone(), [batch, length]);
        let found = layer.forward_peft(Tensor::<2, Int>::from_data(data, &device));
        prop_assert_eq!(found.dims(), [batch, length, d]);
        let table = constant(weight.wide.clone()) + a.wide.clone().matmul(b.wide.clone()) * scale;
        let rows = values(table.clone());
        let expected: Vec<f64> = tokens
            .iter()
            .flat_map(|&token| rows[token as usize * d..][..d].to_vec())
            .collect();
        super::near("embedding", &values(found), &expected, 1e-5);

        if n > 0 {
            let x = views.3.operand([batch, length, d], DType::F32, 4);
            let found = layer.attend_peft(x.view.clone());
            let expected = x.wide.clone().matmul(table.transpose().unsqueeze());
            let asked = |x| vec![("x", grad(x))];
            compare("attend", (found, asked(&x.view)), (expected, asked(&x.wide)), then, 1e-4);
        }
    }
}
