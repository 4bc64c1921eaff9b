//! `−log softmax(z)[label]`, summed over labelled rows, and its gradient.

use super::element::{exp, max, sum};
use crate::cpu::parallel::for_each_chunk;
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch};
use crate::cpu::value::Value;

/// Steps that a logit costs, against one multiply-add.
const COST: usize = 8;
/// Rows of a task.
const ROWS: usize = 8;

/// Which rows of `logits [rows, vocab]` count, in ascending order, each with its label.
pub(super) type Labels = [(usize, usize)];

/// The largest logit of a row and the sum of `e^(z − largest)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partition {
    largest: f32,
    sum: f32,
}

/// [`Partition`] of as much of a row as has been seen, and the label's logit once it has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    partition: Partition,
    label: f32,
}

impl Running {
    /// Of nothing.
    pub(crate) const EMPTY: Self = Self {
        partition: Partition {
            largest: f32::NEG_INFINITY,
            sum: 0.0,
        },
        label: f32::NAN,
    };

    /// `−log softmax(z)[label]`, of a whole row.
    pub(crate) fn cost(&self) -> f64 {
        let Partition { largest, sum } = self.partition;
        f64::from(largest - self.label + sum.ln())
    }
}

/// Takes in the logits of `width` tokens from `first` on, `z [rows, width]`, of rows with these labels.
pub(crate) fn extend(
    isa: Isa,
    z: &[f32],
    width: usize,
    first: usize,
    labels: &[usize],
    running: &mut [Running],
) {
    let rows = running.len();
    assert_eq!((z.len(), labels.len()), (rows * width, rows));
    for_each_chunk(running, 1, COST * z.len(), |row, running| {
        let z = &z[row * width..][..width];
        for running in running {
            let before = running.partition;
            running.partition = dispatch(isa, Extended { z, before });
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

struct Extended<'a> {
    z: &'a [f32],
    before: Partition,
}

impl Kernel for Extended<'_> {
    type Output = Partition;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Partition {
        let Self { z, before } = self;
        let largest = max(z).max(before.largest);
        // Nothing was summed where nothing has been seen; the difference is no number there.
        let kept = match before.sum == 0.0 {
            true => 0.0,
            false => before.sum * exp(before.largest - largest),
        };
        // A token without any probability is nothing, also among others of which none has been seen.
        let here = sum([z], |[z]| match z == f32::NEG_INFINITY {
            true => 0.0,
            false => exp(z - largest),
        });
        Partition {
            largest,
            sum: kept + here,
        }
    }
}

/// `dy · (softmax(z) − [label])` in the place of `z`, of rows that `running` has seen whole; the arguments are those of
/// [`extend`].
pub(crate) fn differentiate(
    isa: Isa,
    z: &mut [f32],
    width: usize,
    first: usize,
    labels: &[usize],
    running: &[Running],
    dy: f32,
) {
    let rows = running.len();
    assert_eq!((z.len(), labels.len()), (rows * width, rows));
    let work = COST * z.len();
    for_each_chunk(z, width, work, |row, z| {
        let Partition { largest, sum } = running[row].partition;
        let label = within(labels[row], first, width);
        let task = Differentiated {
            z,
            largest,
            scale: dy / sum,
            label,
            dy,
        };
        dispatch(isa, task);
    });
}

struct Differentiated<'a> {
    z: &'a mut [f32],
    largest: f32,
    scale: f32,
    label: Option<usize>,
    dy: f32,
}

impl Kernel for Differentiated<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for z in self.z.iter_mut() {
            *z = exp(*z - self.largest) * self.scale;
        }
        if let Some(label) = self.label {
            self.z[label] -= self.dy;
        }
    }
}

/// The sum of what the labelled rows cost, and what backward needs of each.
pub(super) fn forward<V: Value>(
    isa: Isa,
    logits: &[V],
    vocab: usize,
    labels: &Labels,
) -> (f32, Vec<Partition>) {
    let mut partitions = vec![
        Partition {
            largest: 0.0,
            sum: 0.0
        };
        labels.len()
    ];
    let work = COST * labels.len() * vocab;
    for_each_chunk(&mut partitions, ROWS, work, |index, partitions| {
        for (partition, &(row, _)) in partitions.iter_mut().zip(&labels[index * ROWS..]) {
            let row = &logits[row * vocab..][..vocab];
            *partition = dispatch(isa, Partitioned { row });
        }
    });
    let costs = partitions.iter().zip(labels).map(|(p, &(row, label))| {
        let label: f32 = logits[row * vocab + label].into();
        // The difference first: its rounding is that of the result, not that of large logits.
        f64::from(p.largest - label + p.sum.ln())
    });
    (costs.sum::<f64>() as f32, partitions)
}

struct Partitioned<'a, V> {
    row: &'a [V],
}

impl<V: Value> Kernel for Partitioned<'_, V> {
    type Output = Partition;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Partition {
        let largest = max(self.row);
        let sum = sum([self.row], |[z]| exp(z - largest));
        Partition { largest, sum }
    }
}

/// `dz = dy · (softmax(z) − [label])`, to rows that are zero.
pub(super) fn backward<V: Value>(
    isa: Isa,
    logits: &[V],
    vocab: usize,
    labels: &Labels,
    partitions: &[Partition],
    dy: f32,
    dz: &mut [V],
) {
    assert_eq!([logits.len(), partitions.len()], [dz.len(), labels.len()]);
    let work = COST * labels.len() * vocab;
    for_each_chunk(dz, vocab, work, |row, dz| {
        let Ok(index) = labels.binary_search_by_key(&row, |&(row, _)| row) else {
            return;
        };
        let Partition { largest, sum } = partitions[index];
        let task = Softmax {
            z: &logits[row * vocab..][..vocab],
            largest,
            scale: dy / sum,
            label: labels[index].1,
            dy,
            dz,
        };
        dispatch(isa, task);
    });
}

struct Softmax<'a, V> {
    z: &'a [V],
    largest: f32,
    scale: f32,
    label: usize,
    dy: f32,
    dz: &'a mut [V],
}

impl<V: Value> Kernel for Softmax<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (dz, &z) in self.dz.iter_mut().zip(self.z) {
            *dz = V::round(exp(z.into() - self.largest) * self.scale);
        }
        let z: f32 = self.z[self.label].into();
        self.dz[self.label] = V::round(exp(z - self.largest) * self.scale - self.dy);
    }
}
