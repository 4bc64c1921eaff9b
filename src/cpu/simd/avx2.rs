//! AVX2 with fused multiply-add: eight f32 in a vector, a table of two vectors.

use std::arch::x86_64::*;

use super::{Simd, Tile, tile_of, tile_of_halves};
use crate::nf4::codebook::THRESHOLDS;

#[derive(Clone, Copy)]
pub(super) struct Avx2;

impl Simd for Avx2 {
    const LANES: usize = 8;
    const TILE_VECTORS: usize = 2;
    type F32 = __m256;
    type Words = __m256i;
    type Table = [__m256; 2];
    type Tables = Self::Table;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F32 {
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F32 {
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F32) {
        unsafe { _mm256_storeu_ps(to, value) }
    }

    #[inline(always)]
    unsafe fn add(a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::F32, b: Self::F32) -> Self::F32 {
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sum(value: Self::F32) -> f32 {
        unsafe {
            let four = _mm_add_ps(
                _mm256_castps256_ps128(value),
                _mm256_extractf128_ps::<1>(value),
            );
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    unsafe fn load_words(from: *const u8) -> Self::Words {
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn shift_right<const BITS: u32>(words: Self::Words) -> Self::Words {
        unsafe { _mm256_srl_epi32(words, _mm_cvtsi32_si128(BITS as i32)) }
    }

    #[inline(always)]
    unsafe fn table(values: *const f32) -> Self::Table {
        unsafe { [_mm256_loadu_ps(values), _mm256_loadu_ps(values.add(8))] }
    }

    #[inline(always)]
    unsafe fn scale_table(table: Self::Table, scale: f32) -> Self::Table {
        unsafe {
            let scale = _mm256_set1_ps(scale);
            [
                _mm256_mul_ps(table[0], scale),
                _mm256_mul_ps(table[1], scale),
            ]
        }
    }

    #[inline(always)]
    unsafe fn lookup(table: Self::Table, words: Self::Words) -> Self::F32 {
        unsafe {
            // Three bits choose in each half; the fourth, moved to the sign, chooses the half.
            let low = _mm256_permutevar8x32_ps(table[0], words);
            let high = _mm256_permutevar8x32_ps(table[1], words);
            _mm256_blendv_ps(
                low,
                high,
                _mm256_castsi256_ps(_mm256_slli_epi32::<28>(words)),
            )
        }
    }

    #[inline(always)]
    unsafe fn tables([values, _]: [&[f32; 16]; 2]) -> Self::Tables {
        unsafe { Self::table(values.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn lookup_by_eight(tables: Self::Tables, words: Self::Words) -> Self::F32 {
        unsafe { Self::lookup(tables, words) }
    }

    #[inline(always)]
    unsafe fn spread(values: *const f32, index: Self::Words) -> Self::F32 {
        unsafe { _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(values)), index) }
    }

    #[inline(always)]
    unsafe fn decode(table: Self::Table, codes: *const u8, n: usize, out: *mut f32) {
        for i in 0..n {
            unsafe {
                let bytes = _mm_loadu_si128(codes.add(16 * i).cast());
                // The bits above the low four of an index do not matter.
                let high = _mm_srli_epi16::<4>(bytes);
                for (half, codes) in [
                    _mm_unpacklo_epi8(high, bytes),
                    _mm_unpackhi_epi8(high, bytes),
                ]
                .into_iter()
                .enumerate()
                {
                    let first = _mm256_cvtepu8_epi32(codes);
                    let second = _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(codes, codes));
                    let out = out.add(32 * i + 16 * half);
                    _mm256_storeu_ps(out, Self::lookup(table, first));
                    _mm256_storeu_ps(out.add(8), Self::lookup(table, second));
                }
            }
        }
    }

    fn tile_columns(vectors: usize) -> usize {
        match vectors {
            2 => 6,
            _ => 12,
        }
    }

    #[inline(always)]
    unsafe fn tile(t: Tile) {
        unsafe {
            match t.vectors {
                2 => tile_of::<Self, false, 2, 6>(t),
                _ => tile_of::<Self, false, 1, 12>(t),
            }
        }
    }

    // Words of two bf16.

    #[inline(always)]
    unsafe fn halves(words: Self::F32) -> [Self::F32; 2] {
        unsafe {
            let bits = _mm256_castps_si256(words);
            let high = _mm256_and_si256(bits, _mm256_set1_epi32(-1 << 16));
            let low = _mm256_slli_epi32::<16>(bits);
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
        }
    }

    #[inline(always)]
    unsafe fn tile_of_pairs(t: Tile) {
        unsafe {
            match t.vectors {
                2 => tile_of_halves::<Self, 2, 6>(t),
                _ => tile_of_halves::<Self, 1, 12>(t),
            }
        }
    }

    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        unsafe { super::transpose::eight(from, from_stride, to, to_stride) }
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
        unsafe { _mm256_set1_epi32(word as i32) }
    }

    #[inline(always)]
    unsafe fn store_words(to: *mut u32, words: Self::Words) {
        unsafe { _mm256_storeu_si256(to.cast(), words) }
    }

    #[inline(always)]
    unsafe fn insert<const BITS: u32>(words: Self::Words, more: Self::Words) -> Self::Words {
        unsafe {
            let more = _mm256_sll_epi32(more, _mm_cvtsi32_si128(BITS as i32));
            _mm256_or_si256(words, more)
        }
    }

    #[inline(always)]
    unsafe fn max_magnitude(bits: Self::Words, value: Self::F32) -> Self::Words {
        unsafe {
            let magnitude =
                _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(i32::MAX));
            _mm256_max_epu32(bits, magnitude)
        }
    }

    #[inline(always)]
    unsafe fn max_word(words: Self::Words) -> u32 {
        unsafe {
            let four = _mm_max_epu32(
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            let two = _mm_max_epu32(four, _mm_shuffle_epi32::<0b_10_11_10_11>(four));
            let one = _mm_max_epu32(two, _mm_shuffle_epi32::<1>(two));
            _mm_cvtsi128_si32(one) as u32
        }
    }

    #[inline(always)]
    unsafe fn nearest(value: Self::F32) -> Self::Words {
        /// The thresholds of one step of the search, for the negative number of those known to be below: the permute
        /// reads its low three bits.
        const fn step(first: usize, stride: usize) -> [f32; 8] {
            let mut thresholds = [0.0; 8];
            let mut below = 0;
            while first + stride * below < THRESHOLDS.len() {
                thresholds[(8 - below) % 8] = THRESHOLDS[first + stride * below];
                below += 1;
            }
            thresholds
        }
        const THIRD: [f32; 8] = step(1, 4);
        const FOURTH: [f32; 8] = step(0, 2);
        /// `2 · below`, and one more (downwards) where the threshold is below the value: a true comparison is -1.
        #[inline(always)]
        unsafe fn halve(below: __m256i, threshold: __m256, value: __m256) -> __m256i {
            unsafe {
                let is_below = _mm256_cmp_ps::<_CMP_LT_OQ>(threshold, value);
                _mm256_add_epi32(
                    _mm256_add_epi32(below, below),
                    _mm256_castps_si256(is_below),
                )
            }
        }
        unsafe {
            // Binary search.
            let first = _mm256_set1_ps(THRESHOLDS[7]);
            let below = halve(_mm256_setzero_si256(), first, value);
            let second = _mm256_blendv_ps(
                _mm256_set1_ps(THRESHOLDS[3]),
                _mm256_set1_ps(THRESHOLDS[11]),
                _mm256_castsi256_ps(below),
            );
            let below = halve(below, second, value);
            let third = _mm256_permutevar8x32_ps(_mm256_loadu_ps(THIRD.as_ptr()), below);
            let below = halve(below, third, value);
            let fourth = _mm256_permutevar8x32_ps(_mm256_loadu_ps(FOURTH.as_ptr()), below);
            let below = halve(below, fourth, value);
            _mm256_sub_epi32(_mm256_setzero_si256(), below)
        }
    }

    #[inline(always)]
    unsafe fn encode(values: *const f32, factor: f32, n: usize, codes: *mut u8) {
        unsafe {
            let factor = _mm256_set1_ps(factor);
            for i in 0..n {
                let mut parts = [_mm256_setzero_si256(); 4];
                for (j, part) in parts.iter_mut().enumerate() {
                    let values = _mm256_loadu_ps(values.add(32 * i + 8 * j));
                    *part = Self::nearest(_mm256_mul_ps(values, factor));
                }
                let [a, b, c, d] = parts;
                // A byte a code; each half of the vector holds four of `a`, of `b`, of `c`, of `d`.
                let bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
                // 16 · first + second of each pair.
                let bytes = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(1 << 8 | 16));
                let bytes = _mm256_packus_epi16(bytes, bytes);
                let bytes = _mm_unpacklo_epi16(
                    _mm256_castsi256_si128(bytes),
                    _mm256_extracti128_si256::<1>(bytes),
                );
                _mm_storeu_si128(codes.add(16 * i).cast(), bytes);
            }
        }
    }

    #[inline(always)]
    unsafe fn decode_half(table: *const u16, codes: *const u8, n: usize, out: *mut u16) {
        unsafe {
            // The low and the high bytes of the table, each to be looked up by a shuffle.
            let bytes = _mm256_set1_epi16(0xff);
            let table = _mm256_loadu_si256(table.cast());
            let split = _mm256_packus_epi16(
                _mm256_and_si256(table, bytes),
                _mm256_srli_epi16::<8>(table),
            );
            let low = _mm256_permute4x64_epi64::<0b_10_00_10_00>(split);
            let high = _mm256_permute4x64_epi64::<0b_11_01_11_01>(split);
            let nibble = _mm_set1_epi8(15);
            for i in 0..n {
                let bytes = _mm_loadu_si128(codes.add(16 * i).cast());
                let second = _mm_and_si128(bytes, nibble);
                let first = _mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble);
                let index = _mm256_set_m128i(
                    _mm_unpackhi_epi8(first, second),
                    _mm_unpacklo_epi8(first, second),
                );
                let low = _mm256_shuffle_epi8(low, index);
                let high = _mm256_shuffle_epi8(high, index);
                let (even, odd) = (
                    _mm256_unpacklo_epi8(low, high),
                    _mm256_unpackhi_epi8(low, high),
                );
                let out = out.add(32 * i);
                _mm256_storeu_si256(out.cast(), _mm256_permute2x128_si256::<0x20>(even, odd));
                _mm256_storeu_si256(
                    out.add(16).cast(),
                    _mm256_permute2x128_si256::<0x31>(even, odd),
                );
            }
        }
    }
}
