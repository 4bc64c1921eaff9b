//! `−log softmax(z)[label]`, summed over labelled rows whose logits are in memory, and its gradient.

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
