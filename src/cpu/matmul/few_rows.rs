//! Products of a few rows with a dense weight, limited by how fast the weight is read: where it lies, and no part of it copied.
//!
//! A row's sums do not depend on the other rows, nor on the number of threads: a row alone and the same row among others have the same
//! bits.

use std::mem::MaybeUninit;

use half::bf16;

use crate::cpu::output::written;
use crate::cpu::parallel::{Shared, for_each, threads};
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch};
use crate::cpu::value::Value;

/// The most rows this is for: more take tiles, which multiply what they load by many rows.
pub(crate) const MOST: usize = 15;
/// Rows whose sums stay in the first-level cache with a strip of `W`; more read `W` once more.
const ROWS: usize = 8;
/// Rows of `W` that are added to the sums at a time.
const DEPTH: usize = 8;
/// Columns of a strip, at most and at least: [`DEPTH`] rows of a strip stay in the first-level cache.
const STRIP: usize = 512;
const LEAST: usize = 128;
/// Values of two vectors, at most.
const TWO: usize = 32;
/// Rows of `W` in a task, where sums run along them.
const TASK: usize = 64;

/// Values that are loaded two vectors at a time, in an order of their own.
pub(crate) trait Loaded: Value {
    /// `2 · LANES` values.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    unsafe fn load<S: Simd>(from: *const Self) -> [S::F32; 2];

    /// The place in memory of the value `lane` of vector `vector`, of vectors of `lanes`.
    fn place(vector: usize, lane: usize, lanes: usize) -> usize;
}

impl Loaded for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> [S::F32; 2] {
        // SAFETY: as asked.
        unsafe { [S::load(from), S::load(from.add(S::LANES))] }
    }

    #[inline(always)]
    fn place(vector: usize, lane: usize, lanes: usize) -> usize {
        vector * lanes + lane
    }
}

impl Loaded for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> [S::F32; 2] {
        // SAFETY: as asked.
        unsafe { S::halves(S::load(from.cast())) }
    }

    #[inline(always)]
    fn place(vector: usize, lane: usize, _: usize) -> usize {
        2 * lane + vector
    }
}

/// `y = x · Wᵀ` if `along`, else `x · W`, of `W [held[0], held[1]]`, row-major; `len` values, all of them written.
///
/// # Panics
///
/// If the sizes do not fit.
pub(crate) fn product<V: Loaded>(
    isa: Isa,
    x: &[V],
    w: &[V],
    held: [usize; 2],
    along: bool,
    len: usize,
) -> Vec<V> {
    let [d_out, d_in] = if along { held } else { [held[1], held[0]] };
    let rows = len / d_out;
    assert_eq!((w.len(), len), (held[0] * held[1], rows * d_out));
    assert!(x.len() == rows * d_in && d_in > 0);
    let write = |[y]: [&mut [MaybeUninit<V>]; 1]| {
        let y = Shared(y.as_mut_ptr().cast::<V>());
        let work = rows * d_in * d_out;
        if along {
            for_each(d_out.div_ceil(TASK), work, |index| {
                let first = index * TASK;
                let last = (first + TASK).min(d_out);
                let task = Along {
                    x,
                    w: &w[first * d_in..last * d_in],
                    d_in,
                    d_out,
                    // SAFETY: the task writes these columns alone.
                    y: unsafe { y.at(first) },
                };
                dispatch(isa, task);
            });
            return;
        }
        // Strips begin at multiples of two vectors.
        let strips = d_out.div_ceil(LEAST).min(2 * threads()).max(1);
        let width = d_out.div_ceil(strips).min(STRIP).next_multiple_of(TWO);
        for_each(d_out.div_ceil(width), work, |index| {
            let first = index * width;
            for (block, x) in x.chunks(ROWS * d_in).enumerate() {
                let task = Across {
                    x,
                    w,
                    d_in,
                    d_out,
                    first,
                    width: width.min(d_out - first),
                    // SAFETY: the task writes these columns of these rows alone.
                    y: unsafe { y.at(block * ROWS * d_out + first) },
                };
                dispatch(isa, task);
            }
        });
    };
    // SAFETY: every column of every row is of one task, which writes it.
    let [y] = unsafe { written([len], write) };
    y
}

/// Dot products with rows of `W`.
struct Along<'a, V> {
    /// `[rows, d_in]`.
    x: &'a [V],
    /// `[columns, d_in]`.
    w: &'a [V],
    d_in: usize,
    d_out: usize,
    y: *mut V,
}

