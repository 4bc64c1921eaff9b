//! A step of the optimisers on the factors of a Llama-3-8B, all linear layers at rank 16: 41.9 million values in 448 tensors.

use std::time::{Duration, Instant};

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{DType, Device, Distribution, FloatDType, Tensor};
use burn_peft::optim::{AdamW8bitConfig, F32State};
use criterion::{Criterion, criterion_group, criterion_main};

const LAYERS: usize = 32;
const RANK: usize = 16;
/// q, k, v, o, gate, up, down: `[d_in, d_out]`.
const LINEARS: [[usize; 2]; 7] = [
    [4096, 4096],
    [4096, 1024],
    [4096, 1024],
    [4096, 4096],
    [4096, 14336],
    [4096, 14336],
    [14336, 4096],
];

#[derive(Module, Debug)]
struct Factors {
    all: Vec<Param<Tensor<2>>>,
}

impl Factors {
    fn new(dtype: FloatDType) -> Self {
        let device = Device::default().autodiff();
        let options = (&device, DType::from(dtype));
        let factor = |dims| {
            let values = Tensor::<2>::random(dims, Distribution::Normal(0.0, 0.02), options);
            Param::from_tensor(values)
        };
        let layer = || LINEARS.map(|[d_in, d_out]| [factor([d_in, RANK]), factor([RANK, d_out])]);
        let all = (0..LAYERS).flat_map(|_| layer()).flatten().collect();
        Self { all }
    }

    fn grads(&self) -> GradientsParams {
        struct Grads(GradientsParams);
        impl ModuleVisitor for Grads {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let grad = param.val().inner().mul_scalar(1e-3);
                self.0.register(param.id, grad);
            }
        }
        let mut grads = Grads(GradientsParams::new());
        self.visit(&mut grads);
        grads.0
    }
}

fn step(c: &mut Criterion) {
    let bf16 = FloatDType::BF16;
    let eight = AdamW8bitConfig::new();
    let compensated = F32State::new(AdamWConfig::new().build()).with_compensation(true);
    let cases: [(&str, FloatDType, ModuleOptimizer); 4] = [
        (
            "burn AdamW, f32",
            FloatDType::F32,
            AdamWConfig::new().init(),
        ),
        ("AdamW8bit, f32", FloatDType::F32, eight.init()),
        ("AdamW8bit, bf16", bf16, eight.init()),
        (
            "F32State of burn AdamW, compensated, bf16",
            bf16,
            compensated.init(),
        ),
    ];
    let mut group = c.benchmark_group("step of 41.9 million values");
    group.sample_size(10).warm_up_time(Duration::from_secs(2));
    for (name, dtype, mut optimizer) in cases {
        let mut factors = Some(Factors::new(dtype));
        group.bench_function(name, |b| {
            b.iter_custom(|times| {
                let mut elapsed = Duration::ZERO;
                for _ in 0..times {
                    let module = factors.take().expect("put back below");
                    let grads = module.grads();
                    let start = Instant::now();
                    let module = optimizer.step(1e-4, module, grads);
                    elapsed += start.elapsed();
                    factors = Some(module);
                }
                elapsed
            });
        });
    }
    group.finish();
}

criterion_group!(benches, step);
criterion_main!(benches);
