//! The product with one to eight rows, `y = x · Wᵀ`: limited by how fast the packed weight is read.
//!
//! A vector of 32-bit words holds eight codes a lane, so eight shifts and lookups give `8 · LANES` values of `W` with
//! nothing to unpack; `x` is permuted once into the order in which they come. The sums of a block are scaled where
//! there are few rows, the values themselves where there are more.

use super::packed::Packed;
use super::parallel::{Shared, for_each, threads};
use super::scratch::{with_operand, with_scratch};
use super::simd::{Isa, Kernel, Simd, dispatch};
use crate::nf4::codebook::CODEBOOK;

/// The most rows this is for.
pub(super) const MOST: usize = 8;
/// Bytes ahead of the codes that are being read.
const AHEAD: usize = 1536;
/// Floats beyond a row's scales that may be read.
const SPREAD: usize = 4;

/// `y = x · Wᵀ`, row-major, every element of `y` written.
pub(super) fn product(isa: Isa, w: &Packed, x: &[f32], y: &mut [f32]) {
    let [d_out, d_in] = w.shape;
    let rows = y.len() / d_out;
    assert_eq!((x.len(), y.len()), (rows * d_in, rows * d_out));
    assert!(rows <= MOST);
    let parts = if w.len() < 1 << 17 { 1 } else { 4 * threads() };
    // Two rows of W at a time.
    let part = d_out.div_ceil(parts).next_multiple_of(2);
    let y = Shared(y.as_mut_ptr());
    with_operand(rows * d_in, |order| {
        dispatch(
            isa,
            Permute {
                x,
                order: &mut *order,
                d_in,
            },
        );
        let order = &*order;
        for_each(d_out.div_ceil(part), 2 * w.len(), |index| {
            let first = index * part;
            let last = (first + part).min(d_out);
            with_scratch(2 * (w.scales_of_row() + SPREAD) + 2 * d_in, |scratch| {
                let task = Part {
                    w,
                    x,
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
struct Permute<'a> {
    x: &'a [f32],
    order: &'a mut [f32],
    d_in: usize,
}

impl Kernel for Permute<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let chunk = 8 * S::LANES;
        let rows = self
            .x
            .chunks(self.d_in.max(1))
            .zip(self.order.chunks_mut(self.d_in.max(1)));
        for (x, order) in rows {
            for (x, order) in x.chunks_exact(chunk).zip(order.chunks_exact_mut(chunk)) {
                for (j, order) in order.chunks_exact_mut(S::LANES).enumerate() {
                    for (lane, order) in order.iter_mut().enumerate() {
                        // The first code of a byte is in its high half.
                        *order = x[8 * lane + (j ^ 1)];
                    }
                }
            }
        }
    }
}

/// Rows `first..last` of `W`, which are columns of `y`.
struct Part<'a> {
    w: &'a Packed<'a>,
    x: &'a [f32],
    /// `x`, permuted.
    order: &'a [f32],
    y: Shared,
    rows: usize,
    first: usize,
    last: usize,
    scratch: &'a mut [f32],
}

impl Kernel for Part<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
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

impl Part<'_> {
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
                for p in 0..O {
                    w.scales((o + p) * n, &mut scales[p * (n + SPREAD)..][..n]);
                }
                let codes = w.codes_at(o * d_in);
                for k in (0..whole).step_by(chunk) {
                    let x = self.order.as_ptr().add(k);
                    for (p, sums) in sums.iter_mut().enumerate() {
                        let codes = codes.add((p * d_in + k) / 2);
                        S::prefetch(codes.wrapping_add(AHEAD));
                        let words = S::load_words(codes);
                        let scale =
                            S::spread(scales.as_ptr().add(p * (n + SPREAD) + (k >> log)), index);
                        eight::<S, R>(codebook, words, scale, x, d_in, sums);
                    }
                }
            }
            for (p, sums) in sums.iter().enumerate() {
                let at = (o + p) * d_in;
                let tail = &mut rest[..d_in - whole];
                w.decode::<S>(at + whole..at + d_in, tail);
                for (r, &sum) in sums.iter().enumerate() {
                    let x = &self.x[r * d_in + whole..][..tail.len()];
                    *self.y.at(r * d_out + o + p) = S::sum(sum) + dot::<S>(tail, x);
                }
            }
        }
    }
}

/// Adds the products of the eight codes of each word with `R` rows of `x`, `d_in` apart.
#[inline(always)]
unsafe fn eight<S: Simd, const R: usize>(
    codebook: S::Table,
    words: S::Words,
    scale: S::F32,
    x: *const f32,
    d_in: usize,
    sums: &mut [S::F32; R],
) {
    // SAFETY: what `Simd` asks for.
    unsafe {
        let mut parts = [S::splat(0.0); R];
        macro_rules! lookup {
            ($($j:literal)*) => {$(
                let mut value = S::lookup(codebook, S::shift_right::<{ 4 * $j }>(words));
                if R >= SCALE_VALUES {
                    value = S::mul(value, scale);
                }
                for r in 0..R {
                    let x = S::load(x.add(r * d_in + $j * S::LANES));
                    if R >= SCALE_VALUES {
                        sums[r] = S::mul_add(value, x, sums[r]);
                    } else {
                        parts[r] = S::mul_add(value, x, parts[r]);
                    }
                }
            )*};
        }
        lookup!(0 1 2 3 4 5 6 7);
        if R < SCALE_VALUES {
            for r in 0..R {
                sums[r] = S::mul_add(parts[r], scale, sums[r]);
            }
        }
    }
}

/// From so many rows on, values are scaled, not sums.
const SCALE_VALUES: usize = 4;

#[inline(always)]
unsafe fn dot<S: Simd>(a: &[f32], b: &[f32]) -> f32 {
    let whole = a.len() / S::LANES * S::LANES;
    // SAFETY: what `Simd` asks for; both are as long.
    unsafe {
        let mut sum = S::splat(0.0);
        for i in (0..whole).step_by(S::LANES) {
            sum = S::mul_add(S::load(a.as_ptr().add(i)), S::load(b.as_ptr().add(i)), sum);
        }
        let rest: f32 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b).sum();
        S::sum(sum) + rest
    }
}
