//! One training step of the examples' Llama in a setup, under the counting allocator.

use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Int, Tensor};
use burn_peft::adapter::LoraConfig;
use burn_peft::checkpointing;
use burn_peft::memory::{Checkpointing, Float, Method, ModelShape, Setup};
use burn_peft::model::{DEFAULT_ADAPTER, PeftConfig, PeftModel, TargetConfig};
use burn_peft::objective::sft_loss;

use super::ALLOCATOR;
use super::llama::attention::Layout;
use super::llama::config::LlamaConfig;
use super::llama::model::LlamaForCausalLm;

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
    };
    run();
    rayon::broadcast(|_| run());
    ALLOCATOR.current_usage() - before
}

/// The peak of live bytes of the second step, above those before the model was built.
pub fn measure(shape: &ModelShape, setup: &Setup) -> usize {
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
    let llama = config.init(&device);
    let peak = match setup.method {
        Method::Full => two_steps(setup, llama, |llama| llama, data),
        _ => {
            let mut model = PeftModel::new(llama);
            if setup.method == Method::QLora {
                let blocks = TargetConfig::all_linear();
                model.quantize_nf4(&blocks, &setup.nf4).unwrap();
            }
            let lora = LoraConfig::new(setup.rank as usize);
            let config = PeftConfig::new(lora, TargetConfig::all_linear());
            model.add_adapter(DEFAULT_ADAPTER, &config).unwrap();
            two_steps(setup, model, PeftModel::module, data)
        }
    };
    peak - before
}

/// The peak of live bytes of the second step.
fn two_steps<M: Module>(
    setup: &Setup,
    mut model: M,
    llama: fn(&M) -> &LlamaForCausalLm,
    [input, targets]: [Tensor<2, Int>; 2],
) -> usize {
    let mask = targets.clone().greater_equal_elem(0);
    let mut optimizer = AdamWConfig::new().init();
    let checkpointing = match setup.checkpointing {
        Checkpointing::None => None,
        Checkpointing::Segments(blocks) => Some(checkpointing::Checkpointing {
            keep: checkpointing::Keep::Segments(blocks as usize),
            seed: 0,
        }),
    };
    for _ in 0..2 {
        ALLOCATOR.reset_peak_usage();
        let loss = |logits| {
            let loss = sft_loss(logits, targets.clone(), mask.clone());
            loss.unwrap().mean()
        };
        let gradients = match checkpointing {
            None => {
                let loss = loss(llama(&model).forward(input.clone()));
                GradientsParams::from_grads(loss.backward(), &model)
            }
            Some(checkpointing) => {
                let llama = llama(&model);
                let layout = Layout::causal(setup.seq as usize, 0, &input.device());
                let run = llama
                    .model
                    .forward_checkpointed(input.clone(), &layout, checkpointing);
                let (x, tape) = run.unwrap();
                let loss = loss(llama.head(x));
                tape.backward(&loss, &model)
            }
        };
        model = optimizer.step(1e-4, model, gradients);
    }
    ALLOCATOR.peak_usage()
}
