//! The losses of logits and of a head in chunks.

use burn::module::Param;
use burn::nn::{Embedding, Linear};
use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData};
use burn_peft::adapter::LoraConfig;
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use burn_peft::objective::{HeadChunks, sft_head_loss, sft_loss};
use proptest::prelude::*;

use super::{View, bound, compare, dtypes, grad, near, then, values, view};

/// Targets of no structure, and which count: one at least.
fn labels([batch, seq]: [usize; 2], vocabulary: usize) -> (Tensor<2, Int>, Tensor<2, Bool>) {
    let device = Device::default().autodiff();
    let n = batch * seq;
    let targets: Vec<i64> = (0..n).map(|i| (i * 37 % vocabulary) as i64).collect();
    let mask: Vec<bool> = (0..n).map(|i| i % 3 != 1).collect();
    (
        Tensor::from_data(TensorData::new(targets, [batch, seq]), &device),
        Tensor::from_data(TensorData::new(mask, [batch, seq]), &device),
    )
}

fn linear(weight: &Tensor<2>, bias: Option<&Tensor<1>>) -> Linear {
    Linear {
        weight: Param::from_tensor(weight.clone()),
        bias: bias.map(|bias| Param::from_tensor(bias.clone())),
    }
}

/// The loss of all logits, in f64.
fn plain(logits: Tensor<3>, targets: Tensor<2, Int>, mask: Tensor<2, Bool>) -> Tensor<1> {
    sft_loss(logits, targets, mask).unwrap().mean()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn logits(
        (batch, seq, vocabulary) in (1_usize..3, 1_usize..12, 1_usize..60),
        view in view(3),
        dtype in dtypes(),
    ) {
        let logits = view.operand([batch, seq, vocabulary], dtype, 1);
        let (targets, mask) = labels([batch, seq], vocabulary);
        let found = plain(logits.view.clone(), targets.clone(), mask.clone());
        let expected = plain(logits.wide.clone(), targets, mask);
        let then = super::Then::Sum;
        let asked = |t| vec![("logits", grad(t))];
        compare("loss", (found, asked(&logits.view)), (expected, asked(&logits.wide)), then, bound(dtype));
    }

    #[test]
    fn dense_heads(
        (batch, seq, features, vocabulary) in (1_usize..3, 1_usize..12, 1_usize..30, 1_usize..60),
        views in (view(3), view(2), view(1)),
        (rows, tokens) in (1_usize..20, 1_usize..70),
        (has_bias, tied) in any::<(bool, bool)>(),
        (dtype, held) in (dtypes(), dtypes()),
    ) {
        let x = views.0.operand([batch, seq, features], dtype, 1);
        let shape = if tied { [vocabulary, features] } else { [features, vocabulary] };
        let weight = views.1.operand(shape, held, 2);
        let bias = views.2.operand([vocabulary], DType::F32, 3);
        let (targets, mask) = labels([batch, seq], vocabulary);
        let chunks = HeadChunks::new(rows, tokens).unwrap();
        let has_bias = has_bias && !tied;
        let loss = match tied {
            true => {
                let head = Embedding { weight: Param::from_tensor(weight.view.clone()) };
                sft_head_loss(x.view.clone(), &head, targets.clone(), mask.clone(), &chunks)
            }
            false => {
                let head = linear(&weight.view, has_bias.then_some(&bias.view));
                sft_head_loss(x.view.clone(), &head, targets.clone(), mask.clone(), &chunks)
            }
        };
        let found = loss.unwrap().mean();
        let matrix = match tied {
            true => weight.wide.clone().transpose(),
            false => weight.wide.clone(),
        };
        let logits = x.wide.clone().matmul(matrix.unsqueeze());
        let logits = match has_bias {
            true => logits + bias.wide.clone().unsqueeze(),
            false => logits,
        };
        let expected = plain(logits, targets, mask);
        let then = super::Then::Sum;
        let mut asked = [
            vec![("x", grad(&x.view)), ("weight", grad(&weight.view))],
            vec![("x", grad(&x.wide)), ("weight", grad(&weight.wide))],
        ];
        if has_bias {
            asked[0].push(("bias", grad(&bias.view)));
            asked[1].push(("bias", grad(&bias.wide)));
        }
        let [of_found, of_expected] = asked;
        let bound = bound(dtype).max(bound(held));
        compare("head", (found, of_found), (expected, of_expected), then, bound);
    }

    /// A packed head under an adapter whose factors are views.
    #[test]
    fn packed_heads_with_an_adapter(
        (batch, seq, features, vocabulary, rank) in
            (1_usize..3, 1_usize..12, 1_usize..30, 1_usize..60, 1_usize..6),
        views in (view(3), view(2), view(2)),
        (double, packed, col) in any::<(bool, bool, bool)>(),
        (dtype, then) in (dtypes(), then()),
    ) {
        #[derive(burn::module::Module, Debug)]
        struct Model {
            lm_head: Linear,
        }
        let x = views.0.operand([batch, seq, features], dtype, 1);
        let a = views.1.operand([features, rank], DType::F32, 2);
        let b = views.2.operand([rank, vocabulary], DType::F32, 3);
        let plain_weight = match col {
            false => View::plain(2).operand([features, vocabulary], dtype, 4).view,
            true => View::plain(2).operand([vocabulary, features], dtype, 4).view.transpose(),
        };
        let weight = plain_weight.detach().set_require_grad(false);
        let mut model = PeftModel::new(Model { lm_head: linear(&weight, None) });
        let targets = TargetConfig::list(["lm_head"]);
        if packed {
            model.quantize_nf4(&targets, &Nf4Config::new().with_double_quant(double)).unwrap();
        }
        let config = PeftConfig::new(LoraConfig::new(rank), targets);
        model.add_adapter("default", &config).unwrap();
        let lora = LoraConfig::new(rank).with_factors(a.view.clone(), b.view.clone()).unwrap();
        let scale = lora.scale();
        model.swap_adapter("default", &config, vec![("lm_head".to_owned(), lora)]).unwrap();

        let dense = match packed {
            false => weight.clone(),
            true => {
                let of_dtype = |t: Tensor<2>| t.cast(dtype);
                let swapped = weight.clone().cast(DType::F32);
                let nf4 = Nf4Config::new().with_double_quant(double);
                let packed = burn_peft::nf4::Nf4Weight::quantize("w", swapped.inner(), &nf4).unwrap();
                let dense = of_dtype(packed.dequantize(DType::F32.into()).transpose());
                Tensor::from_inner(dense)
            }
        };
        let dense = dense.cast(DType::F64);
        let change = a.wide.clone().matmul(b.wide.clone()) * scale;
        let logits = x.wide.clone().matmul((dense + change).unsqueeze());

        let head = &model.module().lm_head;
        let found = head.forward_peft(x.view.clone());
        let asked = |x| vec![("x", grad(x))];
        compare("head", (found, asked(&x.view)), (logits.clone(), asked(&x.wide)), then, bound(dtype));

        let (labels, mask) = labels([batch, seq], vocabulary);
        let chunks = HeadChunks::new(7, 16).unwrap();
        let loss = sft_head_loss(x.view.clone(), head, labels.clone(), mask.clone(), &chunks);
        let found = loss.unwrap().mean();
        let expected = plain(logits, labels, mask);
        near("loss", &values(found), &values(expected), bound(dtype));
    }
}
