//! NF4 on the CPU against Burn's dense product, 4096 x 4096: `cargo bench --bench nf4`.

use std::hint::black_box;

use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use burn_peft::nf4::{Nf4Config, Nf4Weight};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const D: usize = 4096;

fn nf4(c: &mut Criterion) {
    let device = Device::default();
    let dense = Tensor::<2>::random([D, D], Distribution::Normal(0.0, 0.02), &device);
    let weight = Nf4Weight::quantize("w", dense.clone(), &Nf4Config::new()).unwrap();

    let mut group = c.benchmark_group("nf4");
    group.sample_size(10);
    group.throughput(Throughput::Bytes((D * D * size_of::<f32>()) as u64));
    group.bench_function("quantize", |b| {
        b.iter(|| Nf4Weight::quantize("w", black_box(dense.clone()), &Nf4Config::new()).unwrap());
    });
    group.bench_function("dequantize f32", |b| {
        b.iter(|| black_box(&weight).dequantize(FloatDType::F32))
    });
    group.finish();

    let mut group = c.benchmark_group("product by rows");
    group.sample_size(10);
    for rows in [1, 16, 128] {
        let x = Tensor::<2>::random([rows, D], Distribution::Normal(0.0, 1.0), &device);
        group.throughput(Throughput::Elements((2 * rows * D * D) as u64));
        group.bench_with_input(BenchmarkId::new("nf4", rows), &x, |b, x| {
            b.iter(|| weight.matmul(x.clone()))
        });
        group.bench_with_input(BenchmarkId::new("nf4 transposed", rows), &x, |b, x| {
            b.iter(|| weight.matmul_transposed(x.clone()));
        });
        group.bench_with_input(BenchmarkId::new("dense f32", rows), &x, |b, x| {
            b.iter(|| x.clone().matmul(dense.clone()));
        });
    }
    group.finish();
}

criterion_group!(benches, nf4);
criterion_main!(benches);
