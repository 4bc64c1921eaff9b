//! Checkpointing by blocks and by Burn's own strategy: the same loss and the same gradients as with everything kept.

#[path = "../examples/llama/mod.rs"]
mod llama;

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::tensor::{Bool, DType, Device, Distribution, FloatDType, Int, Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::adapter::LoraConfig;
use burn_peft::checkpointing::{Checkpointing, Keep};
use burn_peft::model::{PeftConfig, PeftForward, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use burn_peft::objective::sft_loss;

use llama::attention::Layout;
use llama::config::LlamaConfig;
use llama::model::LlamaForCausalLm;

const SEQ: usize = 12;
const BATCH: usize = 2;
const VOCAB: usize = 96;
const LAYERS: usize = 5;

fn config(tied: bool) -> LlamaConfig {
    let json = format!(
        r#"{{"model_type": "llama", "vocab_size": {VOCAB}, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": {LAYERS},
            "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": {tied}}}"#
    );
    LlamaConfig::from_json(&json).unwrap()
}

/// Gradients by path; bits, so that equal is equal.
type Gradients = BTreeMap<String, TensorData>;

struct Named<'a> {
    path: Vec<String>,
    gradients: &'a GradientsParams,
    named: Gradients,
}

impl ModuleVisitor for Named<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            self.named.insert(self.path.join("."), gradient.into_data());
        }
    }
}

fn named(module: &impl Module, gradients: &GradientsParams) -> Gradients {
    let mut named = Named {
        path: Vec::new(),
        gradients,
        named: Gradients::new(),
    };
    module.visit(&mut named);
    named.named
}

fn batch(device: &Device) -> (Tensor<2, Int>, Tensor<2, Int>, Tensor<2, Bool>) {
    let token = |i: usize| (i * 37 % VOCAB) as i64;
    let data = |shift: usize| {
        let tokens: Vec<i64> = (0..BATCH * SEQ).map(|i| token(i + shift)).collect();
        TensorData::new(tokens, [BATCH, SEQ])
    };
    let mask: Vec<bool> = (0..BATCH * SEQ).map(|i| i % 3 > 0).collect();
    (
        Tensor::from_data(data(0), device),
        Tensor::from_data(data(1), device),
        Tensor::from_data(TensorData::new(mask, [BATCH, SEQ]), device),
    )
}

/// Loss and gradients of one step.
fn step(
    model: &PeftModel<LlamaForCausalLm>,
    device: &Device,
    keep: Keep,
    seed: u64,
) -> (f32, Gradients) {
    let (tokens, targets, mask) = batch(device);
    let layout = Layout::causal(SEQ, 0, device);
    let (hidden, tape) = model
        .model
        .forward_checkpointed(tokens, &layout, Checkpointing { keep, seed })
        .unwrap();
    let loss = sft_loss(model.head(hidden), targets, mask).unwrap().mean();
    let gradients = tape.backward(&loss, model);
    (loss.into_scalar::<f32>(), named(model, &gradients))
}

/// A model with an adapter whose `B` is not zero, which would hide gradients.
fn adapted(device: &Device, tied: bool, nf4: bool, adapter: &PeftConfig) -> PeftModel<LlamaForCausalLm> {
    let mut model = PeftModel::new(config(tied).init(device));
    if nf4 {
        model
            .quantize_nf4(&TargetConfig::all_linear(), &Nf4Config::new())
            .unwrap();
    }
    model.add_adapter("default", adapter).unwrap();
    model.map(&mut Noise { path: Vec::new() })
}

/// Fills every factor `B` with noise.
struct Noise {
    path: Vec<String>,
}

impl burn::module::ModuleMapper for Noise {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.path.last().is_some_and(|name| name == "b") {
            false => param,
            true => param.map(|b| {
                let noise = b.random_like(Distribution::Normal(0.0, 0.05));
                noise.detach().set_require_grad(b.is_require_grad())
            }),
        }
    }
}

fn lora() -> LoraConfig {
    LoraConfig::new(4).with_alpha(8.0)
}

fn all_linear(lora: LoraConfig) -> PeftConfig {
    PeftConfig::new(lora, TargetConfig::all_linear())
}

