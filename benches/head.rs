//! The head of Llama 3 8B with its cross entropy, forward and backward, in chunks and plain: `cargo bench --bench head`.
//!
//! 128 tokens, `4096 -> 128256`, the head frozen. Prints the least time of some runs and the largest number of live bytes above
//! the operands. Needs about 6 GB. Threads: `RAYON_NUM_THREADS`.

mod common;

use std::hint::black_box;
use std::time::Instant;

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{Bool, DType, Device, Int, Tensor};
use burn_peft::model::PeftForward;
use burn_peft::objective::{HeadChunks, sft_head_loss, sft_loss};
use common::{activations, weight};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const TOKENS: usize = 128;
const FEATURES: usize = 4096;
const VOCABULARY: usize = 128_256;
const RUNS: usize = 5;

fn main() {
    let device = Device::default().autodiff();
    for dtype in [DType::BF16, DType::F32] {
        let weight = weight([FEATURES, VOCABULARY], dtype, &device);
        let head = Linear {
            weight: Param::from_tensor(weight).set_require_grad(false),
            bias: None,
        };
        let x = activations([TOKENS, FEATURES], dtype, &device).unsqueeze::<3>();
        let targets = Tensor::<1, Int>::arange(0..TOKENS as i64, &device) * 1000;
        let targets: Tensor<2, Int> = targets.unsqueeze();
        let mask = Tensor::<2, Bool>::full([1, TOKENS], true, &device);
        let inputs = (x, head, targets, mask);
        let (x, head, targets, mask) = inputs.clone();
        let chunks = HeadChunks::default();
        measure(&format!("{dtype:?} in chunks"), move || {
            let x = x.clone().require_grad();
            let loss = sft_head_loss(x, &head, targets.clone(), mask.clone(), &chunks);
            black_box(loss.unwrap().mean().backward());
        });
        let (x, head, targets, mask) = inputs;
        measure(&format!("{dtype:?} plain"), move || {
            let x = x.clone().require_grad();
            let loss = sft_loss(head.forward_peft(x), targets.clone(), mask.clone());
            black_box(loss.unwrap().mean().backward());
        });
    }
}

fn measure(name: &str, mut run: impl FnMut() + Send) {
    let mut least = f64::INFINITY;
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    for _ in 0..RUNS {
        let started = Instant::now();
        rayon::scope(|_| run());
        least = least.min(started.elapsed().as_secs_f64());
    }
    let peak = ALLOCATOR.peak_usage().saturating_sub(before) as f64 / f64::from(1 << 20);
    println!("{name}: {:.0} ms, {peak:.0} MiB", 1e3 * least);
}
