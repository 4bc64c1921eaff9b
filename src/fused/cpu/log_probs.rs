//! `log softmax(z)[label]` of rows whose logits come a chunk of the vocabulary at a time, what else is asked of a row, and its gradient.
//!
//! A row keeps the largest logit `m` and sums of `e^(z − m)`, and is brought up to date with each chunk (M. Milakov, N. Gimelshein,
//! "Online normalizer calculation for softmax", <https://arxiv.org/abs/1805.02867>).

use super::element::{LANES, exp, max, sum};
use crate::cpu::parallel::for_each_chunk;
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch};

/// Steps that a logit costs, against one multiply-add.
const COST: usize = 8;

/// What has been seen of a row's logits `z`. With `m` the largest and `e_j = e^(z_j − m)`:
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    /// `m`.
    largest: f32,
    /// `Σ e_j`.
    sum: f32,
    /// The label's logit, once it has been seen.
    label: f32,
    more: Moments,
}

/// Sums that only the statistics need.
#[derive(Clone, Copy, Debug, Default)]
struct Moments {
    /// `Σ (z_j − m)·e_j`.
    weighted: f32,
    /// `Σ e_j²`.
    squares: f32,
    /// `Σ (z_j − m)`.
    plain: f32,
    /// Logits.
    seen: f32,
}

impl Running {
    /// Of nothing.
    pub(crate) const EMPTY: Self = Self {
        largest: f32::NEG_INFINITY,
        sum: 0.0,
        label: f32::NAN,
        more: Moments {
            weighted: 0.0,
            squares: 0.0,
            plain: 0.0,
            seen: 0.0,
        },
    };

    /// `log p` of the label, of a whole row.
    pub(crate) fn log_prob(&self) -> f32 {
        // The difference first: its rounding is that of the result, not that of large logits.
        self.label - self.largest - self.sum.ln()
    }

    /// `m` and `Σ e_j`, which backward needs.
    pub(crate) fn partition(&self) -> [f32; 2] {
        [self.largest, self.sum]
    }

    /// The entropy `−Σ p·ln p`, the mean `(1/V)·Σ ln p`, `ln Σ p²`, and 1 where no token has a larger logit than the label, else 0.
    pub(crate) fn statistics(&self) -> [f32; 4] {
        let Moments {
            weighted,
            squares,
            plain,
            seen,
        } = self.more;
        let log = self.sum.ln();
        [
            log - weighted / self.sum,
            plain / seen - log,
            squares.ln() - 2.0 * log,
            f32::from(u8::from(self.label >= self.largest)),
        ]
    }
}

/// Takes in the logits of `width` tokens from `first` on, `z [rows, width]`, of rows with these labels. What
/// [`statistics`](Running::statistics) gives is right only if `statistics` is true for every chunk.
pub(crate) fn extend(
    isa: Isa,
    z: &[f32],
    width: usize,
    first: usize,
    labels: &[usize],
    running: &mut [Running],
    statistics: bool,
) {
    let rows = running.len();
    assert_eq!((z.len(), labels.len()), (rows * width, rows));
    for_each_chunk(running, 1, COST * z.len(), |row, running| {
        let z = &z[row * width..][..width];
        for running in running {
            let before = *running;
            *running = match statistics {
                true => dispatch(isa, Extended::<true> { z, before }),
                false => dispatch(isa, Extended::<false> { z, before }),
            };
            if let Some(label) = within(labels[row], first, width) {
                running.label = z[label];
            }
        }
    });
}

/// The place of a label among `width` tokens from `first` on, if it is one of them.
fn within(label: usize, first: usize, width: usize) -> Option<usize> {
    label.checked_sub(first).filter(|&label| label < width)
}

struct Extended<'a, const STATISTICS: bool> {
    z: &'a [f32],
    before: Running,
}

impl<const STATISTICS: bool> Kernel for Extended<'_, STATISTICS> {
    type Output = Running;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Running {
        let Self { z, before } = self;
        let largest = max(z).max(before.largest);
        // Nothing was summed where nothing has been seen; the difference is no number there.
        let (kept, less) = match before.sum == 0.0 {
            true => (0.0, 0.0),
            false => (exp(before.largest - largest), before.largest - largest),
        };
        // A token without any probability is nothing, also among others, if none of them has been seen.
        let exponential = |z: f32| match z == f32::NEG_INFINITY {
            true => 0.0,
            false => exp(z - largest),
        };
        if !STATISTICS {
            return Running {
                largest,
                sum: before.sum * kept + sum([z], |[z]| exponential(z)),
                ..before
            };
        }
        let here = moments(z, largest, exponential);
        let old = before.more;
        Running {
            largest,
            sum: before.sum * kept + here.0,
            label: before.label,
            more: Moments {
                weighted: (old.weighted + less * before.sum) * kept + here.1.weighted,
                squares: old.squares * kept * kept + here.1.squares,
                plain: old.plain + old.seen * less + here.1.plain,
                seen: old.seen + here.1.seen,
            },
        }
    }
}

