//! NF4 on the CPU: `cargo bench --bench nf4`.
//!
//! Against Burn's dense f32 product in both orientations of the weight, and, for what only moves memory, against a copy
//! of as many bytes. Threads: `RAYON_NUM_THREADS`.

mod common;

use std::hint::black_box;
use std::time::Duration;

use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_peft::nf4::{Nf4Config, Nf4Data, Nf4Weight};
use common::{activations, weight};
use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use rayon::prelude::*;

/// `[d_in, d_out]`.
const SIZES: [[usize; 2]; 3] = [[512, 512], [4096, 4096], [4096, 14336]];

const ROWS: [usize; 8] = [1, 2, 4, 8, 16, 64, 128, 512];

const SCALES: [(&str, bool); 2] = [("plain", false), ("double", true)];

const DTYPES: [(&str, DType); 2] = [("f32", DType::F32), ("bf16", DType::BF16)];

fn name([d_in, d_out]: [usize; 2]) -> String {
    format!("{d_in}x{d_out}")
}

fn config(double: bool) -> Nf4Config {
    Nf4Config::new().with_double_quant(double)
}

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    // Many small groups: the default times would add up to an hour.
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_millis(1500));
    group
}

/// What a kernel that only moves memory can reach.
fn copy(c: &mut Criterion) {
    let mut group = group(c, "copy of the f32 weight");
    for size in SIZES {
        let len = size[0] * size[1];
        let (from, mut to) = (vec![1f32; len], vec![0f32; len]);
        let part = len.div_ceil(rayon::current_num_threads());
        group.throughput(Throughput::Bytes((len * size_of::<f32>()) as u64));
        group.bench_function(name(size), |b| {
            b.iter(|| {
                black_box(&mut to)
                    .par_chunks_mut(part)
                    .zip(black_box(&from).par_chunks(part))
                    .for_each(|(to, from)| to.copy_from_slice(from));
            })
        });
    }
    group.finish();
}

/// From a slice in bitsandbytes' layout, and from a Burn tensor `[d_in, d_out]`, which is transposed on the way.
fn quantize(c: &mut Criterion) {
    let device = Device::default();
    let mut group = group(c, "quantize");
    for size in SIZES {
        let [d_in, d_out] = size;
        let dense = weight(size, DType::F32, &device);
        let values: Vec<f32> = dense.to_data().try_into_vec().expect("f32 was asked for");
        group.throughput(Throughput::Bytes(size_of_val(values.as_slice()) as u64));
        for (scales, double) in SCALES {
            let config = config(double);
            group.bench_function(
                BenchmarkId::new(format!("slice {scales}"), name(size)),
                |b| {
                    b.iter(|| Nf4Data::quantize("weight", &values, [d_out, d_in], &config).unwrap())
                },
            );
            group.bench_function(
                BenchmarkId::new(format!("tensor {scales}"), name(size)),
                |b| b.iter(|| Nf4Weight::quantize("weight", dense.clone(), &config).unwrap()),
            );
        }
    }
    group.finish();
}

/// Throughput counts what is written.
fn dequantize(c: &mut Criterion) {
    let device = Device::default();
    let mut group = group(c, "dequantize");
    for size in SIZES {
        let dense = weight(size, DType::F32, &device);
        for (scales, double) in SCALES {
            let packed = Nf4Weight::quantize("weight", dense.clone(), &config(double)).unwrap();
            for (dtype, to) in DTYPES {
                group.throughput(Throughput::Bytes((size[0] * size[1] * to.size()) as u64));
                let id = BenchmarkId::new(format!("{dtype} {scales}"), name(size));
                group.bench_function(id, |b| {
                    b.iter(|| black_box(&packed).dequantize(FloatDType::from(to)))
                });
            }
        }
    }
    group.finish();
}

/// `x·Wᵀ` and `y·W` by the number of rows; throughput counts floating-point operations.
///
/// A small weight stays in the cache between two runs, as it does not in a model.
fn products(c: &mut Criterion) {
    let device = Device::default();
    for size in SIZES {
        let [d_in, d_out] = size;
        let dense = weight(size, DType::F32, &device);
        let view = weight([d_out, d_in], DType::F32, &device).transpose();
        let packed = SCALES.map(|(scales, double)| {
            let packed = Nf4Weight::quantize("weight", dense.clone(), &config(double));
            (scales, packed.unwrap())
        });
        let mut group = group(c, &format!("product {}", name(size)));
        for rows in ROWS {
            group.throughput(Throughput::Elements((2 * rows * d_in * d_out) as u64));
            for (dtype, to) in DTYPES {
                let x = activations([rows, d_in], to, &device);
                let y = activations([rows, d_out], to, &device);
                for (scales, packed) in &packed {
                    let id = BenchmarkId::new(format!("nf4 {dtype} {scales}"), rows);
                    group.bench_function(id, |b| b.iter(|| packed.matmul(x.clone())));
                    let id = BenchmarkId::new(format!("nf4 transposed {dtype} {scales}"), rows);
                    group.bench_function(id, |b| b.iter(|| packed.matmul_transposed(y.clone())));
                }
            }
            let x = activations([rows, d_in], DType::F32, &device);
            for (orientation, dense) in [("rows", &dense), ("view", &view)] {
                let id = BenchmarkId::new(format!("dense f32 {orientation}"), rows);
                group.bench_function(id, |b| b.iter(|| product(&x, dense)));
            }
        }
        group.finish();
    }
}

fn product(x: &Tensor<2>, dense: &Tensor<2>) -> Tensor<2> {
    x.clone().matmul(dense.clone())
}

criterion_group!(benches, copy, quantize, dequantize, products);
criterion_main!(benches);
