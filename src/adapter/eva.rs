//! EVA, factors from the inputs of a layer: `A = V_r`, `B = 0`.
//!
//! Of the inputs `X [rows, d_in] = U·diag(σ)·Vᵀ` that a layer met on a calibration batch, `V_r [d_in, r]` spans the directions with
//! the most of `‖X‖²`: the `j`-th has the share `σ_j² / Σσ²`. Several layers can share their ranks out: the directions with the
//! largest shares are taken, wherever they are.
//!
//! Source: EVA, arXiv:2410.07170.

use burn::tensor::{Device, Tensor};
use faer::Mat;

use super::decompose::{svd, to_device, to_host};
use crate::Result;

/// The directions of a layer's inputs.
pub(crate) struct Directions {
    v: Mat<f32>,
    /// The share of each, falling; 0 for inputs of zero.
    pub shares: Vec<f64>,
}

impl Directions {
    /// Of `inputs [rows, d_in]`, at the layer `name`.
    pub fn new(name: &str, inputs: &Tensor<2>) -> Result<Self> {
        let svd = svd(name, to_host(name, inputs)?.as_ref())?;
        let squares = svd.values.iter().map(|&value| f64::from(value).powi(2));
        let all: f64 = squares.clone().sum();
        let shares = squares.map(|square| if all > 0.0 { square / all } else { 0.0 });
        Ok(Self {
            v: svd.v,
            shares: shares.collect(),
        })
    }

    /// `V_r [d_in, r]`.
    pub fn factor(&self, rank: usize, device: &Device) -> Tensor<2> {
        to_device(self.v.get(.., 0..rank), device)
    }
}

/// How many directions each layer takes if each is due `rank`, and may take at most `most` of those it has: the largest of
/// all. What no layer has is not taken.
pub(crate) fn share_out(shares: &[&[f64]], rank: usize, most: usize) -> Vec<usize> {
    let mut all: Vec<(f64, usize)> = Vec::new();
    for (layer, shares) in shares.iter().enumerate() {
        all.extend(shares.iter().take(most).map(|&share| (share, layer)));
    }
    // Stable: of equal shares the earlier layer's.
    all.sort_by(|(left, _), (right, _)| right.total_cmp(left));
    let mut ranks = vec![0; shares.len()];
    for (_, layer) in all.into_iter().take(rank * shares.len()) {
        ranks[layer] += 1;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_shares_win_up_to_what_a_layer_may_take() {
        let shares: [&[f64]; 3] = [&[0.9, 0.05, 0.05], &[0.4, 0.3, 0.3], &[0.5, 0.25, 0.25]];
        assert_eq!(share_out(&shares, 2, 2), [2, 2, 2]);
        assert_eq!(share_out(&shares, 2, 3), [1, 3, 2]);
        assert_eq!(share_out(&shares, 1, 3), [1, 1, 1]);
        assert_eq!(share_out(&[&[0.2, 0.2], &[0.6, 0.4]], 1, 2), [0, 2]);
        assert_eq!(share_out(&[&[1.0], &[0.6, 0.4]], 3, 6), [1, 2]);
    }
}