/// `Σ e_j`, and the other sums of a chunk.
#[inline(always)]
fn moments(z: &[f32], largest: f32, exponential: impl Fn(f32) -> f32) -> (f32, Moments) {
    let mut sums = [[0.0_f32; LANES]; 4];
    let mut add = |lane: usize, z: f32| {
        let e = exponential(z);
        let less = match z == f32::NEG_INFINITY {
            true => z,
            false => z - largest,
        };
        sums[0][lane] += e;
        // Of a token that is ruled out the product is no number.
        sums[1][lane] += if e == 0.0 { 0.0 } else { less * e };
        sums[2][lane] += e * e;
        sums[3][lane] += less;
    };
    let (chunks, rest) = z.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &z) in chunk.iter().enumerate() {
            add(lane, z);
        }
    }
    for (lane, &z) in rest.iter().enumerate() {
        add(lane, z);
    }
    let [sum, weighted, squares, plain] = sums.map(|lanes| lanes.iter().sum());
    let seen = z.len() as f32;
    (
        sum,
        Moments {
            weighted,
            squares,
            plain,
            seen,
        },
    )
}

/// The gradients that come to one row, and what its gradient needs of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Upstream {
    /// `m` and `Σ e^(z − m)`.
    pub(crate) partition: [f32; 2],
    /// Of `log p[label]`.
    pub(crate) log_prob: f32,
    /// Of the entropy.
    pub(crate) entropy: f32,
    /// Of the mean `(1/V)·Σ ln p`.
    pub(crate) mean: f32,
    /// The entropy.
    pub(crate) own_entropy: f32,
    /// `V`.
    pub(crate) vocabulary: f32,
}

/// `dz = g·([label] − p) − h·p·(ln p + H) + q·(1/V − p)`, times `scale`, in the place of `z`, with `g`, `h`, `q` the gradients of `log p`,
/// the entropy `H` and the mean of `ln p`; the other arguments are those of [`extend`].
pub(crate) fn differentiate(
    isa: Isa,
    z: &mut [f32],
    width: usize,
    first: usize,
    labels: &[usize],
    rows: &[Upstream],
    scale: f32,
) {
    assert_eq!((z.len(), labels.len()), (rows.len() * width, rows.len()));
    let work = COST * z.len();
    for_each_chunk(z, width, work, |row, z| {
        let (label, up) = (within(labels[row], first, width), rows[row]);
        let task = Differentiated {
            z,
            up,
            label,
            scale,
        };
        dispatch(isa, task);
    });
}

struct Differentiated<'a> {
    z: &'a mut [f32],
    up: Upstream,
    label: Option<usize>,
    scale: f32,
}

impl Kernel for Differentiated<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self {
            z,
            up,
            label,
            scale,
        } = self;
        let [largest, sum] = up.partition;
        if up.entropy == 0.0 && up.mean == 0.0 {
            let factor = -up.log_prob * scale / sum;
            for z in z.iter_mut() {
                *z = exp(*z - largest) * factor;
            }
        } else {
            let (log, even) = (sum.ln(), up.mean * scale / up.vocabulary);
            let constant = up.log_prob + up.mean + up.entropy * (up.own_entropy - log);
            let factor = -scale / sum;
            for z in z.iter_mut() {
                let less = *z - largest;
                let e = exp(less);
                // Of a token that is ruled out the product is no number.
                let weighted = if e == 0.0 {
                    0.0
                } else {
                    e * (constant + up.entropy * less)
                };
                *z = weighted * factor + even;
            }
        }
        if let Some(label) = label {
            z[label] += up.log_prob * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chunks of every width give the sums of the row, in f64.
    #[test]
    fn statistics_do_not_depend_on_the_chunks() {
        let z: Vec<f32> = (0..101)
            .map(|j| ((j * 37) % 101) as f32 / 9.0 - 4.0)
            .collect();
        let wide: Vec<f64> = z.iter().map(|&z| f64::from(z)).collect();
        let sum: f64 = wide.iter().map(|z| z.exp()).sum();
        let log_p: Vec<f64> = wide.iter().map(|z| z - sum.ln()).collect();
        let entropy: f64 = log_p.iter().map(|l| -l.exp() * l).sum();
        let mean = log_p.iter().sum::<f64>() / 101.0;
        let squares: f64 = log_p.iter().map(|l| (2.0 * l).exp()).sum();
        for width in [1, 7, 16, 50, 101] {
            let mut running = [Running::EMPTY];
            for (index, z) in z.chunks(width).enumerate() {
                extend(
                    Isa::best(),
                    z,
                    z.len(),
                    index * width,
                    &[40],
                    &mut running,
                    true,
                );
            }
            let [h, m, s, top] = running[0].statistics().map(f64::from);
            let found = [f64::from(running[0].log_prob()), h, m, s];
            // Some roundings of f32 of values of a few units each.
            for (found, expected) in found.iter().zip([log_p[40], entropy, mean, squares.ln()]) {
                assert!((found - expected).abs() < 1e-5, "{found}, not {expected}");
            }
            assert_eq!(top, 0.0);
        }
    }
}