impl<V: Loaded> Kernel for Along<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, w, d_in, .. } = self;
        let two = 2 * S::LANES;
        let whole = d_in / two * two;
        for (column, w) in w.chunks_exact(d_in).enumerate() {
            for (row, x) in x.chunks_exact(d_in).enumerate() {
                // SAFETY: the instructions are those of `S`; `whole` values and the ends are there; the place is this task's.
                unsafe {
                    let mut sums = [S::splat(0.0); 4];
                    let mut at = 0;
                    while at + 2 * two <= whole {
                        let (a, b) = (
                            V::load::<S>(x.as_ptr().add(at)),
                            V::load::<S>(w.as_ptr().add(at)),
                        );
                        sums[0] = S::mul_add(a[0], b[0], sums[0]);
                        sums[1] = S::mul_add(a[1], b[1], sums[1]);
                        let (a, b) = (
                            V::load::<S>(x.as_ptr().add(at + two)),
                            V::load::<S>(w.as_ptr().add(at + two)),
                        );
                        sums[2] = S::mul_add(a[0], b[0], sums[2]);
                        sums[3] = S::mul_add(a[1], b[1], sums[3]);
                        at += 2 * two;
                    }
                    if at < whole {
                        let (a, b) = (
                            V::load::<S>(x.as_ptr().add(at)),
                            V::load::<S>(w.as_ptr().add(at)),
                        );
                        sums[0] = S::mul_add(a[0], b[0], sums[0]);
                        sums[1] = S::mul_add(a[1], b[1], sums[1]);
                    }
                    if whole < d_in {
                        let (a, b) = (end::<V, S>(&x[whole..]), end::<V, S>(&w[whole..]));
                        sums[2] = S::mul_add(a[0], b[0], sums[2]);
                        sums[3] = S::mul_add(a[1], b[1], sums[3]);
                    }
                    let sum = S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]));
                    *self.y.add(row * self.d_out + column) = V::round(S::sum(sum));
                }
            }
        }
    }
}

/// The values after the last two whole vectors, with zeros.
///
/// # Safety
///
/// As [`Simd`].
#[inline(always)]
unsafe fn end<V: Loaded, S: Simd>(values: &[V]) -> [S::F32; 2] {
    let mut filled = [V::round(0.0); TWO];
    filled[..values.len()].copy_from_slice(values);
    // SAFETY: as many values as two vectors of any instruction set.
    unsafe { V::load::<S>(filled.as_ptr()) }
}

/// A strip of columns of `W`, whose rows are added up.
struct Across<'a, V> {
    /// `[rows, d_in]`, at most [`ROWS`] rows.
    x: &'a [V],
    /// `[d_in, d_out]`.
    w: &'a [V],
    d_in: usize,
    d_out: usize,
    first: usize,
    width: usize,
    y: *mut V,
}

impl<V: Loaded> Kernel for Across<'_, V> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self {
            x,
            w,
            d_in,
            d_out,
            first,
            width,
            ..
        } = self;
        let two = 2 * S::LANES;
        let mut all = [[0.0_f32; STRIP]; ROWS];
        for depth in (0..d_in).step_by(DEPTH) {
            let many = DEPTH.min(d_in - depth);
            for (row, sums) in all.iter_mut().take(x.len() / d_in).enumerate() {
                let x = &x[row * d_in + depth..][..many];
                // SAFETY: the instructions are those of `S`; columns below `width` are there, and the sums have room for whole vectors.
                unsafe {
                    let mut factors = [S::splat(0.0); DEPTH];
                    for (factor, x) in factors.iter_mut().zip(x) {
                        *factor = S::splat((*x).into());
                    }
                    let mut column = 0;
                    while column < width {
                        let to = sums.as_mut_ptr().add(column);
                        let mut sum = [S::load(to), S::load(to.add(S::LANES))];
                        let left = width - column;
                        for (index, factor) in factors.iter().enumerate().take(many) {
                            let from = (depth + index) * d_out + first + column;
                            let w = match left >= two {
                                true => V::load::<S>(w.as_ptr().add(from)),
                                false => end::<V, S>(&w[from..][..left]),
                            };
                            sum[0] = S::mul_add(*factor, w[0], sum[0]);
                            sum[1] = S::mul_add(*factor, w[1], sum[1]);
                        }
                        S::store(to, sum[0]);
                        S::store(to.add(S::LANES), sum[1]);
                        column += two;
                    }
                }
            }
        }
        for (row, sums) in all.iter().take(x.len() / d_in).enumerate() {
            for (block, sums) in sums[..width.next_multiple_of(two)]
                .chunks_exact(two)
                .enumerate()
            {
                for (index, sum) in sums.iter().enumerate() {
                    let place = V::place(index / S::LANES, index % S::LANES, S::LANES);
                    let column = block * two + place;
                    if column < width {
                        // SAFETY: a column of this task.
                        unsafe { *self.y.add(row * d_out + column) = V::round(*sum) };
                    }
                }
            }
        }
    }
}
