//! The error of NF4 on a normal distribution is what bitsandbytes measured, for every block size.

use burn_peft::nf4::{BlockSize, Nf4Config, Nf4Data};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Block size; mean and standard deviation of the mean absolute error; the same of the mean relative error
/// `|x' - x| / (|x| + 1e-8)`; over 200 matrices of 1024 x 1024 values of N(0, 1). From bitsandbytes'
/// tests/test_functional.py.
const TABLE: [(usize, [f64; 2], [f64; 2]); 8] = [
    (32, [0.067746, 0.000069], [0.189726, 0.000304]),
    (64, [0.072798, 0.000074], [0.203339, 0.000340]),
    (128, [0.076831, 0.000091], [0.215237, 0.000391]),
    (256, [0.080337, 0.000102], [0.226105, 0.000398]),
    (512, [0.083547, 0.000143], [0.236079, 0.000544]),
    (1024, [0.086610, 0.000187], [0.245370, 0.000600]),
    (2048, [0.089592, 0.000251], [0.254163, 0.000747]),
    (4096, [0.092547, 0.000360], [0.262473, 0.000999]),
];

/// Values of N(0, 1), two at a time, by G. Box and M. Muller's transform.
fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut pair = || {
        // 1 - u is in (0, 1], where the logarithm is finite.
        let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
        let (sin, cos) = (rng.random::<f64>() * std::f64::consts::TAU).sin_cos();
        [radius * cos, radius * sin].map(|x| x as f32)
    };
    (0..n / 2).flat_map(|_| pair()).collect()
}

#[test]
fn mean_errors_are_within_seven_deviations_of_those_of_bitsandbytes() {
    let values = normal(1 << 20, 42);
    for (block_size, absolute, relative) in TABLE {
        let config = Nf4Config::new().with_block_size(BlockSize::new(block_size).unwrap());
        let restored = Nf4Data::quantize("normal", &values, [1024, 1024], &config)
            .unwrap()
            .dequantize();
        let (mut abs, mut rel) = (0.0, 0.0);
        for (&x, restored) in values.iter().zip(restored) {
            let error = f64::from((restored - x).abs());
            abs += error;
            rel += error / (f64::from(x.abs()) + 1e-8);
        }
        for (kind, sum, [mean, deviation]) in
            [("absolute", abs, absolute), ("relative", rel, relative)]
        {
            let error = sum / values.len() as f64;
            // Two-sided: an error too small is wrong as well.
            assert!(
                (error - mean).abs() <= 7.0 * deviation,
                "block size {block_size}: mean {kind} error {error}, expected {mean} ± 7 · {deviation}"
            );
        }
    }
}