/// Every kind of block gives the same to the bit: the operations are the same, on the same values, in the same order.
#[test]
fn gradients_are_those_of_one_graph() {
    let device = Device::default().autodiff();
    let with_tokens = |targets: &[&str]| {
        PeftConfig::new(lora(), TargetConfig::modules(targets))
    };
    let cases: Vec<(&str, bool, bool, PeftConfig)> = vec![
        ("LoRA", false, false, all_linear(lora())),
        ("QLoRA", false, true, all_linear(lora())),
        ("QLoRA with dropout", false, true, all_linear(lora().with_dropout(0.3))),
        ("DoRA", false, false, all_linear(lora().with_dora(true))),
        ("QDoRA with dropout", false, true, all_linear(lora().with_dora(true).with_dropout(0.2))),
        ("LoRA-FA", false, true, all_linear(lora().with_freeze_a(true))),
        ("embedding and head", false, true, with_tokens(&["embed_tokens", "q_proj", "lm_head"])),
        ("tied embedding", true, true, with_tokens(&["embed_tokens", "down_proj"])),
        (
            "copies of norms and of the embedding",
            false,
            false,
            all_linear(lora()).with_modules_to_save(["embed_tokens", "input_layernorm", "norm"]),
        ),
        (
            "last layers only",
            false,
            true,
            PeftConfig::new(lora(), TargetConfig::all_linear().with_layers([3, 4])),
        ),
        ("head only", false, true, with_tokens(&["lm_head"])),
    ];
    for (name, tied, nf4, adapter) in cases {
        let model = adapted(&device, tied, nf4, &adapter);
        let (loss, gradients) = step(&model, &device, Keep::All, 7);
        assert!(!gradients.is_empty());
        for size in [1, 2, 3, LAYERS, LAYERS + 1] {
            let found = step(&model, &device, Keep::Segments(size), 7);
            assert_eq!(found.0, loss, "{name}, segments of {size}");
            let paths: Vec<_> = found.1.keys().collect();
            assert_eq!(paths, gradients.keys().collect::<Vec<_>>(), "{name}, segments of {size}");
            for (path, gradient) in &found.1 {
                assert_eq!(gradient, &gradients[path], "{name}, segments of {size}: {path}");
            }
        }
    }
}

#[test]
fn dropout_repeats_by_its_seed_and_differs_by_block() {
    let device = Device::default().autodiff();
    let model = adapted(&device, false, true, &all_linear(lora().with_dropout(0.5)));
    let run = |seed| step(&model, &device, Keep::Segments(1), seed);
    assert_eq!(run(1), run(1));
    assert_ne!(run(1).0, run(2).0);
    // Were the second pass to drop other inputs than the first, these would not be the gradients of the loss: a wider step
    // along one of them changes the loss by its square.
    let (loss, gradients) = run(3);
    let path = "model.layers.1.mlp.up_proj.weight.peft.default.b";
    let gradient = &gradients[path];
    let squares: f32 = gradient.iter::<f32>().map(|g| g * g).sum();
    let step_by = |by: f32| {
        let moved = model.clone().map(&mut Move { path: Vec::new(), to: path, by, gradient });
        step(&moved, &device, Keep::Segments(1), 3).0
    };
    let by = 1e-2 / squares.sqrt();
    let found = (step_by(by) - step_by(-by)) / (2.0 * by);
    // Central difference in f32: the loss, about 5, is rounded to 5e-7, over steps of 2e-2 in all.
    assert!((found - squares).abs() <= 1e-4 / by + 0.02 * squares, "{found} for {squares}, loss {loss}");
}

/// Adds `by` times the gradient to the parameter at a path.
struct Move<'a> {
    path: Vec<String>,
    to: &'a str,
    by: f32,
    gradient: &'a TensorData,
}

impl burn::module::ModuleMapper for Move<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.path.join(".") == self.to {
            false => param,
            true => param.map(|value| {
                let step = Tensor::from_data(self.gradient.clone(), &value.device()) * self.by;
                (value + step).detach().require_grad()
            }),
        }
    }
}
