//! `y = γ · r · x`, `r = 1 / √(mean(x²) + ε)`, and its gradients, row by row.

use std::mem::MaybeUninit;

use super::element::sum;
use crate::cpu::parallel::for_each_chunk;
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch};
use crate::cpu::value::Value;

/// Elements of a task, about.
const CHUNK: usize = 1 << 13;
/// Rows that a sum over rows takes at a time.
const SUMMED: usize = 32;
/// Steps that an element costs, against one multiply-add.
const COST: usize = 4;

/// Rows `x`, of the length of `gamma`.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, V> {
    pub(super) x: &'a [V],
    pub(super) gamma: &'a [V],
    pub(super) epsilon: f32,
}

impl<V: Value> Rows<'_, V> {
    #[inline(always)]
    fn reciprocal_norm(&self, x: &[V]) -> f32 {
        let squares = sum([x], |[x]| x * x);
        1.0 / (squares / x.len() as f32 + self.epsilon).sqrt()
    }

    fn chunk(&self) -> usize {
        let n = self.gamma.len();
        n * (CHUNK / n).max(1)
    }

    fn from(self, first: usize, len: usize) -> Self {
        Self {
            x: &self.x[first..first + len],
            ..self
        }
    }

    pub(super) fn forward(self, isa: Isa, y: &mut [MaybeUninit<V>]) {
        assert_eq!(self.x.len(), y.len());
        let chunk = self.chunk();
        for_each_chunk(y, chunk, COST * self.x.len(), |index, y| {
            let rows = self.from(index * chunk, y.len());
            dispatch(isa, Forward { rows, y });
        });
    }

    /// `dx = r · (g − x · r² · mean(g · x))` with `g = γ · dy`.
    pub(super) fn backward(self, isa: Isa, dy: &[V], dx: &mut [MaybeUninit<V>]) {
        assert_eq!([self.x.len(), dy.len()], [dx.len(); 2]);
        let chunk = self.chunk();
        for_each_chunk(dx, chunk, 2 * COST * self.x.len(), |index, dx| {
            let rows = self.from(index * chunk, dx.len());
            let dy = &dy[index * chunk..][..dx.len()];
            dispatch(isa, Backward { rows, dy, dx });
        });
    }

    /// `dγ = Σ_rows dy · r · x`: sums of [`SUMMED`] rows each on all threads, then the sum of those. How many threads there are
    /// changes no bit of it.
    pub(super) fn backward_gamma(self, isa: Isa, dy: &[V]) -> Vec<V> {
        assert_eq!(self.x.len(), dy.len());
        let n = self.gamma.len();
        let rows = self.x.len() / n;
        let mut parts = vec![0.0; rows.div_ceil(SUMMED) * n];
        let work = COST * self.x.len();
        for_each_chunk(&mut parts, n, work, |index, sums| {
            let first = index * SUMMED * n;
            let len = (SUMMED * n).min(self.x.len() - first);
            let rows = self.from(first, len);
            let dy = &dy[first..first + len];
            dispatch(isa, BackwardGamma { rows, dy, sums });
        });
        let mut parts = parts.chunks_exact(n);
        let mut sums = match parts.next() {
            Some(first) => first.to_vec(),
            None => vec![0.0; n],
        };
        for part in parts {
            for (sum, part) in sums.iter_mut().zip(part) {
                *sum += part;
            }
        }
        sums.into_iter().map(V::round).collect()
    }
}

struct BackwardGamma<'a, V> {
    rows: Rows<'a, V>,
    dy: &'a [V],
    /// Zeros.
    sums: &'a mut [f32],
}

impl<V: Value> Kernel for BackwardGamma<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let n = self.sums.len();
        for (x, dy) in self.rows.x.chunks_exact(n).zip(self.dy.chunks_exact(n)) {
            let norm = self.rows.reciprocal_norm(x);
            for ((sum, &x), &dy) in self.sums.iter_mut().zip(x).zip(dy) {
                *sum += dy.into() * norm * x.into();
            }
        }
    }
}

struct Forward<'a, V> {
    rows: Rows<'a, V>,
    y: &'a mut [MaybeUninit<V>],
}

impl<V: Value> Kernel for Forward<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let gamma = self.rows.gamma;
        let rows = self.rows.x.chunks_exact(gamma.len());
        for (y, x) in self.y.chunks_exact_mut(gamma.len()).zip(rows) {
            let norm = self.rows.reciprocal_norm(x);
            for ((y, &x), &gamma) in y.iter_mut().zip(x).zip(gamma) {
                y.write(V::round(x.into() * norm * gamma.into()));
            }
        }
    }
}

struct Backward<'a, V> {
    rows: Rows<'a, V>,
    dy: &'a [V],
    dx: &'a mut [MaybeUninit<V>],
}

impl<V: Value> Kernel for Backward<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let gamma = self.rows.gamma;
        let n = gamma.len();
        let inputs = self.rows.x.chunks_exact(n).zip(self.dy.chunks_exact(n));
        for (dx, (x, dy)) in self.dx.chunks_exact_mut(n).zip(inputs) {
            let norm = self.rows.reciprocal_norm(x);
            let mean = sum([x, dy, gamma], |[x, dy, gamma]| x * dy * gamma) / n as f32;
            let slope = norm * norm * mean;
            for (((dx, &x), &dy), &gamma) in dx.iter_mut().zip(x).zip(dy).zip(gamma) {
                let g = dy.into() * gamma.into();
                dx.write(V::round(norm * (g - slope * x.into())));
            }
        }
    }
}
