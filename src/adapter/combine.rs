//! One low-rank change from several: `A_1·B_1, …, A_n·B_n` with the weights `w_i` become one `A·B` of scale 1.
//!
//! All but [`Combination::Cat`] combine the factors apart here, `A` from the `A_i` and `B` from the `B_i`, with `√|w_i·s_i|` on either
//! side and the sign of `w_i·s_i` on the side of `A`. Since `(ΣA_i)·(ΣB_i)` has the mixed terms `A_i·B_j` too, that is not
//! `Σ w_i·s_i·A_i·B_i`: cheap, as Python's PEFT has it, and not exact. `Cat` is exact, at the sum of the ranks. Combining the changes in
//! place of their factors, and cutting the result to a rank, is `combine_svd`'s (feature `faer`).
//!
//! The result has the scale 1. (In PEFT it inherits rsLoRA from the first adapter, and with it a scale of `√r` that no weight asked
//! for; that is not copied.)
//!
//! Sources: TIES, arXiv:2306.01708; DARE, arXiv:2311.03099; the formulas are those of Hugging Face PEFT 0.21.

use burn::tensor::{Distribution, FloatDType, IndexingUpdateOp, Tensor};

use super::{Lora, LoraConfig, cast, side_by_side};
use crate::{PeftError, Result};

/// How several low-rank changes become one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Combination {
    /// `A = [A_1 … A_n]`, `B = [w_1·s_1·B_1; …]`: exactly the weighted sum, of the sum of the ranks.
    Cat,
    /// The weighted sums of the factors; inexact by the mixed terms.
    Linear,
    /// TIES: of each factor the share `density` of largest magnitude; then, value by value, the mean of those that have the
    /// elected sign.
    Ties {
        /// Share of the values that is kept, in `(0, 1]`.
        density: f64,
        /// How signs are elected.
        sign: MajoritySign,
    },
    /// DARE: each value is kept with the probability `density` and divided by it; then as [`Linear`](Self::Linear).
    DareLinear {
        /// Probability of keeping a value, in `(0, 1]`.
        density: f64,
    },
    /// DARE, then the signs and means of [`Ties`](Self::Ties).
    DareTies {
        /// Probability of keeping a value, in `(0, 1]`.
        density: f64,
        /// How signs are elected.
        sign: MajoritySign,
    },
    /// Of each factor the share `density` of largest magnitude; then as [`Linear`](Self::Linear).
    MagnitudePrune {
        /// Share of the values that is kept, in `(0, 1]`.
        density: f64,
    },
}

/// How the sign of a value is elected among several; that of a tie is plus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MajoritySign {
    /// The sign of their sum: PEFT's `"total"`.
    #[default]
    Total,
    /// The sign that most of them have: PEFT's `"frequency"`.
    Frequency,
}

impl Combination {
    /// Combines the changes of one module into one of scale 1, with the dropout of the first.
    ///
    /// # Errors
    ///
    /// [`PeftError::Config`] for no changes at all, for a weight that is not finite, for a density out of range, for ranks that
    /// differ (but in [`Cat`](Self::Cat)), and for DoRA, whose change is not of low rank; [`PeftError::Shape`] for changes of different maps.
    pub fn combine(&self, changes: &[(&Lora, f64)]) -> Result<Lora> {
        let changes = changes
            .iter()
            .map(|(lora, weight)| (lora.converted(), *weight));
        let changes: Vec<_> = changes.collect();
        let changes: Vec<_> = changes
            .iter()
            .map(|(lora, weight)| (lora, *weight))
            .collect();
        self.check(&changes)?;
        let (first, _) = changes[0];
        let (a, b) = match self {
            Self::Cat => side_by_side(&changes),
            _ => {
                let weights = changes.iter().map(|(lora, weight)| weight * lora.scale());
                let (a, b): (Vec<_>, Vec<_>) = changes
                    .iter()
                    .zip(weights)
                    .map(|((lora, _), weight)| {
                        let root = weight.abs().sqrt();
                        let side = |factor, root| (cast(factor, FloatDType::F32), root);
                        (
                            side(lora.a.val().detach(), root.copysign(weight)),
                            side(lora.b.val().detach(), root),
                        )
                    })
                    .unzip();
                let dtype = first.a.val().dtype().into();
                (
                    cast(self.of_values(a), dtype),
                    cast(self.of_values(b), dtype),
                )
            }
        };
        let rank = a.dims()[1];
        LoraConfig::new(rank)
            .with_alpha(rank as f64)
            .with_dropout(first.dropout.prob)
            .with_factors(a, b)
    }

