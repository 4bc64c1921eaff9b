//! One training step of the examples' Llama in a setup, under the counting allocator.

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::{AdamWConfig, GradientsParams, SgdConfig};
use burn::tensor::{Device, Distribution, FloatDType, Int, Tensor};
use burn_peft::adapter::LoraConfig;
use burn_peft::checkpointing;
use burn_peft::memory::{
    Float, Head, Loss, Method, ModelShape, Optimizer, Recompute, Setup, Targets,
};
use burn_peft::model::{DEFAULT_ADAPTER, PeftConfig, PeftModel, TargetConfig};
use burn_peft::objective::{HeadChunks, sft_head_loss, sft_loss};
use burn_peft::optim::{AdamW8bitConfig, F32State};

use crate::ALLOCATOR;
use llama::attention::Layout;
use llama::config::LlamaConfig;
use llama::model::LlamaForCausalLm;

/// Runs every method once on every thread of the pool and on this one, so that each has the scratch that it keeps from then
/// on, and returns how many bytes stay.
pub fn warm_up(shape: &ModelShape) -> usize {
    let before = ALLOCATOR.current_usage();
    let shape = shape.clone().with_layers(1);
    let run = || {
        for method in Method::ALL {
            let setup = Setup::new(method, Float::F32).with_batch(1, 512);
            measure(&shape, &setup);
        }
        let shape = ModelShape {
            vocab: 32_000,
            ..shape.clone()
        };
        let setup = Setup::new(Method::QLora, Float::F32);
        measure(&shape, &setup.with_loss(super::LARGE_CHUNKS));
    };
    run();
    rayon::broadcast(|_| run());
    ALLOCATOR.current_usage() - before
}

/// Live bytes of the second step, above those before the model was built.
#[derive(Debug)]
pub struct Measured {
    /// Before the step: the model and the optimiser's state.
    pub standing: f64,
    /// Between the loss and the backward pass, above what stands.
    pub kept: f64,
    /// The most at any time.
    pub peak: f64,
}

/// Builds the model and trains it for two steps.
pub fn measure(shape: &ModelShape, setup: &Setup) -> Measured {
    let device = Device::default().autodiff();
    let [vocab, batch, seq] = [shape.vocab, setup.batch, setup.seq].map(|n| n as usize);
    let any = Distribution::Uniform(0.0, vocab as f64);
    let tokens = Tensor::<2, Int>::random([batch, seq + 1], any, &device);
    let input = tokens.clone().narrow(1, 0, seq);
    let targets = tokens.narrow(1, 1, seq);

    let before = ALLOCATOR.current_usage();
    let mut config = LlamaConfig::new(
        vocab,
        shape.hidden as usize,
        shape.intermediate as usize,
        shape.layers as usize,
        shape.heads as usize,
        shape.kv_heads as usize,
    );
    config.tie_word_embeddings = shape.tied;
    let data = [input, targets];
    // One dtype is all that a model here has.
    assert_eq!(setup.embedding, setup.base);
    assert!(matches!(setup.head, Head::Nf4) || setup.head == Head::Dense(setup.base));
    let llama = match setup.base {
        Float::F32 => config.init(&device),
        base => config.init(&device).map(&mut Cast(burn_float(base))),
    };
    let [standing, kept, peak] = match setup.method {
        Method::Full => two_steps(setup, llama, |llama| llama, data),
        _ => {
            let mut model = PeftModel::new(llama);
            if setup.method == Method::QLora {
                let packed = match setup.head {
                    Head::Dense(_) => TargetConfig::all_linear(),
                    Head::Nf4 => TargetConfig::regex(r".*(_proj|lm_head)"),
                };
                model.quantize_nf4(&packed, &setup.nf4).unwrap();
            }
            let lora = LoraConfig::new(setup.rank as usize).with_dtype(burn_float(setup.adapter));
            let targets = match setup.targets {
                Targets::QUERY_VALUE => TargetConfig::list(["q_proj", "v_proj"]),
                Targets::ALL_LINEAR => TargetConfig::all_linear(),
                other => panic!("no model is built for {other:?}"),
            };
            let config = PeftConfig::new(lora, targets);
            model.add_adapter(DEFAULT_ADAPTER, &config).unwrap();
            two_steps(setup, model, PeftModel::module, data)
        }
    };
    Measured {
        standing: (standing - before) as f64,
        kept: (kept - standing) as f64,
        peak: (peak - before) as f64,
    }
}

/// Live bytes before the second step, before its backward pass, and at most.
fn two_steps<M: Module>(
    setup: &Setup,
    mut model: M,
    llama: fn(&M) -> &LlamaForCausalLm,
    [input, targets]: [Tensor<2, Int>; 2],
) -> [usize; 3] {
    let mask = targets.clone().greater_equal_elem(0);
    let mut optimizer = match setup.optimizer {
        Optimizer::Sgd => SgdConfig::new().init(),
        // Around parameters that are not f32 it is what keeps moments in f32; around others it is what it is around.
        Optimizer::AdamW { state: Float::F32 } => F32State::new(AdamWConfig::new().build()).init(),
        Optimizer::AdamW { state } => panic!("no optimiser is built for moments in {state:?}"),
        Optimizer::AdamW8bit => AdamW8bitConfig::new().init(),
    };
    let checkpointing = match setup.recompute {
        Recompute::Never => None,
        Recompute::Segments(blocks) => Some(checkpointing::Checkpointing {
            keep: checkpointing::Keep::Segments(blocks as usize),
            seed: 0,
        }),
    };
    let [mut standing, mut kept] = [0; 2];
    for _ in 0..2 {
        standing = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let loss = |hidden: Tensor<3>| {
            let (llama, targets, mask) = (llama(&model), targets.clone(), mask.clone());
            let loss = match (setup.loss, &llama.lm_head) {
                (Loss::Logits, _) => sft_loss(llama.head(hidden), targets, mask),
                (Loss::Chunked { tokens, vocab }, head) => {
                    let chunks = HeadChunks::new(tokens as usize, vocab as usize).unwrap();
                    match head {
                        Some(head) => sft_head_loss(hidden, head, targets, mask, &chunks),
                        None => {
                            let head = &llama.model.embed_tokens;
                            sft_head_loss(hidden, head, targets, mask, &chunks)
                        }
                    }
                }
            };
            loss.unwrap().mean()
        };
        let blocks = &llama(&model).model;
        let layout = Layout::causal(setup.seq as usize, 0, &input.device());
        let gradients = match checkpointing {
            None => {
                let loss = loss(blocks.forward(input.clone(), &layout, None));
                kept = ALLOCATOR.current_usage();
                GradientsParams::from_grads(loss.backward(), &model)
            }
            Some(checkpointing) => {
                let run = blocks.forward_checkpointed(input.clone(), &layout, checkpointing);
                let (hidden, tape) = run.unwrap();
                let loss = loss(hidden);
                kept = ALLOCATOR.current_usage();
                tape.backward(&loss, &model)
            }
        };
        model = optimizer.step(1e-4, model, gradients);
    }
    [standing, kept, ALLOCATOR.peak_usage()]
}

fn burn_float(float: Float) -> FloatDType {
    match float {
        Float::F32 => FloatDType::F32,
        Float::Bf16 => FloatDType::BF16,
        Float::F16 => FloatDType::F16,
    }
}

/// Casts every float parameter.
struct Cast(FloatDType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        // A leaf again, as a parameter that trains has to be.
        param.map(|tensor| {
            let trains = tensor.is_require_grad();
            let constant = tensor.detach().set_require_grad(false);
            constant.cast(self.0).set_require_grad(trains)
        })
    }
}
