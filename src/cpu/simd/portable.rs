//! No instruction in particular: arrays that the compiler vectorises as the target allows.

use super::cells;
use super::{Simd, Tile, tile_of};

#[derive(Clone, Copy)]
pub(super) struct Portable;

const N: usize = 8;

impl Simd for Portable {
    const LANES: usize = N;
    const TILE_VECTORS: usize = 1;
    type F32 = [f32; N];
    type Words = [u32; N];
    type Table = [f32; 16];
    type Table16 = ();

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F32 {
        [value; N]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F32 {
        unsafe { from.cast::<Self::F32>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F32) {
        unsafe { to.cast::<Self::F32>().write_unaligned(value) }
    }

    #[inline(always)]
    unsafe fn add(a: Self::F32, b: Self::F32) -> Self::F32 {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn mul(a: Self::F32, b: Self::F32) -> Self::F32 {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // Not `f32::mul_add`, which is a call where the processor has no such instruction.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    unsafe fn sum(value: Self::F32) -> f32 {
        value.iter().sum()
    }

    #[inline(always)]
    unsafe fn load_words(from: *const u8) -> Self::Words {
        let words = unsafe { from.cast::<Self::Words>().read_unaligned() };
        words.map(u32::from_le)
    }

    #[inline(always)]
    unsafe fn shift_right<const BITS: u32>(words: Self::Words) -> Self::Words {
        words.map(|word| word >> BITS)
    }

    #[inline(always)]
    unsafe fn table(values: *const f32) -> Self::Table {
        unsafe { values.cast::<Self::Table>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn scale_table(table: Self::Table, scale: f32) -> Self::Table {
        table.map(|value| value * scale)
    }

    #[inline(always)]
    unsafe fn lookup(table: Self::Table, words: Self::Words) -> Self::F32 {
        words.map(|word| table[(word & 15) as usize])
    }

    #[inline(always)]
    unsafe fn spread(values: *const f32, index: Self::Words) -> Self::F32 {
        let values = unsafe { values.cast::<[f32; 4]>().read_unaligned() };
        index.map(|index| values[index as usize & 3])
    }

    #[inline(always)]
    unsafe fn decode(table: Self::Table, codes: *const u8, n: usize, out: *mut f32) {
        for i in 0..16 * n {
            unsafe {
                let byte = *codes.add(i);
                *out.add(2 * i) = table[usize::from(byte >> 4)];
                *out.add(2 * i + 1) = table[usize::from(byte & 15)];
            }
        }
    }

    fn tile_columns(_vectors: usize) -> usize {
        4
    }

    #[inline(always)]
    unsafe fn tile(t: Tile) {
        unsafe { tile_of::<Self, false, 1, 4>(t) }
    }

    // Quantising and 16-bit values.

    #[inline(always)]
    unsafe fn splat_word(word: u32) -> Self::Words {
        [word; N]
    }

    #[inline(always)]
    unsafe fn store_words(to: *mut u32, words: Self::Words) {
        unsafe { to.cast::<Self::Words>().write_unaligned(words) }
    }

    #[inline(always)]
    unsafe fn insert<const BITS: u32>(words: Self::Words, more: Self::Words) -> Self::Words {
        std::array::from_fn(|i| words[i] | more[i] << BITS)
    }

    #[inline(always)]
    unsafe fn max_magnitude(bits: Self::Words, value: Self::F32) -> Self::Words {
        std::array::from_fn(|i| bits[i].max(value[i].abs().to_bits()))
    }

    #[inline(always)]
    unsafe fn max_word(words: Self::Words) -> u32 {
        words.into_iter().fold(0, u32::max)
    }

    #[inline(always)]
    unsafe fn nearest(value: Self::F32) -> Self::Words {
        value.map(code)
    }

    #[inline(always)]
    unsafe fn encode(values: *const f32, factor: f32, n: usize, codes: *mut u8) {
        for i in 0..16 * n {
            unsafe {
                let first = code(*values.add(2 * i) * factor);
                let second = code(*values.add(2 * i + 1) * factor);
                *codes.add(i) = (first << 4 | second) as u8;
            }
        }
    }

    #[inline(always)]
    unsafe fn decode_half(table: *const u16, codes: *const u8, n: usize, out: *mut u16) {
        for i in 0..16 * n {
            unsafe {
                let byte = usize::from(*codes.add(i));
                *out.add(2 * i) = *table.add(byte >> 4);
                *out.add(2 * i + 1) = *table.add(byte & 15);
            }
        }
    }
}

/// The code of a value of `[-1, 1]`.
#[inline(always)]
fn code(value: f32) -> u32 {
    let cell = cells::cell(value);
    cells::BASES[cell] + u32::from(cells::LIMITS[cell] < value)
}
