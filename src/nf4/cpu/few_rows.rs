//! The product with one to eight rows, `y = x · Wᵀ`: limited by how fast the packed weight is read.
//!
//! A vector of 32-bit words holds eight codes a lane, so eight shifts and lookups give `8 · LANES` values of `W` with
//! nothing to unpack; `x` is permuted once into the order in which they come. What is looked up, and in which precision, is
//! a [`Lookup`].

use std::mem::MaybeUninit;

use half::bf16;

use super::lookup::{Exact, InPairs, Lookup, LookupOn, Rounded};
use super::packed::Packed;
use super::precision::Precision;
use crate::cpu::matmul::element::{Element, F32, Pairs};
use crate::cpu::matmul::low_rank::LowRank;
use crate::cpu::output::written;
use crate::cpu::parallel::{Shared, for_each, threads};
use crate::cpu::scratch::{with_operand, with_scratch};
use crate::cpu::simd::{
    Isa, Kernel, KernelOfPairs, Simd, SimdOfPairs, dispatch, dispatch_of_pairs,
};
use crate::cpu::value::Value;

/// The most rows this is for.
pub(super) const MOST: usize = 8;
/// Bytes ahead of the codes that are being read, at least. As far as the second-level cache: the first level has too few
/// requests under way at a time to keep the memory busy.
const AHEAD: usize = 8192;
/// Rows whose scales are asked for ahead of their use.
const SCALES_AHEAD: usize = 8;
/// Floats beyond a row's scales that may be read.
const SPREAD: usize = 4;

/// An arithmetic that has a product with few rows.
pub(super) trait FewRows: Element {
    /// `y = x · Wᵀ + u · v`, row-major, every element of `y` written.
    fn product(
        isa: Isa,
        w: &Packed,
        x: &[Self::Value],
        low: LowRank,
        y: &mut [MaybeUninit<Self::Value>],
    );
}

impl FewRows for F32 {
    fn product(isa: Isa, w: &Packed, x: &[f32], low: LowRank, y: &mut [MaybeUninit<f32>]) {
        match w.precision() {
            Precision::F32 => product::<Exact>(w, x, low, y, |task| dispatch(isa, task)),
            _ => product::<Rounded>(w, x, low, y, |task| dispatch(isa, task)),
        }
    }
}

impl FewRows for Pairs {
    fn product(isa: Isa, w: &Packed, x: &[bf16], low: LowRank, y: &mut [MaybeUninit<bf16>]) {
        match isa.of_pairs() {
            Some(isa) => product::<InPairs>(w, x, low, y, |task| dispatch_of_pairs(isa, task)),
            // Pairs gain nothing without instructions for them.
            None => {
                let x: Vec<f32> = x.iter().map(|&x| x.into()).collect();
                // SAFETY: a product writes every value.
                let [sums] = unsafe {
                    written([y.len()], |[sums]: [&mut [_]; 1]| {
                        <F32 as FewRows>::product(isa, w, &x, low, sums);
                    })
                };
                for (y, sum) in y.iter_mut().zip(sums) {
                    y.write(bf16::from_f32(sum));
                }
            }
        }
    }
}

fn product<L: Lookup>(
    w: &Packed,
    x: &[L::Value],
    low: LowRank,
    y: &mut [MaybeUninit<L::Value>],
    run: impl Fn(Task<L>) + Send + Sync,
) {
    let [d_out, d_in] = w.shape;
    let rows = y.len() / d_out;
    assert_eq!((x.len(), y.len()), (rows * d_in, rows * d_out));
    low.check(rows, d_out);
    assert!(rows <= MOST);
    let parts = if w.len() < 1 << 17 { 1 } else { 4 * threads() };
    // Two rows of W at a time.
    let part = d_out.div_ceil(parts).next_multiple_of(2);
    let y = Shared(y.as_mut_ptr().cast());
    with_operand(rows * stride::<L>(d_in), |order| {
        run(Task::Permute(Permute {
            x,
            order: &mut *order,
            d_in,
        }));
        let order = &*order;
        for_each(d_out.div_ceil(part), 2 * w.len(), |index| {
            let first = index * part;
            let last = (first + part).min(d_out);
            let own = 2 * (w.scales_of_row() + SPREAD) + d_in;
            with_scratch(own + rows * part, |scratch| {
                let (scratch, terms) = scratch.split_at_mut(own);
                run(Task::Part(Part {
                    w,
                    x,
                    low,
                    terms,
                    order,
                    y,
                    rows,
                    first,
                    last,
                    scratch,
                }));
            });
        });
    });
}

/// What is done with the instructions of one set.
enum Task<'a, L: Lookup> {
    Permute(Permute<'a, L>),
    Part(Part<'a, L>),
}

impl<L: Lookup> Task<'_, L> {
    /// # Safety
    ///
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn run_on<S: Simd>(self)
    where
        L: LookupOn<S>,
    {
        match self {
            Self::Permute(permute) => permute.run(S::LANES),
            // SAFETY: as asked.
            Self::Part(part) => unsafe { part.run::<S>() },
        }
    }
}

impl Kernel for Task<'_, Exact> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: as asked.
        unsafe { self.run_on::<S>() }
    }
}

impl Kernel for Task<'_, Rounded> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: as asked.
        unsafe { self.run_on::<S>() }
    }
}

impl KernelOfPairs for Task<'_, InPairs> {
    #[inline(always)]
    unsafe fn run<S: SimdOfPairs>(self) {
        // SAFETY: as asked.
        unsafe { self.run_on::<S>() }
    }
}

/// Puts each row of `x` in the order in which the words of a vector give their codes.
struct Permute<'a, L: Lookup> {
    x: &'a [L::Value],
    order: &'a mut [f32],
    d_in: usize,
}

