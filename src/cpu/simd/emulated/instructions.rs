//! The instructions of AVX-512 that the kernels use, as Intel's manual describes them, lane by lane.

#![allow(non_camel_case_types)]

pub(super) use std::arch::x86_64::*;

use half::bf16;

/// Sixteen f32.
#[derive(Clone, Copy)]
pub(crate) struct __m512([f32; 16]);

/// Sixteen words.
#[derive(Clone, Copy)]
pub(crate) struct __m512i([u32; 16]);

/// Thirty-two bf16.
#[derive(Clone, Copy)]
pub(crate) struct __m512bh([u16; 32]);

type __mmask16 = u16;

fn zip<A: Copy, B: Copy, C>(a: [A; 16], b: [B; 16], f: impl Fn(A, B) -> C) -> [C; 16] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

fn floats(bits: [u32; 16]) -> [f32; 16] {
    bits.map(f32::from_bits)
}

fn bits(floats: [f32; 16]) -> [u32; 16] {
    floats.map(f32::to_bits)
}

impl __m512i {
    /// In halves of words, the low one first.
    fn halves(self) -> [u16; 32] {
        std::array::from_fn(|i| (self.0[i / 2] >> (16 * (i % 2))) as u16)
    }

    fn of_halves(halves: [u16; 32]) -> Self {
        Self(std::array::from_fn(|i| {
            u32::from(halves[2 * i]) | u32::from(halves[2 * i + 1]) << 16
        }))
    }
}

/// The lanes of a vector of the processor's own.
fn lanes<V: Copy, T: Copy, const N: usize>(vector: V) -> [T; N] {
    assert_eq!(size_of::<V>(), size_of::<[T; N]>());
    // SAFETY: as large, and lanes are plain integers or floats.
    unsafe { std::mem::transmute_copy(&vector) }
}

pub(super) fn _mm512_set1_ps(value: f32) -> __m512 {
    __m512([value; 16])
}

pub(super) fn _mm512_set1_epi32(value: i32) -> __m512i {
    __m512i([value as u32; 16])
}

pub(super) fn _mm512_set1_epi16(value: i16) -> __m512i {
    __m512i::of_halves([value as u16; 32])
}

pub(super) unsafe fn _mm512_loadu_ps(from: *const f32) -> __m512 {
    // SAFETY: as asked.
    __m512(unsafe { from.cast::<[f32; 16]>().read_unaligned() })
}

pub(super) unsafe fn _mm512_loadu_si512(from: *const __m512i) -> __m512i {
    // SAFETY: as asked.
    __m512i(unsafe { from.cast::<[u32; 16]>().read_unaligned() })
}

pub(super) unsafe fn _mm512_storeu_ps(to: *mut f32, value: __m512) {
    // SAFETY: as asked.
    unsafe { to.cast::<[f32; 16]>().write_unaligned(value.0) }
}

pub(super) unsafe fn _mm512_storeu_si512(to: *mut __m512i, value: __m512i) {
    // SAFETY: as asked.
    unsafe { to.cast::<[u32; 16]>().write_unaligned(value.0) }
}

pub(super) fn _mm512_add_ps(a: __m512, b: __m512) -> __m512 {
    __m512(zip(a.0, b.0, |a, b| a + b))
}

pub(super) fn _mm512_mul_ps(a: __m512, b: __m512) -> __m512 {
    __m512(zip(a.0, b.0, |a, b| a * b))
}

pub(super) fn _mm512_fmadd_ps(a: __m512, b: __m512, c: __m512) -> __m512 {
    __m512(std::array::from_fn(|i| a.0[i].mul_add(b.0[i], c.0[i])))
}

pub(super) fn _mm512_abs_ps(a: __m512) -> __m512 {
    __m512(a.0.map(f32::abs))
}

pub(super) fn _mm512_reduce_add_ps(a: __m512) -> f32 {
    let halves = |values: &[f32]| -> Vec<f32> {
        let (low, high) = values.split_at(values.len() / 2);
        low.iter().zip(high).map(|(a, b)| a + b).collect()
    };
    halves(&halves(&halves(&halves(&a.0))))[0]
}

pub(super) fn _mm512_reduce_max_epu32(a: __m512i) -> u32 {
    a.0.into_iter().fold(0, u32::max)
}

pub(super) fn _mm512_max_epu32(a: __m512i, b: __m512i) -> __m512i {
    __m512i(zip(a.0, b.0, u32::max))
}

pub(super) fn _mm512_and_si512(a: __m512i, b: __m512i) -> __m512i {
    __m512i(zip(a.0, b.0, |a, b| a & b))
}

pub(super) fn _mm512_or_si512(a: __m512i, b: __m512i) -> __m512i {
    __m512i(zip(a.0, b.0, |a, b| a | b))
}

pub(super) fn _mm512_mask_or_epi32(src: __m512i, k: u16, a: __m512i, b: __m512i) -> __m512i {
    let or = _mm512_or_si512(a, b).0;
    __m512i(std::array::from_fn(|i| {
        [src.0[i], or[i]][usize::from(k >> i & 1)]
    }))
}

pub(super) fn _mm512_mask_add_epi32(src: __m512i, k: u16, a: __m512i, b: __m512i) -> __m512i {
    let sum = zip(a.0, b.0, u32::wrapping_add);
    __m512i(std::array::from_fn(|i| {
        [src.0[i], sum[i]][usize::from(k >> i & 1)]
    }))
}

