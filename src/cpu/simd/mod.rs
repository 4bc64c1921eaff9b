//! What the kernels ask of a processor, and which of them this one has.
//!
//! A kernel is written once, over [`Simd`], and compiled for each instruction set; [`dispatch`] enters it with the
//! instructions enabled, so a kernel and all that it calls must be `#[inline(always)]`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod cells;
#[cfg(all(test, feature = "emulated-avx512", target_arch = "x86_64"))]
mod emulated;
mod isa;
mod portable;
#[cfg(target_arch = "x86_64")]
mod transpose;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64 as arch;

pub(crate) use isa::{Isa, dispatch, dispatch_of_pairs};

/// One instruction set: vectors of [`LANES`](Self::LANES) f32, and the lookup of NF4 codes.
///
/// # Safety
///
/// Every method may be called only where [`dispatch`] has found the instructions, and pointers must be valid for what
/// they are read or written for; no alignment is asked.
pub(crate) trait Simd: Copy + 'static {
    /// f32 values in a vector.
    const LANES: usize;
    /// Vectors of `a` that a full [`tile`](Self::tile) holds.
    const TILE_VECTORS: usize;
    /// `LANES` values.
    type F32: Copy;
    /// `LANES` words of 32 bits.
    type Words: Copy;
    /// Sixteen f32 values to look up.
    type Table: Copy;
    /// Sixteen f32 values to look up for each eight lanes.
    type Tables: Copy;

    unsafe fn splat(value: f32) -> Self::F32;
    unsafe fn load(from: *const f32) -> Self::F32;
    unsafe fn store(to: *mut f32, value: Self::F32);
    unsafe fn add(a: Self::F32, b: Self::F32) -> Self::F32;
    unsafe fn mul(a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a · b + c`, rounded once where the processor does so.
    unsafe fn mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The sum of the lanes.
    unsafe fn sum(value: Self::F32) -> f32;

    unsafe fn load_words(from: *const u8) -> Self::Words;
    unsafe fn shift_right<const BITS: u32>(words: Self::Words) -> Self::Words;

    /// The table of `values`.
    unsafe fn table(values: *const f32) -> Self::Table;
    /// Every entry times `scale`, each rounded once.
    unsafe fn scale_table(table: Self::Table, scale: f32) -> Self::Table;
    /// The entry that the low four bits of each word name; the other bits may be anything.
    unsafe fn lookup(table: Self::Table, words: Self::Words) -> Self::F32;
    /// The tables of `values` for the first eight lanes and the next eight, if there are as many lanes.
    unsafe fn tables(values: [&[f32; 16]; 2]) -> Self::Tables;
    /// As [`lookup`](Self::lookup), each eight lanes in a table of their own.
    unsafe fn lookup_by_eight(tables: Self::Tables, words: Self::Words) -> Self::F32;
    /// `values[index]` for each lane, `index` below 4; four values are read.
    unsafe fn spread(values: *const f32, index: Self::Words) -> Self::F32;
    /// `8 · lane / block_size` for each lane: the block of a lane's eight codes, counted from the first lane's.
    #[inline(always)]
    unsafe fn block_of_lane(block_size: usize) -> Self::Words {
        let mut blocks = [0_u32; 16];
        for (lane, block) in blocks.iter_mut().enumerate() {
            *block = (8 * lane / block_size) as u32;
        }
        // SAFETY: sixteen words are as many as any vector has, or more.
        unsafe { Self::load_words(blocks.as_ptr().cast()) }
    }
    /// The entries of `32 · n` codes in order, packed two a byte with the first in the high half.
    unsafe fn decode(table: Self::Table, codes: *const u8, n: usize, out: *mut f32);

    /// Columns of `b` that [`tile`](Self::tile) takes beside `vectors` vectors of `a`; each divides 24.
    fn tile_columns(vectors: usize) -> usize;
    /// `c[j][..] (+)= Σ_p a[p][..] · b[j][p]`, see [`Tile`].
    unsafe fn tile(tile: Tile);

    /// `to[c · to_stride + r] = from[r · from_stride + c]` for `r` and `c` below 8.
    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        for r in 0..8 {
            for c in 0..8 {
                // SAFETY: as asked.
                unsafe {
                    let value = from.add(r * from_stride + c).read_unaligned();
                    to.add(c * to_stride + r).write_unaligned(value);
                }
            }
        }
    }

    /// Asks for a cache line that will be read soon.
    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}

    /// Asks for a cache line that will be read later, as far as the second level.
    #[inline(always)]
    unsafe fn prefetch_far(_at: *const u8) {}

    // Words of two bf16. Both operands of a product hold them in one order, so that the order does not matter.

    /// Both values of each word, in f32.
    unsafe fn halves(words: Self::F32) -> [Self::F32; 2];

    /// `a₀·b₀ + a₁·b₁ + c` for words of two bf16, summed in f32.
    #[inline(always)]
    unsafe fn mul_add_pairs(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: as asked.
        unsafe {
            let ([a0, a1], [b0, b1]) = (Self::halves(a), Self::halves(b));
            Self::mul_add(a1, b1, Self::mul_add(a0, b0, c))
        }
    }

    /// As [`tile`](Self::tile), where a word of `a` and of `b` is two bf16 and a product the sum of two.
    unsafe fn tile_of_pairs(tile: Tile);

    /// `n` words of `a[i]` and `b[i]`, in the order of memory.
    #[inline(always)]
    unsafe fn pair(a: *const u16, b: *const u16, n: usize, out: *mut u32) {
        for i in 0..n {
            // SAFETY: as asked.
            unsafe {
                let pair = [a.add(i).read_unaligned(), b.add(i).read_unaligned()];
                out.cast::<[u16; 2]>().add(i).write_unaligned(pair);
            }
        }
    }

    // Quantising and 16-bit values.

    /// `word` in every lane.
    unsafe fn splat_word(word: u32) -> Self::Words;
    /// Writes `LANES` words.
    unsafe fn store_words(to: *mut u32, words: Self::Words);
    /// `words | more << BITS`.
    unsafe fn insert<const BITS: u32>(words: Self::Words, more: Self::Words) -> Self::Words;
    /// The greater of `bits` and the bits of `|value|`, lane by lane. Magnitudes are ordered as their bits are, with
    /// infinity and NaN above every number.
    unsafe fn max_magnitude(bits: Self::Words, value: Self::F32) -> Self::Words;
    /// The greatest lane.
    unsafe fn max_word(words: Self::Words) -> u32;
    /// The code of each value of `[-1, 1]`, or an ulp or two beyond: the number of thresholds below it.
    unsafe fn nearest(value: Self::F32) -> Self::Words;
    /// The codes of `32 · n` values times `factor`, packed two a byte with the first in the high half.
    unsafe fn encode(values: *const f32, factor: f32, n: usize, codes: *mut u8);
    /// [`decode`](Self::decode) for a table of sixteen 16-bit values.
    unsafe fn decode_half(table: *const u16, codes: *const u8, n: usize, out: *mut u16);
}

/// An instruction set with products of bf16, for kernels that would gain nothing from pairs without them.
///
/// # Safety
///
/// As [`Simd`].
pub(crate) trait SimdOfPairs: Simd {
    /// Sixteen bf16 values to look up for each eight lanes.
    type Tables16: Copy;

    /// The tables of bf16 `values` for the first eight lanes and the next eight, if there are as many lanes.
    unsafe fn tables16(values: [&[u16; 16]; 2]) -> Self::Tables16;

    /// The entries that the four bits from bit `BITS` on of each half of a word name, from the table of the word's lane.
    unsafe fn lookup_pairs<const BITS: u32>(
        tables: Self::Tables16,
        words: Self::Words,
    ) -> Self::F32;
}

/// A product of a few vectors with a few columns, whose results stay in registers.
///
/// `c[j · c_stride + l] (+)= Σ_{p < depth} a[p · a_stride + l] · b[j · b_stride + p]`, `l` below `vectors · LANES`, `j`
/// below [`Simd::tile_columns`]`(vectors)`.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) vectors: usize,
    pub(crate) depth: usize,
    pub(crate) a: *const f32,
    pub(crate) a_stride: usize,
    pub(crate) b: *const f32,
    pub(crate) b_stride: usize,
    pub(crate) c: *mut f32,
    pub(crate) c_stride: usize,
    /// Whether to add to what is in `c`.
    pub(crate) accumulate: bool,
}

/// The plain loop of [`Simd::tile`] for sizes known at compile time, so that the sums stay in registers.
#[inline(always)]
unsafe fn tile_of<S: Simd, const PAIRS: bool, const V: usize, const C: usize>(t: Tile) {
    // SAFETY: what `Simd` asks for.
    unsafe {
        let mut sums = [[S::splat(0.0); V]; C];
        let mut a = t.a;
        for p in 0..t.depth {
            let mut vectors = [S::splat(0.0); V];
            for (v, vector) in vectors.iter_mut().enumerate() {
                *vector = S::load(a.add(v * S::LANES));
            }
            for (j, sums) in sums.iter_mut().enumerate() {
                let b = S::splat(t.b.add(j * t.b_stride + p).read_unaligned());
                for (sum, vector) in sums.iter_mut().zip(vectors) {
                    *sum = match PAIRS {
                        false => S::mul_add(vector, b, *sum),
                        true => S::mul_add_pairs(vector, b, *sum),
                    };
                }
            }
            a = a.add(t.a_stride);
        }
        store_sums::<S, V, C>(t, sums);
    }
}

/// [`tile_of`] for words of two bf16 without an instruction for their products: the first values of the words, then the
/// second ones, so that the sums and what is multiplied fit in registers.
#[inline(always)]
unsafe fn tile_of_halves<S: Simd, const V: usize, const C: usize>(t: Tile) {
    // SAFETY: what `Simd` asks for.
    unsafe {
        let mut sums = [[S::splat(0.0); V]; C];
        let mut a = t.a;
        for p in 0..t.depth {
            add_halves::<S, 0, V, C>(t, p, a, &mut sums);
            add_halves::<S, 1, V, C>(t, p, a, &mut sums);
            a = a.add(t.a_stride);
        }
        store_sums::<S, V, C>(t, sums);
    }
}

/// Adds the products of one value of each word, the first or the second. Which one is known at compile time: an index that is not
/// would keep the values in memory.
#[inline(always)]
unsafe fn add_halves<S: Simd, const HALF: usize, const V: usize, const C: usize>(
    t: Tile,
    p: usize,
    a: *const f32,
    sums: &mut [[S::F32; V]; C],
) {
    // SAFETY: what `Simd` asks for.
    unsafe {
        let mut vectors = [S::splat(0.0); V];
        for (v, vector) in vectors.iter_mut().enumerate() {
            *vector = S::halves(S::load(a.add(v * S::LANES)))[HALF];
        }
        for (j, sums) in sums.iter_mut().enumerate() {
            let b = S::splat(t.b.add(j * t.b_stride + p).read_unaligned());
            let b = S::halves(b)[HALF];
            for (sum, vector) in sums.iter_mut().zip(vectors) {
                *sum = S::mul_add(vector, b, *sum);
            }
        }
    }
}

/// Writes the sums of a tile, or adds them.
#[inline(always)]
unsafe fn store_sums<S: Simd, const V: usize, const C: usize>(t: Tile, sums: [[S::F32; V]; C]) {
    for (j, sums) in sums.iter().enumerate() {
        for (v, &sum) in sums.iter().enumerate() {
            // SAFETY: what `Simd` asks for.
            unsafe {
                let c = t.c.add(j * t.c_stride + v * S::LANES);
                let sum = if t.accumulate {
                    S::add(S::load(c), sum)
                } else {
                    sum
                };
                S::store(c, sum);
            }
        }
    }
}

/// A computation written over [`Simd`].
pub(crate) trait Kernel {
    type Output;

    /// # Safety
    ///
    /// The processor has the instructions of `S`. `#[inline(always)]`, with all that it calls.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// A computation written over [`SimdOfPairs`].
pub(crate) trait KernelOfPairs {
    /// # Safety
    ///
    /// As [`Kernel::run`].
    unsafe fn run<S: SimdOfPairs>(self);
}

/// A computation of ordinary Rust, of which compilers make vectors: nothing in it depends on the instruction set but its speed.
#[cfg_attr(not(feature = "optim"), allow(dead_code))]
pub(crate) trait Loop {
    /// `#[inline(always)]`, with all that it calls.
    fn run(self);
}

#[cfg_attr(not(feature = "optim"), allow(dead_code))]
struct Compiled<L>(L);

impl<L: Loop> Kernel for Compiled<L> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        self.0.run();
    }
}

/// Runs a loop as compiled for `isa`.
#[cfg_attr(not(feature = "optim"), allow(dead_code))]
pub(crate) fn run_loop<L: Loop>(isa: Isa, task: L) {
    dispatch(isa, Compiled(task));
}