    fn check(&self, changes: &[(&Lora, f64)]) -> Result<()> {
        let error = |name: &str, value: String, expected: String| {
            Err(PeftError::config(name, value, expected))
        };
        let Some((first, _)) = changes.first() else {
            return error("adapters to combine", "none".into(), "at least one".into());
        };
        for (lora, _) in changes {
            if lora.magnitude.is_some() {
                return error(
                    "dora",
                    "true".into(),
                    "plain LoRA, a low-rank change".into(),
                );
            }
            if lora.dims() != first.dims() {
                return Err(PeftError::Shape {
                    tensor: "s·A·B".into(),
                    expected: first.dims().into(),
                    found: lora.dims().into(),
                });
            }
            if lora.rank() != first.rank() && *self != Self::Cat {
                let expected = format!(
                    "{}, as the first has: only `Cat` and an SVD mix ranks",
                    first.rank()
                );
                return error("rank", lora.rank().to_string(), expected);
            }
        }
        let weights = changes.iter().map(|(_, weight)| *weight);
        self.check_numbers(weights)
    }

    /// Weights and density are numbers in their ranges.
    pub(super) fn check_numbers(&self, mut weights: impl Iterator<Item = f64>) -> Result<()> {
        let (name, value, expected) = if let Some(weight) = weights.find(|w| !w.is_finite()) {
            ("weight", weight, "a finite number")
        } else {
            match self.density() {
                Some(density) if !(density > 0.0 && density <= 1.0) => {
                    ("density", density, "a share in (0, 1]")
                }
                _ => return Ok(()),
            }
        };
        Err(PeftError::config(name, value, expected))
    }

    fn density(&self) -> Option<f64> {
        match *self {
            Self::Cat | Self::Linear => None,
            Self::Ties { density, .. }
            | Self::DareLinear { density }
            | Self::DareTies { density, .. }
            | Self::MagnitudePrune { density } => Some(density),
        }
    }

    /// One matrix from those of all changes with their weights, f32, value by value: a factor, or a change itself.
    pub(super) fn of_values(&self, factors: Vec<(Tensor<2>, f64)>) -> Tensor<2> {
        let (kept, weights): (Vec<_>, Vec<_>) = factors
            .into_iter()
            .map(|(factor, weight)| {
                let factor = match *self {
                    Self::Cat | Self::Linear => factor,
                    Self::Ties { density, .. } | Self::MagnitudePrune { density } => {
                        largest(factor, density)
                    }
                    Self::DareLinear { density } | Self::DareTies { density, .. } => {
                        drop_at_random(factor, density)
                    }
                };
                (factor, weight)
            })
            .unzip();
        match self {
            Self::Ties { sign, .. } | Self::DareTies { sign, .. } => {
                disjoint_mean(kept, &weights, *sign)
            }
            _ => weighted(kept, &weights)
                .reduce(|sum, next| sum + next)
                .expect("one at least"),
        }
    }
}

fn weighted(factors: Vec<Tensor<2>>, weights: &[f64]) -> impl Iterator<Item = Tensor<2>> {
    let pairs = factors.into_iter().zip(weights);
    pairs.map(|(factor, &weight)| factor.mul_scalar(weight))
}

/// The share `density` of the values that is largest in magnitude, rounded down; the others are zero.
fn largest(factor: Tensor<2>, density: f64) -> Tensor<2> {
    if density >= 1.0 {
        return factor;
    }
    let dims = factor.dims();
    let values = factor.reshape([-1]);
    let most = (density * values.dims()[0] as f64) as usize;
    if most == 0 {
        return values.zeros_like().reshape(dims);
    }
    let (_, places) = values.clone().abs().topk_with_indices(most, 0);
    let kept = values.clone().select(0, places.clone());
    let none = values.zeros_like();
    none.select_assign(0, places, kept, IndexingUpdateOp::Add)
        .reshape(dims)
}

/// Every value with the probability `density`, divided by it; the others are zero.
fn drop_at_random(factor: Tensor<2>, density: f64) -> Tensor<2> {
    if density >= 1.0 {
        return factor;
    }
    let kept = factor.random_like(Distribution::Bernoulli(density));
    factor * kept.div_scalar(density)
}

/// For each value, the mean over those factors of which it has the elected sign, each with its weight.
fn disjoint_mean(factors: Vec<Tensor<2>>, weights: &[f64], sign: MajoritySign) -> Tensor<2> {
    let votes = factors.iter().map(|factor| match sign {
        MajoritySign::Total => factor.clone(),
        MajoritySign::Frequency => factor.clone().sign(),
    });
    let elected = votes.reduce(|sum, next| sum + next).expect("one at least");
    let elected = elected
        .greater_equal_elem(0.0)
        .float()
        .mul_scalar(2.0)
        .sub_scalar(1.0);
    // A zero has neither sign.
    let masks: Vec<Tensor<2>> = factors
        .iter()
        .map(|factor| {
            let elected = cast(elected.clone(), factor.dtype().into());
            factor.clone().sign().equal(elected).float()
        })
        .collect();
    let count = masks.iter().cloned().reduce(|sum, next| sum + next);
    let sum = weighted(factors, weights)
        .zip(masks)
        .map(|(factor, mask)| factor * mask)
        .reduce(|sum, next| sum + next);
    sum.expect("one at least") / count.expect("one at least").clamp_min(1.0)
}
