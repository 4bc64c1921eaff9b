//! No instruction in particular: arrays that the compiler vectorises as the target allows.

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

    #[inline(always)]
    unsafe fn decode_bf16(table: Self::Table, codes: *const u8, n: usize, out: *mut u16) {
        unsafe { super::decode_bf16(table, codes, n, out) }
    }

    unsafe fn table16(_: Self::Table) -> Self::Table16 {
        unreachable!("no products of bf16")
    }

    unsafe fn lookup_pairs<const BITS: u32>(_: Self::Table16, _: Self::Words) -> Self::F32 {
        unreachable!("no products of bf16")
    }

    unsafe fn tile_of_pairs(_: Tile) {
        unreachable!("no products of bf16")
    }

    unsafe fn mul_add_pairs(_: Self::F32, _: Self::F32, _: Self::F32) -> Self::F32 {
        unreachable!("no products of bf16")
    }
}
