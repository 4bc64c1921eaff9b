//! The learning rate over a run: a linear warm-up, then half a cosine.
//!
//! `lr(t) = peak · min(1, t / warmup) · (1 + cos(π t / steps)) / 2`, `t` from 1 to `steps`.

/// The learning rate of step `t`.
pub fn learning_rate(peak: f64, t: usize, steps: usize, warmup: usize) -> f64 {
    let rise = (t as f64 / warmup.max(1) as f64).min(1.0);
    let fall = 0.5 * (1.0 + (std::f64::consts::PI * t as f64 / steps.max(1) as f64).cos());
    peak * rise * fall
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_then_falls_to_zero() {
        // One rounding or two of f64.
        let near = |a: f64, b: f64| (a - b).abs() < 1e-15;
        let lr = |t| learning_rate(2.0, t, 100, 10);
        assert!(near(
            lr(5),
            0.5 * 2.0 * 0.5 * (1.0 + (0.05 * std::f64::consts::PI).cos())
        ));
        assert!(near(lr(50), 1.0));
        assert!(near(lr(100), 0.0));
        assert!(lr(1) < lr(10) && lr(10) > lr(60));
    }
}
