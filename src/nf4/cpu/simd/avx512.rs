//! AVX-512: sixteen f32 in a vector, so that the whole codebook is one.

use std::arch::x86_64::*;

use super::{Kernel, Simd, Tile, tile_of};

#[derive(Clone, Copy)]
pub(super) struct Avx512;

/// # Safety
///
/// The processor has AVX-512 F, BW and VL, AVX2 and FMA.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
pub(super) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: as above.
    unsafe { kernel.run::<Avx512>() }
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    const TILE_VECTORS: usize = 4;
    type F32 = __m512;
    type Words = __m512i;
    type Table = __m512;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F32 {
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F32 {
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F32) {
        unsafe { _mm512_storeu_ps(to, value) }
    }

    #[inline(always)]
    unsafe fn add(a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sum(value: Self::F32) -> f32 {
        unsafe { _mm512_reduce_add_ps(value) }
    }

    #[inline(always)]
    unsafe fn load_words(from: *const u8) -> Self::Words {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn shift_right<const BITS: u32>(words: Self::Words) -> Self::Words {
        unsafe { _mm512_srli_epi32::<BITS>(words) }
    }

    #[inline(always)]
    unsafe fn table(values: *const f32) -> Self::Table {
        unsafe { _mm512_loadu_ps(values) }
    }

    #[inline(always)]
    unsafe fn scale_table(table: Self::Table, scale: f32) -> Self::Table {
        unsafe { _mm512_mul_ps(table, _mm512_set1_ps(scale)) }
    }

    #[inline(always)]
    unsafe fn lookup(table: Self::Table, words: Self::Words) -> Self::F32 {
        unsafe { _mm512_permutexvar_ps(words, table) }
    }

    #[inline(always)]
    unsafe fn spread(values: *const f32, index: Self::Words) -> Self::F32 {
        unsafe { _mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_loadu_ps(values))) }
    }

    #[inline(always)]
    unsafe fn decode(table: Self::Table, codes: *const u8, n: usize, out: *mut f32) {
        for i in 0..n {
            unsafe {
                let bytes = _mm_loadu_si128(codes.add(16 * i).cast());
                // The bits above the low four of an index do not matter.
                let high = _mm_srli_epi16::<4>(bytes);
                let first = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(high, bytes));
                let second = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(high, bytes));
                _mm512_storeu_ps(out.add(32 * i), _mm512_permutexvar_ps(first, table));
                _mm512_storeu_ps(out.add(32 * i + 16), _mm512_permutexvar_ps(second, table));
            }
        }
    }

    fn tile_columns(vectors: usize) -> usize {
        match vectors {
            4 => 6,
            3 => 8,
            2 => 12,
            _ => 24,
        }
    }

    #[inline(always)]
    unsafe fn tile(t: Tile) {
        unsafe {
            match (t.vectors, t.columns) {
                (4, 6) => tile_of::<Self, 4, 6>(t),
                (4, 5) => tile_of::<Self, 4, 5>(t),
                (4, 4) => tile_of::<Self, 4, 4>(t),
                (4, 3) => tile_of::<Self, 4, 3>(t),
                (4, 2) => tile_of::<Self, 4, 2>(t),
                (4, 1) => tile_of::<Self, 4, 1>(t),
                (3, 8) => tile_of::<Self, 3, 8>(t),
                (2, 12) => tile_of::<Self, 2, 12>(t),
                (1, 24) => tile_of::<Self, 1, 24>(t),
                _ => unreachable!("columns of a tile"),
            }
        }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
