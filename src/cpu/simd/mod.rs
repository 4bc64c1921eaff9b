//! What the kernels ask of a processor, and which of them this one has.
//!
//! A kernel is written once, over [`Simd`], and compiled for each instruction set; [`dispatch`] enters it with the
//! instructions enabled, so a kernel and all that it calls must be `#[inline(always)]`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod cells;
mod portable;
#[cfg(target_arch = "x86_64")]
mod transpose;

use std::sync::OnceLock;

/// The environment variable that forces an instruction set: `avx512-bf16`, `avx512`, `avx2` or `portable`.
const FORCE: &str = "BURN_PEFT_SIMD";

/// Why [`Simd`]'s products of bf16 have no body by default.
const NO_PAIRS: &str = "products of bf16 are for an instruction set that has them";

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// AVX-512 F, BW and VL, and products of bf16.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// AVX-512 F, BW and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What every processor of the target has.
    Portable,
}

impl Isa {
    const ALL: &[(Self, &str)] = &[
        #[cfg(target_arch = "x86_64")]
        (Self::Avx512Bf16, "avx512-bf16"),
        #[cfg(target_arch = "x86_64")]
        (Self::Avx512, "avx512"),
        #[cfg(target_arch = "x86_64")]
        (Self::Avx2, "avx2"),
        (Self::Portable, "portable"),
    ];

    /// Those that this processor has, the fastest first.
    pub(crate) fn available() -> impl Iterator<Item = Self> {
        Self::ALL
            .iter()
            .map(|&(isa, _)| isa)
            .filter(|isa| isa.is_available())
    }

    fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                Self::Avx512.is_available() && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && Self::Avx2.is_available()
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Portable => true,
        }
    }

    /// Whether it multiplies bf16, so that [`Simd::tile_of_pairs`] may be called.
    pub(crate) fn has_pairs(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => true,
            _ => false,
        }
    }

    /// The fastest one here, or the one that the environment variable `BURN_PEFT_SIMD` names.
    ///
    /// # Panics
    ///
    /// If the variable names one that is unknown or not available.
    pub(crate) fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let Some(name) = std::env::var_os(FORCE) else {
                return Self::available().next().unwrap_or(Self::Portable);
            };
            Self::ALL
                .iter()
                .find(|&&(isa, known)| name == known && isa.is_available())
                .unwrap_or_else(|| {
                    panic!("{FORCE}={name:?}: not an instruction set of this machine")
                })
                .0
        })
    }
}

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
    /// Sixteen bf16 values to look up, twice, so that a fifth bit of the index may be anything.
    type Table16: Copy;

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
                unsafe { *to.add(c * to_stride + r) = *from.add(r * from_stride + c) }
            }
        }
    }

    /// Asks for a cache line that will be read soon.
    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}

    /// Asks for a cache line that will be read later, as far as the second level.
    #[inline(always)]
    unsafe fn prefetch_far(_at: *const u8) {}

    // Products of bf16, only where the processor has them.

    /// The table rounded to bf16, to nearest even. Its values are finite.
    unsafe fn table16(_table: Self::Table) -> Self::Table16 {
        unreachable!("{NO_PAIRS}")
    }
    /// `out[i] = table[code i]`, as [`decode`](Self::decode).
    unsafe fn decode_bf16(_table: Self::Table16, _codes: *const u8, _n: usize, _out: *mut u16) {
        unreachable!("{NO_PAIRS}")
    }
    /// The entries that the four bits from bit `BITS` on of each half of a word name.
    unsafe fn lookup_pairs<const BITS: u32>(
        _table: Self::Table16,
        _words: Self::Words,
    ) -> Self::F32 {
        unreachable!("{NO_PAIRS}")
    }
    /// `out[i] = a[i] | b[i] << 16` for `n` values.
    unsafe fn pair(_a: *const u16, _b: *const u16, _n: usize, _out: *mut u32) {
        unreachable!("{NO_PAIRS}")
    }
    /// `a₀·b₀ + a₁·b₁ + c` for words of two bf16.
    unsafe fn mul_add_pairs(_a: Self::F32, _b: Self::F32, _c: Self::F32) -> Self::F32 {
        unreachable!("{NO_PAIRS}")
    }
    /// As [`tile`](Self::tile), where a word of `a` and of `b` is two bf16 and a product the sum of two.
    unsafe fn tile_of_pairs(_tile: Tile) {
        unreachable!("{NO_PAIRS}")
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
        for (j, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
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

/// Runs a kernel with the instructions of `isa`, which must be [available](Isa::available).
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    debug_assert!(isa.is_available());
    // SAFETY: the caller took `isa` from those that are available.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => avx512::enter_with_bf16(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::enter(kernel),
            Isa::Portable => kernel.run::<portable::Portable>(),
        }
    }
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

/// Runs a loop as compiled for `isa`, which must be [available](Isa::available).
#[cfg_attr(not(feature = "optim"), allow(dead_code))]
pub(crate) fn run_loop<L: Loop>(isa: Isa, task: L) {
    dispatch(isa, Compiled(task));
}
