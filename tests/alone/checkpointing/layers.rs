//! Every layer of the crate, and one block twice, under both strategies.

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::conv::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig};
use burn::nn::{Embedding, EmbeddingConfig, LinearConfig};
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use burn_peft::checkpointing::{Checkpointing, Keep};
use burn_peft::layer::{LoraLinear, QLoraLinear};
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;

use super::{Noise, lora, named};
use crate::alone;

/// Blocks of every layer that an adapter can be on, and of this crate's own, in one sum.
#[derive(Module, Debug)]
struct Mixed {
    conv1d: Conv1d,
    conv2d: Conv2d,
    embedding: Embedding,
    dense: LoraLinear,
    packed: QLoraLinear,
}

const WIDTH: usize = 8;

impl Mixed {
    fn new(device: &Device) -> Self {
        let linear = || LinearConfig::new(WIDTH, WIDTH).init(device);
        let lora = lora().with_dropout(0.4);
        Self {
            conv1d: Conv1dConfig::new(WIDTH, WIDTH, 1).init(device),
            conv2d: Conv2dConfig::new([WIDTH, WIDTH], [1, 1]).init(device),
            embedding: EmbeddingConfig::new(WIDTH, WIDTH).init(device),
            dense: LoraLinear::from_linear(linear(), &lora).unwrap(),
            packed: QLoraLinear::from_linear(linear(), &Nf4Config::new(), &lora).unwrap(),
        }
    }

    /// `[rows, WIDTH]` to the same.
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let rows = x.dims()[0];
        let columns = x.clone().transpose().unsqueeze::<3>();
        let one = self.conv1d.forward_peft(columns.clone());
        let two = self.conv2d.forward_peft(columns.unsqueeze_dim::<4>(3));
        let tokens = Tensor::<1, Int>::arange(0..rows as i64, &x.device()) % WIDTH as i64;
        let looked_up = self.embedding.forward_peft(tokens.unsqueeze::<2>());
        x.clone()
            + one.squeeze_dim::<2>(0).transpose()
            + two.reshape([WIDTH, rows]).transpose()
            + looked_up.squeeze_dim::<2>(0)
            + self.dense.forward(x.clone())
            + self.packed.forward(x).tanh()
    }
}

#[derive(Module, Debug)]
struct Stack {
    blocks: Vec<Mixed>,
}

#[test]
fn every_layer_of_the_crate_and_both_strategies_together() {
    if !alone(every_layer_of_the_crate_and_both_strategies_together) {
        return;
    }
    // Everything on the device anew: Burn's operations take tensors of one strategy only, which `fork` does not change.
    let run = |device: &Device, keep: Keep| {
        device.seed(3);
        let blocks = (0..3).map(|_| Mixed::new(device)).collect();
        let mut model = PeftModel::new(Stack { blocks });
        let targets = TargetConfig::list(["conv1d", "conv2d", "embedding"]);
        let adapter = PeftConfig::new(lora(), targets);
        model.add_adapter("default", &adapter).unwrap();
        // A layer's own factors were frozen with the rest.
        let model = model
            .map(&mut Noise { path: Vec::new() })
            .map(&mut Grouped::trained(["dense.delta", "packed.delta"]));
        // One block twice: its parameters have one gradient, the sum.
        let mut blocks = model.blocks.clone();
        blocks.push(blocks[1].clone());
        let x = Tensor::<2>::random([5, WIDTH], Distribution::Normal(0.0, 1.0), device);
        let x = x.require_grad();
        let (y, tape) = Checkpointing { keep, seed: 9 }
            .forward(&blocks, x.clone(), Mixed::forward)
            .unwrap();
        let loss = y.powi_scalar(2).mean();
        let gradients = tape.backward(&loss, &model);
        named(&model, &gradients)
    };
    let plain = Device::default().autodiff();
    let expected = run(&plain, Keep::All);
    // Two factors of three adapted layers and of two of the crate's own, in three blocks.
    assert_eq!(expected.len(), 2 * 5 * 3, "{:?}", expected.keys());
    let strategies = [plain.clone(), plain.clone().gradient_checkpointing()];
    for (strategy, device) in strategies.iter().enumerate() {
        for keep in [Keep::All, Keep::Segments(1), Keep::Segments(3)] {
            let found = run(device, keep);
            assert_eq!(found.len(), expected.len());
            for (path, gradient) in &found {
                // The sum of the two uses of a block, in another order of what comes before it.
                let error = largest_difference(gradient, &expected[path]);
                assert!(
                    error <= 1e-5,
                    "{path}, strategy {strategy}, {keep:?}: {error}"
                );
            }
        }
    }
}

fn largest_difference(left: &TensorData, right: &TensorData) -> f32 {
    assert_eq!(left.shape(), right.shape());
    let largest = right.iter::<f32>().fold(1e-3f32, |max, x| max.max(x.abs()));
    left.iter::<f32>()
        .zip(right.iter::<f32>())
        .map(|(l, r)| (l - r).abs() / largest)
        .fold(0.0, |max, x| if x <= max { max } else { x })
}

/// Makes the parameters under these names trainable.
struct Grouped {
    path: Vec<String>,
    trained: Vec<String>,
}

impl Grouped {
    fn trained<const N: usize>(names: [&str; N]) -> Self {
        Self {
            path: Vec::new(),
            trained: names.map(String::from).into(),
        }
    }
}

impl ModuleMapper for Grouped {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.join(".");
        match self.trained.iter().any(|name| path.contains(name)) {
            false => param,
            true => param.set_require_grad(true),
        }
    }
}
