//! A whole training step of a small Llama, from tokens to updated adapters: `cargo bench --bench train_step`.
//!
//! Hidden width 512, 8 blocks, 2 x 256 tokens, rank 16 on every linear layer, AdamW; see `common/train_step.rs`.

mod common;

use burn::tensor::FloatDType;
use common::train_step::{BATCH, SEQ, train_step};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("train step");
    group.sample_size(10);
    group.throughput(Throughput::Elements((BATCH * SEQ) as u64));
    for (name, packed, dtype) in [
        ("QLoRA", true, FloatDType::F32),
        ("QLoRA bf16", true, FloatDType::BF16),
        ("LoRA", false, FloatDType::F32),
    ] {
        let mut step = train_step(packed, dtype);
        group.bench_function(name, |b| b.iter(&mut step));
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
