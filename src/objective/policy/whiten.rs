//! Whitening over all tokens of a batch.

use crate::objective::Ragged;
use crate::{PeftError, Result};

/// `(x − μ)/√(σ² + 1e-8)` over all tokens of a batch, with the unbiased variance (n − 1). With `keep_mean` the mean is added again, as
/// for rewards.
///
/// Whiten the whole batch of a step, before it is cut into micro-batches.
///
/// # Errors
///
/// [`PeftError::Config`] for fewer than two tokens, and for a value that is not finite, which it names.
pub fn whiten(values: &Ragged, keep_mean: bool) -> Result<Ragged> {
    values.check_finite("values")?;
    let tokens = values.tokens();
    if tokens < 2 {
        return Err(PeftError::config(
            "tokens to whiten",
            tokens,
            "at least 2, as one has no variance",
        ));
    }
    let all = || values.values().iter().map(|value| f64::from(*value));
    let mean = all().sum::<f64>() / tokens as f64;
    let variance = all().map(|x| (x - mean).powi(2)).sum::<f64>() / (tokens - 1) as f64;
    let scale = 1.0 / (variance + 1e-8).sqrt();
    let shift = if keep_mean { mean } else { 0.0 };
    let whitened = all().map(|x| ((x - mean) * scale + shift) as f32);
    Ok(values.with_values(whitened.collect()))
}
