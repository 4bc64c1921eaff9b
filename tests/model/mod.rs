//! Adapters on whole models.

mod choice;
mod compose;
mod dense_look;
mod description;
mod enums;
mod generated;
mod kinds;
mod lifecycle;
mod quantize;
mod scale;
mod several;
mod slices;
mod statistics;
mod storage;
mod svd;
mod ways;

use crate::kinds_model;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::nn::{Linear, LinearConfig, LinearLayout, Relu};
use burn::tensor::{Device, Distribution, Tensor};
use burn_peft::adapter::{Change, Lora, LoraConfig};
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig};

/// A small model of stock layers, in both layouts, that knows nothing of adapters but for one word.
#[derive(Module, Debug)]
struct Net {
    first: Linear,
    blocks: Vec<Block>,
    lm_head: Linear,
}

#[derive(Module, Debug)]
struct Block {
    up: Linear,
    down: Linear,
}

const WIDTH: usize = 32;

impl Net {
    fn new(device: &Device) -> Self {
        let linear = |d_in, d_out, layout| {
            LinearConfig::new(d_in, d_out)
                .with_layout(layout)
                .init(device)
        };
        Self {
            first: linear(8, WIDTH, LinearLayout::Row),
            blocks: (0..2)
                .map(|_| Block {
                    up: linear(WIDTH, 48, LinearLayout::Row),
                    down: linear(48, WIDTH, LinearLayout::Col),
                })
                .collect(),
            lm_head: linear(WIDTH, 4, LinearLayout::Row),
        }
    }

    /// Burn's own forward: what an unchanged model does.
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.run(x, |linear, x| linear.forward(x))
    }

    /// The same with one word changed.
    fn forward_peft(&self, x: Tensor<2>) -> Tensor<2> {
        self.run(x, |linear, x| linear.forward_peft(x))
    }

    fn run(&self, x: Tensor<2>, linear: impl Fn(&Linear, Tensor<2>) -> Tensor<2>) -> Tensor<2> {
        let mut x = Relu::new().forward(linear(&self.first, x));
        for block in &self.blocks {
            let up = Relu::new().forward(linear(&block.up, x.clone()));
            x = x + linear(&block.down, up);
        }
        linear(&self.lm_head, x)
    }
}

fn run_block(block: &Block, x: Tensor<2>) -> Tensor<2> {
    let up = Relu::new().forward(block.up.forward_peft(x));
    block.down.forward_peft(up)
}

/// A change with other values.
fn moved(change: Change) -> Change {
    fn step<const D: usize>(param: &Param<Tensor<D>>) -> Param<Tensor<D>> {
        let value = param.val().detach();
        let noise = value.random_like(Distribution::Normal(0.0, 0.3));
        Param::from_tensor((value + noise).detach())
    }
    match change {
        Change::Lora(mut lora) => {
            lora.a = step(&lora.a);
            lora.b = step(&lora.b);
            lora.into()
        }
        Change::Copy(mut copy) => {
            copy.values = step(&copy.values);
            copy.into()
        }
        Change::Rows(mut rows) => {
            rows.rows = step(&rows.rows);
            rows.into()
        }
    }
}

fn device() -> Device {
    Device::default().autodiff()
}

fn input(device: &Device) -> Tensor<2> {
    Tensor::random([5, 8], Distribution::Normal(0.0, 1.0), device)
}

fn config(targets: TargetConfig) -> PeftConfig {
    PeftConfig::new(LoraConfig::new(3).with_alpha(5.0), targets)
}

/// Adds an adapter whose `B` is not zero, and makes it the active one.
fn adapted<M: Module>(model: &mut PeftModel<M>, name: &str, targets: TargetConfig) {
    adapted_as(model, name, &config(targets));
}

fn adapted_as<M: Module>(model: &mut PeftModel<M>, name: &str, config: &PeftConfig) {
    model.add_adapter(name, config).unwrap();
    let factors = model.factors(name).unwrap();
    model.delete_adapter(name).unwrap();
    let factors = factors
        .into_iter()
        .map(|(path, lora)| (path, with_random_b(&lora)))
        .collect();
    model.insert_adapter(name, config, factors).unwrap();
    model.set_adapter(name).unwrap();
}

/// As the fresh adapter, with `B` not zero and a magnitude that is not the weight's, if there is one.
fn with_random_b(lora: &Lora) -> Lora {
    let b = lora
        .b
        .val()
        .detach()
        .random_like(Distribution::Normal(0.0, 0.3));
    let changed = lora.config().with_factors(lora.a.val().detach(), b);
    let changed = changed.unwrap();
    match &lora.magnitude {
        None => changed,
        Some(magnitude) => {
            let magnitude = magnitude.val().detach();
            let gain = magnitude.random_like(Distribution::Uniform(0.5, 1.5));
            changed.with_magnitude(magnitude * gain).unwrap()
        }
    }
}

fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor.to_data().try_into_vec::<f32>().unwrap()
}

fn max_diff<const D: usize>(left: &Tensor<D>, right: &Tensor<D>) -> f32 {
    assert_eq!(left.dims(), right.dims());
    values(left)
        .iter()
        .zip(values(right))
        .map(|(l, r)| (l - r).abs())
        .fold(0.0, f32::max)
}

/// Paths, ids and gradient requirements of all float parameters.
#[derive(Default)]
struct Params {
    path: Vec<String>,
    found: Vec<(String, ParamId, bool)>,
}

impl ModuleVisitor for Params {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.found
            .push((self.path.join("."), param.id, param.val().is_require_grad()));
    }
}

fn params(module: &impl Module) -> Vec<(String, ParamId, bool)> {
    let mut params = Params::default();
    module.visit(&mut params);
    params.found
}
