//! Checkpointing by blocks and by Burn's own strategy: the same loss and the same gradients as with everything kept.

mod layers;
mod memory;

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::tensor::{Bool, Device, Distribution, Int, Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::adapter::LoraConfig;
use burn_peft::checkpointing::{Checkpointing, Keep};
use burn_peft::model::{PeftConfig, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use burn_peft::objective::{HeadChunks, sft_loss};

use crate::alone;
use llama::attention::Layout;
use llama::config::LlamaConfig;
use llama::model::LlamaForCausalLm;

const SEQ: usize = 12;
const BATCH: usize = 2;
const VOCAB: usize = 96;
const LAYERS: usize = 5;
const LINEAR: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

fn config(tied: bool) -> LlamaConfig {
    LlamaConfig {
        tie_word_embeddings: tied,
        ..LlamaConfig::new(VOCAB, 64, 96, LAYERS, 4, 2)
    }
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
fn adapted(
    device: &Device,
    tied: bool,
    nf4: bool,
    adapter: &PeftConfig,
) -> PeftModel<LlamaForCausalLm> {
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

impl ModuleMapper for Noise {
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
    if !alone(gradients_are_those_of_one_graph) {
        return;
    }
    let device = Device::default().autodiff();
    let with_tokens =
        |targets: &[&str]| PeftConfig::new(lora(), TargetConfig::list(targets.iter().copied()));
    let cases: Vec<(&str, bool, bool, PeftConfig)> = vec![
        ("LoRA", false, false, all_linear(lora())),
        ("QLoRA", false, true, all_linear(lora())),
        (
            "QLoRA with dropout",
            false,
            true,
            all_linear(lora().with_dropout(0.3)),
        ),
        ("DoRA", false, false, all_linear(lora().with_dora(true))),
        (
            "QDoRA with dropout",
            false,
            true,
            all_linear(lora().with_dora(true).with_dropout(0.2)),
        ),
        (
            "LoRA-FA",
            false,
            true,
            all_linear(lora().with_freeze_a(true)),
        ),
        (
            "embedding and head",
            false,
            true,
            with_tokens(&["embed_tokens", "q_proj", "lm_head"]),
        ),
        (
            "tied embedding",
            true,
            true,
            with_tokens(&["embed_tokens", "down_proj"]),
        ),
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
            PeftConfig::new(
                lora(),
                TargetConfig::list(LINEAR).with_layers_to_transform([3, 4]),
            ),
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
            assert_eq!(
                paths,
                gradients.keys().collect::<Vec<_>>(),
                "{name}, segments of {size}"
            );
            for (path, gradient) in &found.1 {
                assert!(
                    gradient == &gradients[path],
                    "{name}, segments of {size}: {path}"
                );
            }
        }
    }
}

#[test]
fn dropout_repeats_by_its_seed() {
    if !alone(dropout_repeats_by_its_seed) {
        return;
    }
    let device = Device::default().autodiff();
    let model = adapted(&device, false, true, &all_linear(lora().with_dropout(0.5)));
    let run = |seed| step(&model, &device, Keep::Segments(1), seed);
    assert!(run(1) == run(1), "another pass, other values");
    assert_ne!(run(1).0, run(2).0);
    // Were the second pass to drop other inputs than the first, these would not be the gradients of the loss: a wider step
    // along one of them changes the loss by its square.
    let (loss, gradients) = run(3);
    let path = "model.layers.1.mlp.up_proj.weight.peft.default.b";
    let gradient = &gradients[path];
    let squares: f32 = gradient.iter::<f32>().map(|g| g * g).sum();
    let step_by = |by: f32| {
        let moved = model.clone().map(&mut Move {
            path: Vec::new(),
            to: path,
            by,
            gradient,
        });
        step(&moved, &device, Keep::Segments(1), 3).0
    };
    let by = 1e-2 / squares.sqrt();
    let found = (step_by(by) - step_by(-by)) / (2.0 * by);
    // Central difference in f32: the loss, about 5, is rounded to 5e-7, over steps of 2e-2 in all.
    assert!(
        (found - squares).abs() <= 1e-4 / by + 0.02 * squares,
        "{found} for {squares}, loss {loss}"
    );
}

/// Adds `by` times the gradient to the parameter at a path.
struct Move<'a> {
    path: Vec<String>,
    to: &'a str,
    by: f32,
    gradient: &'a TensorData,
}

impl ModuleMapper for Move<'_> {
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

/// Fused operations, packed products and the head's loss under Burn's strategy, alone and with blocks run again.
#[test]
fn a_whole_llama_under_both_strategies() {
    if !alone(a_whole_llama_under_both_strategies) {
        return;
    }
    let plain = Device::default().autodiff();
    let run = |device: &Device, keep: Keep| {
        device.seed(11);
        let targets = TargetConfig::list(LINEAR.into_iter().chain(["lm_head"]));
        let adapter = PeftConfig::new(lora().with_dropout(0.2), targets);
        let model = adapted(device, false, true, &adapter);
        let (tokens, targets, mask) = batch(device);
        let layout = Layout::causal(SEQ, 0, device);
        let (hidden, tape) = model
            .model
            .forward_checkpointed(tokens, &layout, Checkpointing { keep, seed: 3 })
            .unwrap();
        let chunks = HeadChunks::new(5, 40).unwrap();
        let loss = model.head_loss(hidden, targets, mask, &chunks);
        let gradients = tape.backward(&loss.unwrap().mean(), &model);
        named(&model, &gradients)
    };
    let expected = run(&plain, Keep::All);
    assert_eq!(expected.len(), 2 * (7 * LAYERS + 1));
    let balanced = plain.clone().gradient_checkpointing();
    for (device, keep) in [
        (&plain, Keep::Segments(1)),
        (&balanced, Keep::All),
        (&balanced, Keep::Segments(2)),
    ] {
        let found = run(device, keep);
        assert_eq!(found.len(), expected.len());
        for (path, gradient) in &found {
            assert!(gradient == &expected[path], "{path}, {keep:?}");
        }
    }
}

#[test]
fn errors_name_what_is_wrong() {
    if !alone(errors_name_what_is_wrong) {
        return;
    }
    let device = Device::default().autodiff();
    let linear: Vec<Linear> = vec![LinearConfig::new(2, 2).init(&device)];
    let run = |keep, device: &Device| {
        let x = Tensor::<2>::zeros([1, 2], device);
        Checkpointing { keep, seed: 0 }
            .forward(&linear, x, |linear, x| linear.forward(x))
            .map(|(y, _)| y)
    };
    let error = run(Keep::Segments(0), &device).unwrap_err();
    assert!(
        matches!(&error, PeftError::Config { name, .. } if name == "segments"),
        "{error}"
    );
    let error = run(Keep::Segments(1), &Device::default()).unwrap_err();
    assert!(error.to_string().contains("autodiff"), "{error}");
}

#[test]
fn no_block_and_nothing_trained() {
    if !alone(no_block_and_nothing_trained) {
        return;
    }
    let device = Device::default().autodiff();
    let x = Tensor::<2>::ones([1, 2], &device).require_grad();
    let run = Checkpointing::by_block(0);
    let (y, tape) = run
        .forward::<Linear, 2>(&[], x, |linear, x| linear.forward(x))
        .unwrap();
    let head: Linear = LinearConfig::new(2, 2).init(&device);
    let gradients = tape.backward(&head.forward(y).sum(), &head);
    assert_eq!(gradients.len(), 2);
    // Blocks that are frozen, before a head that is not.
    let blocks: Vec<Linear> = vec![LinearConfig::new(2, 2).init(&device).no_grad()];
    let x = Tensor::<2>::ones([1, 2], &device);
    let (y, tape) = run
        .forward(&blocks, x, |linear, x| linear.forward(x))
        .unwrap();
    assert!(!y.is_tracked());
    let gradients = tape.backward(&head.forward(y).sum(), &head);
    assert_eq!(gradients.len(), 2);
}
