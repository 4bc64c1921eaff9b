//! No instruction in particular: arrays that the compiler vectorises as the target allows.

use super::cells;
use super::{Simd, Tile, tile_of, tile_of_halves};

#[derive(Clone, Copy)]
pub(super) struct Portable;

const N: usize = 8;

impl Simd for Portable {
    const LANES: usize = N;
    const TILE_VECTORS: usize = 1;
    type F32 = [f32; N];
    type Words = [u32; N];
    type Table = [f32; 16];
    type Tables = [f32; 16];

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
    unsafe fn tables([values, _]: [&[f32; 16]; 2]) -> Self::Tables {
        *values
    }

    #[inline(always)]
    unsafe fn lookup_by_eight(tables: Self::Tables, words: Self::Words) -> Self::F32 {
        unsafe { Self::lookup(tables, words) }
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
                let pair = [byte >> 4, byte & 15].map(|code| table[usize::from(code)]);
                out.cast::<[f32; 2]>().add(i).write_unaligned(pair);
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

    // Words of two bf16.

    #[inline(always)]
    unsafe fn halves(words: Self::F32) -> [Self::F32; 2] {
        let bits = words.map(f32::to_bits);
        [
            bits.map(|bits| f32::from_bits(bits << 16)),
            bits.map(|bits| f32::from_bits(bits & 0xffff_0000)),
        ]
    }

    #[inline(always)]
    unsafe fn tile_of_pairs(t: Tile) {
        unsafe { tile_of_halves::<Self, 1, 4>(t) }
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
                let pair = values.cast::<[f32; 2]>().add(i).read_unaligned();
                let [first, second] = pair.map(|value| code(value * factor));
                *codes.add(i) = (first << 4 | second) as u8;
            }
        }
    }

    #[inline(always)]
    unsafe fn decode_half(table: *const u16, codes: *const u8, n: usize, out: *mut u16) {
        let table = unsafe { table.cast::<[u16; 16]>().read_unaligned() };
        for i in 0..16 * n {
            unsafe {
                let byte = *codes.add(i);
                let pair = [byte >> 4, byte & 15].map(|code| table[usize::from(code)]);
                out.cast::<[u16; 2]>().add(i).write_unaligned(pair);
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
