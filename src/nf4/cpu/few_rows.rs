//! The product with one to eight rows, `y = x · Wᵀ`: limited by how fast the packed weight is read.
//!
//! A vector of 32-bit words holds eight codes a lane, so eight shifts and lookups give `8 · LANES` values of `W` with
//! nothing to unpack; `x` is permuted once into the order in which they come. The sums of a block are scaled where
//! there are few rows, the values themselves where there are more.

use std::mem::MaybeUninit;

use super::codes::Codes;
use super::packed::Packed;
use crate::cpu::matmul::low_rank::LowRank;
use crate::cpu::parallel::{Shared, for_each, threads};
use crate::cpu::scratch::{with_operand, with_scratch};
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch};
use crate::nf4::codebook::CODEBOOK;

/// The most rows this is for.
pub(super) const MOST: usize = 8;
/// Bytes ahead of the codes that are being read, at least. As far as the second-level cache: the first level has too few
/// requests under way at a time to keep the memory busy.
const AHEAD: usize = 8192;
/// Rows whose scales are asked for ahead of their use.
const SCALES_AHEAD: usize = 8;
/// Floats beyond a row's scales that may be read.
const SPREAD: usize = 4;

/// `y = x · Wᵀ + u · v`, row-major, every element of `y` written.
pub(super) fn product<E: Codes>(
    isa: Isa,
    w: &Packed,
    x: &[E::Value],
    low: LowRank,
    y: &mut [MaybeUninit<E::Value>],
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
    with_operand(rows * stride::<E>(d_in), |order| {
        dispatch(
            isa,
            Permute::<E> {
                x,
                order: &mut *order,
                d_in,
            },
        );
        let order = &*order;
        for_each(d_out.div_ceil(part), 2 * w.len(), |index| {
            let first = index * part;
            let last = (first + part).min(d_out);
            let own = 2 * (w.scales_of_row() + SPREAD) + d_in;
            with_scratch(own + rows * part, |scratch| {
                let (scratch, terms) = scratch.split_at_mut(own);
                let task = Part::<E> {
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
                };
                dispatch(isa, task)
            });
        });
    });
}

/// Puts each row of `x` in the order in which the words of a vector give their codes.
struct Permute<'a, E: Codes> {
    x: &'a [E::Value],
    order: &'a mut [f32],
    d_in: usize,
}

impl<E: Codes> Kernel for Permute<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let rows = self.x.chunks(self.d_in);
        for (x, order) in rows.zip(self.order.chunks_mut(stride::<E>(self.d_in))) {
            E::permute::<S>(x, order);
        }
    }
}

/// Words of a permuted row.
fn stride<E: Codes>(d_in: usize) -> usize {
    d_in.div_ceil(E::PER_WORD)
}

/// Rows `first..last` of `W`, which are columns of `y`.
struct Part<'a, E: Codes> {
    w: &'a Packed<'a>,
    x: &'a [E::Value],
    /// `x`, permuted.
    order: &'a [f32],
    low: LowRank<'a>,
    /// This part of `u · v`.
    terms: &'a mut [f32],
    y: Shared<E::Value>,
    rows: usize,
    first: usize,
    last: usize,
    scratch: &'a mut [f32],
}

impl<E: Codes> Kernel for Part<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
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
}

impl<E: Codes> Part<'_, E> {
    #[inline(always)]
    unsafe fn rows_of<S: Simd, const R: usize>(&mut self) {
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
    unsafe fn outputs<S: Simd, const R: usize, const O: usize>(&mut self, o: usize) {
        let w = self.w;
        let [d_out, d_in] = w.shape;
        let chunk = 8 * S::LANES;
        // Only whole blocks have one scale for the eight codes of a word at a place known in advance.
        let whole = if w.rows_are_whole_blocks() {
            d_in / chunk * chunk
        } else {
            0
        };
        let n = w.scales_of_row();
        let (scales, rest) = self.scratch.split_at_mut(2 * (n + SPREAD));
        let log = w.block_size().trailing_zeros();
        // SAFETY: reads end within the codes of a row, the scales and their filling, and the rows of `x`.
        unsafe {
            let mut sums = [[S::splat(0.0); R]; O];
            if whole > 0 {
                let codebook = S::table(CODEBOOK.as_ptr());
                let index = S::block_of_lane(w.block_size());
                w.prefetch_scales::<S>((o + SCALES_AHEAD) * n, O * n);
                for p in 0..O {
                    w.scales((o + p) * n, &mut scales[p * (n + SPREAD)..][..n]);
                }
                let codes = w.codes_at(o * d_in);
                // The same place some pairs of rows further, so that every line is asked for once.
                let ahead = AHEAD.next_multiple_of(d_in);
                for k in (0..whole).step_by(chunk) {
                    let x = self.order.as_ptr().add(k / E::PER_WORD);
                    for (p, sums) in sums.iter_mut().enumerate() {
                        let codes = codes.add((p * d_in + k) / 2);
                        S::prefetch_far(codes.wrapping_add(ahead));
                        let words = S::load_words(codes);
                        let scale =
                            S::spread(scales.as_ptr().add(p * (n + SPREAD) + (k >> log)), index);
                        E::eight::<S, R>(codebook, words, scale, x, stride::<E>(d_in), sums);
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
                    *self.y.at(r * d_out + o + p) = E::round(S::sum(sum) + dot(tail, x) + term);
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
