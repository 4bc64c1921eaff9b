//! AVX-512: sixteen f32 in a vector, so that the whole codebook is one; with products of bf16, or without.

// The tests compile this file a second time, over `arch` in plain code.
use super::arch::*;
use crate::cpu::simd::{Simd, SimdOfPairs, Tile, cells, tile_of, tile_of_halves, transpose};

/// `BF16`: the processor has products of bf16.
#[derive(Clone, Copy)]
pub(in crate::cpu::simd) struct Avx512<const BF16: bool>;

/// `words & mask`, and in the second half of the lanes `bit` besides.
///
/// # Safety
///
/// The processor has AVX-512 F.
#[inline(always)]
unsafe fn by_half(words: __m512i, mask: __m512i, bit: __m512i) -> __m512i {
    unsafe {
        let words = _mm512_and_si512(words, mask);
        _mm512_mask_or_epi32(words, 0xff00, words, bit)
    }
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    const LANES: usize = 16;
    const TILE_VECTORS: usize = 4;
    type F32 = __m512;
    type Words = __m512i;
    type Table = __m512;
    type Tables = [__m512; 2];

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
    unsafe fn tables([first, second]: [&[f32; 16]; 2]) -> Self::Tables {
        unsafe { [Self::table(first.as_ptr()), Self::table(second.as_ptr())] }
    }

    #[inline(always)]
    unsafe fn lookup_by_eight(tables: Self::Tables, words: Self::Words) -> Self::F32 {
        unsafe {
            // The fifth bit of an index chooses the table.
            let index = by_half(words, _mm512_set1_epi32(15), _mm512_set1_epi32(16));
            _mm512_permutex2var_ps(tables[0], index, tables[1])
        }
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
            match t.vectors {
                4 => tile_of::<Self, false, 4, 6>(t),
                3 => tile_of::<Self, false, 3, 8>(t),
                2 => tile_of::<Self, false, 2, 12>(t),
                _ => tile_of::<Self, false, 1, 24>(t),
            }
        }
    }

    // Words of two bf16.

    #[inline(always)]
    unsafe fn halves(words: Self::F32) -> [Self::F32; 2] {
        unsafe {
            let bits = _mm512_castps_si512(words);
            let low = _mm512_slli_epi32::<16>(bits);
            let high = _mm512_and_si512(bits, _mm512_set1_epi32(-1 << 16));
            [_mm512_castsi512_ps(low), _mm512_castsi512_ps(high)]
        }
    }

    #[inline(always)]
    unsafe fn tile_of_pairs(t: Tile) {
        unsafe {
            match (BF16, t.vectors) {
                (true, 4) => tile_of::<Self, true, 4, 6>(t),
                (true, 3) => tile_of::<Self, true, 3, 8>(t),
                (true, 2) => tile_of::<Self, true, 2, 12>(t),
                (true, _) => tile_of::<Self, true, 1, 24>(t),
                (false, 4) => tile_of_halves::<Self, 4, 6>(t),
                (false, 3) => tile_of_halves::<Self, 3, 8>(t),
                (false, 2) => tile_of_halves::<Self, 2, 12>(t),
                (false, _) => tile_of_halves::<Self, 1, 24>(t),
            }
        }
    }

    #[inline(always)]
    unsafe fn mul_add_pairs(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        unsafe {
            if BF16 {
                let a = std::mem::transmute::<__m512, __m512bh>(a);
                let b = std::mem::transmute::<__m512, __m512bh>(b);
                return _mm512_dpbf16_ps(c, a, b);
            }
            let ([a0, a1], [b0, b1]) = (Self::halves(a), Self::halves(b));
            Self::mul_add(a1, b1, Self::mul_add(a0, b0, c))
        }
    }

    #[inline(always)]
    unsafe fn pair(a: *const u16, b: *const u16, n: usize, out: *mut u32) {
        unsafe {
            let whole = n / 16 * 16;
            for i in (0..whole).step_by(16) {
                let a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(a.add(i).cast()));
                let b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(b.add(i).cast()));
                let pairs = _mm512_or_si512(a, _mm512_slli_epi32::<16>(b));
                _mm512_storeu_si512(out.add(i).cast(), pairs);
            }
            for i in whole..n {
                let (a, b) = (a.add(i).read_unaligned(), b.add(i).read_unaligned());
                out.add(i)
                    .write_unaligned(u32::from(a) | u32::from(b) << 16);
            }
        }
    }

    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        unsafe { transpose::eight(from, from_stride, to, to_stride) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn prefetch_far(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    // Quantising and 16-bit values.

    #[inline(always)]
    unsafe fn splat_word(word: u32) -> Self::Words {
        unsafe { _mm512_set1_epi32(word as i32) }
    }

    #[inline(always)]
    unsafe fn store_words(to: *mut u32, words: Self::Words) {
        unsafe { _mm512_storeu_si512(to.cast(), words) }
    }

    #[inline(always)]
    unsafe fn insert<const BITS: u32>(words: Self::Words, more: Self::Words) -> Self::Words {
        unsafe { _mm512_or_si512(words, _mm512_slli_epi32::<BITS>(more)) }
    }

    #[inline(always)]
    unsafe fn max_magnitude(bits: Self::Words, value: Self::F32) -> Self::Words {
        unsafe {
            let magnitude = _mm512_castps_si512(_mm512_abs_ps(value));
            _mm512_max_epu32(bits, magnitude)
        }
    }

    #[inline(always)]
    unsafe fn max_word(words: Self::Words) -> u32 {
        unsafe { _mm512_reduce_max_epu32(words) }
    }

    #[inline(always)]
    unsafe fn nearest(value: Self::F32) -> Self::Words {
        unsafe {
            // The permutes read the low five bits of an index alone.
            let cell = _mm512_castps_si512(_mm512_fmadd_ps(
                value,
                _mm512_set1_ps(cells::SCALE),
                _mm512_set1_ps(cells::ROUNDER),
            ));
            let limits = cells::LIMITS.as_ptr();
            let limit = _mm512_permutex2var_ps(
                _mm512_loadu_ps(limits),
                cell,
                _mm512_loadu_ps(limits.add(16)),
            );
            let bases = cells::BASES.as_ptr();
            let base = _mm512_permutex2var_epi32(
                _mm512_loadu_si512(bases.cast()),
                cell,
                _mm512_loadu_si512(bases.add(16).cast()),
            );
            let above = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(limit, value);
            _mm512_mask_add_epi32(base, above, base, _mm512_set1_epi32(1))
        }
    }

    #[inline(always)]
    unsafe fn encode(values: *const f32, factor: f32, n: usize, codes: *mut u8) {
        unsafe {
            let factor = _mm512_set1_ps(factor);
            // Four words at a time of either vector, as packing two vectors leaves them, back in order.
            let order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
            for i in 0..n {
                let values = values.add(32 * i);
                let first = Self::nearest(_mm512_mul_ps(_mm512_loadu_ps(values), factor));
                let second = Self::nearest(_mm512_mul_ps(_mm512_loadu_ps(values.add(16)), factor));
                // 16 · first + second of each pair.
                let bytes = _mm512_madd_epi16(
                    _mm512_packs_epi32(first, second),
                    _mm512_set1_epi32(1 << 16 | 16),
                );
                let bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(bytes), order);
                _mm_storeu_si128(codes.add(16 * i).cast(), bytes);
            }
        }
    }

    #[inline(always)]
    unsafe fn decode_half(table: *const u16, codes: *const u8, n: usize, out: *mut u16) {
        unsafe {
            // Twice, since five bits of an index are read.
            let table = _mm512_broadcast_i64x4(_mm256_loadu_si256(table.cast()));
            for i in 0..n {
                let pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(codes.add(16 * i).cast()));
                // The first code of a byte into the low half of a word, the second into the high half.
                let pairs = _mm512_cvtepu16_epi32(pairs);
                let index = _mm512_or_si512(
                    _mm512_srli_epi32::<4>(pairs),
                    _mm512_slli_epi32::<16>(pairs),
                );
                let values = _mm512_permutexvar_epi16(index, table);
                _mm512_storeu_si512(out.add(32 * i).cast(), values);
            }
        }
    }
}

impl SimdOfPairs for Avx512<true> {
    type Tables16 = __m512i;

    #[inline(always)]
    unsafe fn tables16([first, second]: [&[u16; 16]; 2]) -> Self::Tables16 {
        unsafe {
            let first = _mm512_castsi256_si512(_mm256_loadu_si256(first.as_ptr().cast()));
            _mm512_inserti64x4::<1>(first, _mm256_loadu_si256(second.as_ptr().cast()))
        }
    }

    #[inline(always)]
    unsafe fn lookup_pairs<const BITS: u32>(
        tables: Self::Tables16,
        words: Self::Words,
    ) -> Self::F32 {
        unsafe {
            // The fifth bit of an index chooses the table; those above are not read.
            let index = _mm512_srli_epi16::<BITS>(words);
            let index = by_half(index, _mm512_set1_epi16(15), _mm512_set1_epi16(16));
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, tables))
        }
    }
}
