//! The memory of a head's loss, in live bytes counted by the allocator: Llama 3's vocabulary, a narrow head, 512 tokens.
//!
//! All logits would be 263 MB, the head in f32 66 MB; what a pass may have is what its chunks say.

use burn::module::Module;
use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{Bool, DType, Device, Distribution, Int, Tensor};
use burn_peft::adapter::LoraConfig;
use burn_peft::model::{PeftConfig, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use burn_peft::objective::{HeadChunks, HeadSize, sft_head_loss};

use crate::{ALLOCATOR, alone};

const VOCABULARY: usize = 128_256;
const FEATURES: usize = 128;
const TOKENS: usize = 512;
const RANK: usize = 8;
/// Descriptions of tensors, nodes of the graph, labels, and three numbers a row.
const SMALL: usize = 128 * 1024;

#[derive(Module, Debug)]
struct Model {
    lm_head: Linear,
}

/// One test function: the allocator counts for the whole process.
#[test]
fn a_pass_holds_what_its_chunks_say() {
    if !alone(a_pass_holds_what_its_chunks_say) {
        return;
    }
    let logits = 4 * TOKENS * VOCABULARY;
    let head = 4 * FEATURES * VOCABULARY;
    for (x, weight) in [
        (DType::BF16, DType::BF16),
        (DType::F32, DType::BF16),
        (DType::F32, DType::F32),
    ] {
        for trained in [false, true] {
            let model = model(weight, trained);
            let peak = measure(&model.lm_head, x);
            let gradients = gradients(x) + if trained { bytes(weight) * head / 4 } else { 0 };
            let bound = bound(0, trained) + gradients;
            println!("x {x:?}, weight {weight:?}, trained {trained}: {peak} of {bound} bytes");
            assert!(peak <= bound, "{peak} bytes, not {bound}");
            assert_counted(peak);
            if !trained {
                assert!(peak < head / 3 && peak < logits / 12, "{peak} bytes");
            }
        }
    }
    for packed in [false, true] {
        let mut model = PeftModel::new(model(DType::BF16, false));
        let targets = TargetConfig::list(["lm_head"]);
        if packed {
            model.quantize_nf4(&targets, &Nf4Config::new()).unwrap();
        }
        let config = PeftConfig::new(LoraConfig::new(RANK), targets);
        model.add_adapter("default", &config).unwrap();
        let peak = measure(&model.module().lm_head, DType::BF16);
        // The rows in the dtype of `A` and their gradient twice, beside those in bf16; the gradients of the factors, that of `B` while it is handed on.
        let own = 3 * 4 * TOKENS * FEATURES + 2 * 4 * RANK * (FEATURES + VOCABULARY);
        let bound = bound(RANK, false) + gradients(DType::BF16) + own;
        println!("LoRA, packed {packed}: {peak} of {bound} bytes");
        assert!(peak <= bound, "{peak} bytes, not {bound}");
        assert_counted(peak);
        // In f16, which has no kernels, by Burn's operations: some tensors of a chunk's size, and no graph of them.
        let peak = measure(&model.module().lm_head, DType::F16);
        println!("the same, composed: {peak} bytes");
        assert!(peak < logits / 4, "{peak} bytes of {logits} for all logits");
    }
}

/// The logits of a chunk are there for sure: a smaller peak would be one that nobody counted.
fn assert_counted(peak: usize) {
    let chunks = HeadChunks::default();
    let logits = 4 * chunks.rows() * chunks.vocabulary();
    assert!(peak > logits, "{peak} bytes, and a chunk has {logits}");
}

fn model(dtype: DType, trained: bool) -> Model {
    let device = Device::default().autodiff();
    let shape = [FEATURES, VOCABULARY];
    let weight = Tensor::random(shape, Distribution::Normal(0.0, 0.1), (&device, dtype));
    let weight = Param::from_tensor(weight).set_require_grad(trained);
    Model {
        lm_head: Linear { weight, bias: None },
    }
}

fn bytes(dtype: DType) -> usize {
    dtype.size()
}

/// The rows of which the loss is taken and their gradient, and the gradient of all rows, of which they are a part.
fn gradients(x: DType) -> usize {
    4 * bytes(x) * TOKENS * FEATURES + SMALL
}

fn bound(rank: usize, trained: bool) -> usize {
    HeadChunks::default().largest_temporary(&HeadSize {
        rows: TOKENS,
        features: FEATURES,
        vocabulary: VOCABULARY,
        rank,
        trained,
        threads: rayon::current_num_threads(),
    })
}

/// The peak of a forward and a backward pass above what is there before.
fn measure(head: &Linear, dtype: DType) -> usize {
    let device = Device::default().autodiff();
    let shape = [1, TOKENS + 8, FEATURES];
    let x = Tensor::<3>::random(shape, Distribution::Normal(0.0, 1.0), (&device, dtype));
    let x = x.require_grad();
    let targets = Tensor::<1, Int>::arange(0..TOKENS as i64 + 8, &device).mul_scalar(246);
    let targets: Tensor<2, Int> = targets.unsqueeze();
    // Some rows have no label, so that the others are taken out of all.
    let mask: Tensor<2, Bool> = targets.clone().greater_equal_elem(8 * 246);
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let loss = sft_head_loss(x.clone(), head, targets, mask, &HeadChunks::default()).unwrap();
    let gradients = loss.mean().backward();
    let peak = ALLOCATOR.peak_usage() - before;
    assert!(x.grad(&gradients).is_some());
    peak
}
