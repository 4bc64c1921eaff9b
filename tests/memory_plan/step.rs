//! One training step of the examples' Llama in a setup, under the counting allocator.

use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Int, Tensor};
use burn_peft::adapter::LoraConfig;
use burn_peft::memory::{Float, Method, ModelShape, Setup};
use burn_peft::model::{DEFAULT_ADAPTER, PeftConfig, PeftModel, TargetConfig};
use burn_peft::objective::sft_loss;

use super::ALLOCATOR;
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
    let model = config.init(&device);
    let data = [input, targets];
    if setup.method == Method::Full {
        return two_steps(model, data, LlamaForCausalLm::forward) - before;
    }
    let mut model = PeftModel::new(model);
    if setup.method == Method::QLora {
        let blocks = TargetConfig::all_linear();
        model.quantize_nf4(&blocks, &setup.nf4).unwrap();
    }
    let lora = LoraConfig::new(setup.rank as usize);
    let config = PeftConfig::new(lora, TargetConfig::all_linear());
    model.add_adapter(DEFAULT_ADAPTER, &config).unwrap();
    two_steps(model, data, |model, input| model.forward(input)) - before
}

/// The peak of live bytes of the second step.
fn two_steps<M: Module>(
    mut model: M,
    [input, targets]: [Tensor<2, Int>; 2],
    forward: impl Fn(&M, Tensor<2, Int>) -> Tensor<3>,
) -> usize {
    let mask = targets.clone().greater_equal_elem(0);
    let mut optimizer = AdamWConfig::new().init();
    for _ in 0..2 {
        ALLOCATOR.reset_peak_usage();
        let logits = forward(&model, input.clone());
        let loss = sft_loss(logits, targets.clone(), mask.clone()).unwrap();
        let gradients = loss.mean().backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(1e-4, model, gradients);
    }
    ALLOCATOR.peak_usage()
}
