//! One linear layer in every way it can be trained, forward and forward with backward: `cargo bench --bench layers`.
//!
//! Against the frozen dense layer, which is what any adapter comes on top of, and Burn's own `apply_lora` and
//! `apply_qlora` (four bits). Rank 16. Threads: `RAYON_NUM_THREADS`.

mod common;

use std::hint::black_box;

use burn::tensor::{DType, Device};
use common::activations;
use common::layer::{Layer, Method};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const RANK: usize = 16;

/// `[d_in, d_out]` and tokens.
const SIZES: [([usize; 2], usize); 4] = [
    ([512, 512], 64),
    ([4096, 4096], 128),
    ([4096, 4096], 512),
    ([4096, 14336], 128),
];

const WAYS: [(&str, Method, DType); 10] = [
    ("frozen dense", Method::Frozen, DType::F32),
    ("LoraLinear", Method::Lora, DType::F32),
    ("QLoraLinear", Method::QLora, DType::F32),
    ("QLoraLinear double", Method::QLoraDouble, DType::F32),
    ("QLoraLinear bf16", Method::QLora, DType::BF16),
    ("QLoraLinear double bf16", Method::QLoraDouble, DType::BF16),
    ("DoRA", Method::Dora, DType::F32),
    ("DoRA, NF4", Method::QDora, DType::F32),
    ("apply_lora", Method::BurnLora, DType::F32),
    ("apply_qlora", Method::BurnQLora, DType::F32),
];

fn layers(c: &mut Criterion) {
    let device = Device::default().autodiff();
    for (dims, tokens) in SIZES {
        let [d_in, d_out] = dims;
        let size = format!("{d_in}x{d_out}, {tokens} tokens");
        for (name, method, dtype) in WAYS {
            let layer = Layer::new(method, dims, RANK, &device);
            let x = activations([tokens, d_in], dtype, &device);

            let mut group = c.benchmark_group("forward");
            group.sample_size(10);
            group.throughput(Throughput::Elements(tokens as u64));
            group.bench_function(BenchmarkId::new(name, &size), |b| {
                b.iter(|| black_box(layer.forward(x.clone())))
            });
            group.finish();

            let mut group = c.benchmark_group("forward and backward");
            group.sample_size(10);
            group.throughput(Throughput::Elements(tokens as u64));
            group.bench_function(BenchmarkId::new(name, &size), |b| {
                b.iter(|| layer.forward_backward(&x))
            });
            group.finish();
        }
    }
}

criterion_group!(benches, layers);
criterion_main!(benches);