impl<L: Lookup> Permute<'_, L> {
    #[inline(always)]
    fn run(self, lanes: usize) {
        let rows = self.x.chunks(self.d_in);
        for (x, order) in rows.zip(self.order.chunks_mut(stride::<L>(self.d_in))) {
            L::permute(lanes, x, order);
        }
    }
}

/// Words of a permuted row.
fn stride<L: Lookup>(d_in: usize) -> usize {
    d_in.div_ceil(L::PER_WORD)
}

/// Rows `first..last` of `W`, which are columns of `y`.
struct Part<'a, L: Lookup> {
    w: &'a Packed<'a>,
    x: &'a [L::Value],
    /// `x`, permuted.
    order: &'a [f32],
    low: LowRank<'a>,
    /// This part of `u · v`.
    terms: &'a mut [f32],
    y: Shared<L::Value>,
    rows: usize,
    first: usize,
    last: usize,
    scratch: &'a mut [f32],
}

impl<L: Lookup> Part<'_, L> {
    #[inline(always)]
    unsafe fn run<S: Simd>(mut self)
    where
        L: LookupOn<S>,
    {
        self.add_terms();
        // SAFETY: what `Simd` asks for.
        unsafe {
            match self.rows {
                1 => self.rows_of::<S, 1>(),
                2 => self.rows_of::<S, 2>(),
                3 => self.rows_of::<S, 3>(),
                4 => self.rows_of::<S, 4>(),
                5 => self.rows_of::<S, 5>(),
                6 => self.rows_of::<S, 6>(),
                7 => self.rows_of::<S, 7>(),
                8 => self.rows_of::<S, 8>(),
                _ => {}
            }
        }
    }

    #[inline(always)]
    unsafe fn rows_of<S: Simd, const R: usize>(&mut self)
    where
        L: LookupOn<S>,
    {
        // SAFETY: what `Simd` asks for.
        unsafe {
            let mut o = self.first;
            while o < self.last {
                if self.last - o >= 2 {
                    self.outputs::<S, R, 2>(o);
                    o += 2;
                } else {
                    self.outputs::<S, R, 1>(o);
                    o += 1;
                }
            }
        }
    }

    #[inline(always)]
    fn add_terms(&mut self) {
        let n = self.last - self.first;
        self.terms.fill(0.0);
        let LowRank { rank, u, v } = self.low;
        if rank == 0 {
            return;
        }
        for (terms, u) in self.terms.chunks_mut(n).zip(u.chunks(rank)) {
            for (&u, v) in u.iter().zip(v.chunks(self.w.shape[0])) {
                for (term, v) in terms.iter_mut().zip(&v[self.first..self.last]) {
                    *term += u * v;
                }
            }
        }
    }

    /// `R` rows of `x` times `O` rows of `W`.
    #[inline(always)]
    unsafe fn outputs<S: Simd, const R: usize, const O: usize>(&mut self, o: usize)
    where
        L: LookupOn<S>,
    {
        let w = self.w;
        let [d_out, d_in] = w.shape;
        let chunk = 8 * S::LANES;
        // Only whole blocks have one scale for the codes of some words at a place known in advance.
        let whole = if w.rows_are_whole_blocks() && w.block_size() >= L::IN_A_BLOCK {
            d_in / chunk * chunk
        } else {
            0
        };
        let n = w.scales_of_row();
        let (scales, rest) = self.scratch.split_at_mut(2 * (n + SPREAD));
        // SAFETY: reads end within the codes of a row, the scales and their filling, and the rows of `x`.
        unsafe {
            let mut sums = [[S::splat(0.0); R]; O];
            if whole > 0 {
                let blocks = S::block_of_lane(w.block_size());
                w.prefetch_scales::<S>((o + SCALES_AHEAD) * n, O * n);
                for p in 0..O {
                    w.scales((o + p) * n, &mut scales[p * (n + SPREAD)..][..n]);
                }
                let codes = w.codes_at(o * d_in);
                // The same place some pairs of rows further, so that every line is asked for once.
                let ahead = AHEAD.next_multiple_of(d_in);
                for k in (0..whole).step_by(chunk) {
                    let x = self.order.as_ptr().add(k / L::PER_WORD);
                    for (p, sums) in sums.iter_mut().enumerate() {
                        let codes = codes.add((p * d_in + k) / 2);
                        S::prefetch_far(codes.wrapping_add(ahead));
                        let words = S::load_words(codes);
                        let scales = &scales[p * (n + SPREAD)..][..n + SPREAD];
                        let tables = L::tables(w, scales, k, blocks);
                        L::eight::<R>(tables, words, x, stride::<L>(d_in), sums);
                    }
                }
            }
            for (p, sums) in sums.iter().enumerate() {
                let at = (o + p) * d_in;
                let tail = &mut rest[..d_in - whole];
                w.decode::<S>(at + whole..at + d_in, tail);
                for (r, &sum) in sums.iter().enumerate() {
                    let x = &self.x[r * d_in + whole..][..tail.len()];
                    let term = self.terms[r * (self.last - self.first) + o + p - self.first];
                    let sum = S::sum(sum) + dot(tail, x) + term;
                    *self.y.at(r * d_out + o + p) = L::Value::round(sum);
                }
            }
        }
    }
}

/// `Σ a·b`, both as long.
#[inline(always)]
fn dot<T: Copy + Into<f32>>(a: &[f32], b: &[T]) -> f32 {
    // Independent sums, which the compiler keeps in vectors.
    let mut sums = [0.0; 16];
    let (a, a_rest) = a.as_chunks::<16>();
    let (b, b_rest) = b.as_chunks::<16>();
    for (a, b) in a.iter().zip(b) {
        for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b.into();
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(&a, &b)| a * b.into());
    sums.into_iter().chain(rest).sum()
}
