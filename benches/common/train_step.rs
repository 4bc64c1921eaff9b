//! A whole training step of the examples' Llama: forward, loss, backward, AdamW on adapters of every linear layer.

use std::hint::black_box;

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Distribution, FloatDType, Int, Tensor};
use burn_peft::adapter::LoraConfig;
use burn_peft::model::{DEFAULT_ADAPTER, PeftConfig, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use burn_peft::objective::sft_loss;

use llama::config::LlamaConfig;

/// Sequences in a batch.
pub const BATCH: usize = 2;
/// Tokens in a sequence.
pub const SEQ: usize = 256;
/// Rank of the adapters.
pub const RANK: usize = 16;

const VOCAB: usize = 2048;
const HIDDEN: usize = 512;
/// A multiple of 64: with 1376, bitsandbytes 0.50.2 computes wrong products on a CPU.
const INTERMEDIATE: usize = 1408;
const LAYERS: usize = 8;
const HEADS: usize = 8;

/// One step, to be called again and again. The base is packed or dense, and as the activations of `dtype`; the factors
/// are f32.
///
/// Every token is supervised, and the loss is read, as a training loop does.
pub fn train_step(packed: bool, dtype: FloatDType) -> impl FnMut() {
    let device = Device::default().autodiff();
    let config = LlamaConfig::new(VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, HEADS);
    let llama = config.init(&device);
    let llama = match dtype {
        FloatDType::F32 => llama,
        dtype => llama.map(&mut Cast(dtype)),
    };
    let mut model = PeftModel::new(llama);
    if packed {
        model
            .quantize_nf4(&TargetConfig::all_linear(), &Nf4Config::new())
            .unwrap();
    }
    let lora = LoraConfig::new(RANK).with_alpha(RANK as f64);
    let config = PeftConfig::new(lora, TargetConfig::all_linear());
    model.add_adapter(DEFAULT_ADAPTER, &config).unwrap();

    let any = Distribution::Uniform(0.0, VOCAB as f64);
    let tokens = Tensor::<2, Int>::random([BATCH, SEQ + 1], any, &device);
    let input = tokens.clone().narrow(1, 0, SEQ);
    let targets = tokens.narrow(1, 1, SEQ);
    let mask = targets.clone().greater_equal_elem(0);

    let mut optimizer = AdamWConfig::new().init();
    let mut model = Some(model);
    let mut step = move || {
        let trained = model.take().expect("put back by the step before");
        let logits = trained.forward(input.clone());
        let loss = sft_loss(logits, targets.clone(), mask.clone())
            .unwrap()
            .mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &trained);
        model = Some(optimizer.step(1e-4, trained, gradients));
        black_box(loss.into_scalar::<f32>());
    };
    // In Burn's pool, so that no operation has to wake its threads.
    move || rayon::scope(|_| step())
}

/// Casts every float parameter.
struct Cast(FloatDType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}
