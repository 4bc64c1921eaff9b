//! Noise on the embeddings of a batch in training.

use burn::tensor::{Tensor, TensorData};

use crate::splitmix::Stream;
use crate::{PeftError, Result};

/// NEFTune: `e + U(−m, m)` with `m = α / √(seq·features)` (N. Jain et al., <https://arxiv.org/abs/2310.05914>), for embeddings `e [batch,
/// seq, features]`, of which `seq` is the padded length, as in TRL. Papers take `α` from 5 to 15.
///
/// Call it in training only, between the embedding and the first block. The same `seed` gives the same noise on every backend: make it of
/// the seed of the run and the step.
///
/// # Errors
///
/// [`PeftError::Config`] for an `α` that is negative or not finite.
pub fn neftune(embedded: Tensor<3>, alpha: f64, seed: u64) -> Result<Tensor<3>> {
    if !(alpha.is_finite() && alpha >= 0.0) {
        return Err(PeftError::config(
            "neftune alpha",
            alpha,
            "a number from 0 on, in papers from 5 to 15",
        ));
    }
    let dims @ [batch, seq, features] = embedded.dims();
    if alpha == 0.0 || dims.contains(&0) {
        return Ok(embedded);
    }
    let size = alpha / ((seq * features) as f64).sqrt();
    let mut stream = Stream(seed);
    // In [0, 1).
    let mut unit = || (stream.next() >> 11) as f64 / (1_u64 << 53) as f64;
    let noise: Vec<f32> = (0..batch * seq * features)
        .map(|_| (size * (2.0 * unit() - 1.0)) as f32)
        .collect();
    let data = TensorData::new(noise, dims);
    let noise = Tensor::<3>::from_data(data, (&embedded.device(), embedded.dtype()));
    Ok(embedded + noise)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn noise_is_uniform_bounded_and_that_of_its_seed() {
        let device = Device::default();
        let embedded = Tensor::<3>::ones([4, 25, 16], &device);
        let noise = |seed| -> Vec<f32> {
            let noisy = neftune(embedded.clone(), 5.0, seed).unwrap() - embedded.clone();
            noisy.try_into_vec_as().unwrap()
        };
        let found = noise(3);
        assert_eq!(found, noise(3));
        assert_ne!(found, noise(4));
        // 5 / √(25 · 16).
        let size = 0.25;
        assert!(found.iter().all(|x| x.abs() <= size));
        let mean = |f: &dyn Fn(f32) -> f32| found.iter().map(|&x| f(x)).sum::<f32>() / 1600.0;
        // Four standard deviations of the mean of 1600 values, and of their squares.
        assert!(mean(&|x| x).abs() < 4.0 * size / 3_f32.sqrt() / 40.0);
        assert!((mean(&|x| x * x) / (size * size) - 1.0 / 3.0).abs() < 0.03);
    }

    #[test]
    fn alpha_is_checked() {
        let embedded = Tensor::<3>::ones([1, 2, 2], &Device::default());
        for alpha in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(neftune(embedded.clone(), alpha, 0).is_err());
        }
    }
}