pub(super) fn _mm512_cmp_ps_mask<const OP: i32>(a: __m512, b: __m512) -> __mmask16 {
    assert_eq!(OP, _CMP_LT_OQ);
    let below = zip(a.0, b.0, |a, b| a < b);
    (0..16).fold(0, |mask, i| mask | u16::from(below[i]) << i)
}

pub(super) fn _mm512_srli_epi32<const BITS: u32>(a: __m512i) -> __m512i {
    __m512i(a.0.map(|a| a.checked_shr(BITS).unwrap_or(0)))
}

pub(super) fn _mm512_slli_epi32<const BITS: u32>(a: __m512i) -> __m512i {
    __m512i(a.0.map(|a| a.checked_shl(BITS).unwrap_or(0)))
}

pub(super) fn _mm512_srli_epi16<const BITS: u32>(a: __m512i) -> __m512i {
    let shifted = a.halves().map(|a| a.checked_shr(BITS).unwrap_or(0));
    __m512i::of_halves(shifted)
}

pub(super) fn _mm512_permutexvar_ps(index: __m512i, a: __m512) -> __m512 {
    __m512(index.0.map(|i| a.0[(i & 15) as usize]))
}

pub(super) fn _mm512_permutex2var_ps(a: __m512, index: __m512i, b: __m512) -> __m512 {
    let either = |i: u32| [a.0, b.0][(i >> 4 & 1) as usize][(i & 15) as usize];
    __m512(index.0.map(either))
}

pub(super) fn _mm512_permutex2var_epi32(a: __m512i, index: __m512i, b: __m512i) -> __m512i {
    let either = |i: u32| [a.0, b.0][(i >> 4 & 1) as usize][(i & 15) as usize];
    __m512i(index.0.map(either))
}

pub(super) fn _mm512_permutexvar_epi16(index: __m512i, a: __m512i) -> __m512i {
    let a = a.halves();
    let chosen = index.halves().map(|i| a[usize::from(i & 31)]);
    __m512i::of_halves(chosen)
}

pub(super) fn _mm512_castps_si512(a: __m512) -> __m512i {
    __m512i(bits(a.0))
}

pub(super) fn _mm512_castsi512_ps(a: __m512i) -> __m512 {
    __m512(floats(a.0))
}

/// The upper lanes are undefined: here, what no one expects.
pub(super) fn _mm512_castps128_ps512(a: __m128) -> __m512 {
    let low: [f32; 4] = lanes(a);
    __m512(std::array::from_fn(|i| *low.get(i).unwrap_or(&f32::NAN)))
}

/// The upper lanes are undefined: here, what no one expects.
pub(super) fn _mm512_castsi256_si512(a: __m256i) -> __m512i {
    let low: [u32; 8] = lanes(a);
    __m512i(std::array::from_fn(|i| *low.get(i).unwrap_or(&0x7fc1_2345)))
}

pub(super) fn _mm512_inserti64x4<const HALF: i32>(a: __m512i, b: __m256i) -> __m512i {
    let own: [u32; 8] = lanes(b);
    __m512i(std::array::from_fn(|i| match i / 8 == HALF as usize {
        true => own[i % 8],
        false => a.0[i],
    }))
}

pub(super) fn _mm512_broadcast_i64x4(a: __m256i) -> __m512i {
    let own: [u32; 8] = lanes(a);
    __m512i(std::array::from_fn(|i| own[i % 8]))
}

pub(super) fn _mm512_cvtepu8_epi32(a: __m128i) -> __m512i {
    __m512i(lanes::<_, u8, 16>(a).map(u32::from))
}

pub(super) fn _mm512_cvtepu16_epi32(a: __m256i) -> __m512i {
    __m512i(lanes::<_, u16, 16>(a).map(u32::from))
}

pub(super) fn _mm512_cvtepi32_epi8(a: __m512i) -> __m128i {
    let bytes = a.0.map(|a| a as u8);
    // SAFETY: sixteen bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

/// Four words of `a` and four of `b` in each 128 bits.
pub(super) fn _mm512_packs_epi32(a: __m512i, b: __m512i) -> __m512i {
    let packed = std::array::from_fn(|i| {
        let (lane, within) = (i / 8, i % 8);
        let from = [a.0, b.0][within / 4][4 * lane + within % 4] as i32;
        from.clamp(i16::MIN.into(), i16::MAX.into()) as i16 as u16
    });
    __m512i::of_halves(packed)
}

pub(super) fn _mm512_madd_epi16(a: __m512i, b: __m512i) -> __m512i {
    let (a, b) = (a.halves(), b.halves());
    let product = |i: usize| i32::from(a[i] as i16) * i32::from(b[i] as i16);
    __m512i(std::array::from_fn(|i| {
        product(2 * i).wrapping_add(product(2 * i + 1)) as u32
    }))
}

/// The second product of a pair first. Subnormal numbers count as zero, as operands and as results.
pub(super) fn _mm512_dpbf16_ps(c: __m512, a: __m512bh, b: __m512bh) -> __m512 {
    let flushed = |value: f32| if value.is_subnormal() { 0.0 } else { value };
    let wide = |value: u16| flushed(bf16::from_bits(value).to_f32());
    __m512(std::array::from_fn(|i| {
        let sum = |sum: f32, at: usize| flushed(wide(a.0[at]).mul_add(wide(b.0[at]), sum));
        sum(sum(flushed(c.0[i]), 2 * i + 1), 2 * i)
    }))
}
