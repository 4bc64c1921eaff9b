//! The loss of a value head.

use burn::tensor::Tensor;

use crate::objective::log_probs::beside;
use crate::objective::{Loss, Ragged, read, segments};
use crate::tensor::constant;
use crate::{PeftError, Result};

/// The loss of one (micro-)batch of values.
#[derive(Clone, Debug)]
pub struct ValueLoss {
    /// `½·Σ max(..)`, counted in tokens.
    pub loss: Loss,
    clipped: Option<Tensor<1>>,
    new: Tensor<1>,
    returns: Ragged,
}

/// Numbers over a batch of values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ValueMetrics {
    /// The share of tokens whose clipped error is the larger one.
    pub clip_fraction: f32,
    /// The mean value.
    pub mean: f32,
    /// The mean of `(V − R)²`.
    pub error: f32,
    /// `1 − var(R − V)/var(R)`; none where all returns are equal.
    pub explained_variance: Option<f32>,
}

/// The squared error of values, by which a value head learns the returns.
///
/// ```text
/// loss = ½·Σ_t max( (V_t − R_t)², (clip(V_t, V^old_t ± ε) − R_t)² )
/// ```
///
/// - `new`: `[tokens]`, read at the hidden state that predicts each token, with their gradient
/// - `old`: by the head before the first step on these samples
/// - `clip`: ε, 0.2 in TRL; none leaves the second error out
///
/// # Errors
///
/// [`PeftError::Config`] where they are of other sequences, for a number that is not finite (it names it), and for a bound that is not
/// above 0; [`PeftError::Shape`] where `new` has another count of tokens.
pub fn value_loss(
    new: Tensor<1>,
    old: &Ragged,
    returns: &Ragged,
    clip: Option<f64>,
) -> Result<ValueLoss> {
    segments::same_count("new values", new.dims()[0], returns.tokens())?;
    segments::same_lens("old values", old.lens(), returns.lens())?;
    old.check_finite("old values")?;
    returns.check_finite("returns")?;
    let host = |values: &[f32]| {
        let values = values.iter().map(|value| f64::from(*value));
        beside(segments::host(values.collect(), &new), &new)
    };
    let target = host(returns.values());
    let mut errors = (new.clone() - target.clone()).square();
    let mut clipped = None;
    if let Some(clip) = clip {
        if !(clip.is_finite() && clip > 0.0) {
            return Err(PeftError::config("clip", clip, "a finite number above 0"));
        }
        let old = host(old.values());
        let near = old.clone() + (new.clone() - old).clamp(-clip, clip);
        let near = (near - target).square();
        let larger = near.clone().greater(errors.clone());
        clipped = Some(constant(crate::tensor::cast(
            larger.float(),
            new.dtype().into(),
        )));
        errors = errors.max_pair(near);
    }
    Ok(ValueLoss {
        loss: Loss {
            sum: errors.sum() * 0.5,
            count: returns.tokens(),
        },
        clipped,
        new: constant(new),
        returns: returns.clone(),
    })
}

impl ValueLoss {
    /// The numbers to log. Waits for the device.
    ///
    /// # Errors
    ///
    /// [`PeftError::DeviceRead`] when the device fails.
    pub fn metrics(&self) -> Result<ValueMetrics> {
        let values = read("values", self.new.clone())?;
        let clip_fraction = match &self.clipped {
            None => 0.0,
            Some(clipped) => read("clipped", clipped.clone().mean())?[0],
        };
        let tokens = values.len() as f64;
        let pairs = || values.iter().zip(self.returns.values());
        let error = pairs().map(|(v, r)| (f64::from(*v) - f64::from(*r)).powi(2));
        Ok(ValueMetrics {
            clip_fraction,
            mean: (values.iter().map(|v| f64::from(*v)).sum::<f64>() / tokens) as f32,
            error: (error.sum::<f64>() / tokens) as f32,
            explained_variance: explained(&values, self.returns.values()),
        })
    }
}

/// `1 − var(R − V)/var(R)`: how much of the returns' spread the values tell; none where all returns are equal.
///
/// # Errors
///
/// [`PeftError::Config`] where both are of other sequences.
pub fn explained_variance(values: &Ragged, returns: &Ragged) -> Result<Option<f32>> {
    segments::same_lens("values", values.lens(), returns.lens())?;
    Ok(explained(values.values(), returns.values()))
}

fn explained(values: &[f32], returns: &[f32]) -> Option<f32> {
    let variance = |x: &mut dyn Iterator<Item = f64>| {
        let x: Vec<f64> = x.collect();
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        x.iter().map(|x| (x - mean).powi(2)).sum::<f64>()
    };
    let of_returns = variance(&mut returns.iter().map(|r| f64::from(*r)));
    let errors = returns.iter().zip(values);
    let of_errors = variance(&mut errors.map(|(r, v)| f64::from(*r) - f64::from(*v)));
    (of_returns > 0.0).then(|| (1.0 - of_errors / of_returns) as f32)
}
