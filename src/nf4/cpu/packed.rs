//! A packed weight as the kernels read it, and any run of its values.
//!
//! Value `i` of the row-major `[d_out, d_in]` is `codebook[code(i)] · scale(i / block_size)`, rounded to f32 and then to the
//! weight's [`Precision`]: bit for bit what [`dequantize_blocks`](crate::nf4::blocks::dequantize_blocks) and a cast give,
//! since a block's sixteen values are formed first and looked up by code.

use std::ops::Range;

use super::precision::{Precision, bf16_table};
use crate::cpu::simd::Simd;
use crate::nf4::codebook::CODEBOOK;
use crate::nf4::double::{DYNAMIC_MAP, NESTED_BLOCK_SIZE};

/// The scales of the blocks.
#[derive(Clone, Copy)]
pub(crate) enum Scales<'a> {
    /// One f32 a block.
    Plain(&'a [f32]),
    /// Quantised to eight bits: the codes, one f32 a group, the offset.
    Double(&'a [u8], &'a [f32], f32),
}

/// A packed weight, borrowed.
#[derive(Clone, Copy)]
pub(crate) struct Packed<'a> {
    codes: &'a [u8],
    scales: Scales<'a>,
    /// `[d_out, d_in]`.
    pub(crate) shape: [usize; 2],
    /// Binary logarithm of the block size.
    log_block: u32,
    precision: Precision,
}

impl<'a> Packed<'a> {
    /// # Panics
    ///
    /// If there are fewer codes or scales than the shape demands, or no memory could hold them.
    pub(crate) fn new(
        codes: &'a [u8],
        scales: Scales<'a>,
        shape: [usize; 2],
        block_size: usize,
    ) -> Self {
        let n = shape[0].checked_mul(shape[1]);
        let n = n.expect("values of a packed weight that can be counted");
        let blocks = n.div_ceil(block_size);
        assert!(codes.len() >= n.div_ceil(2), "codes of a packed weight");
        assert!(
            match scales {
                Scales::Plain(absmax) => absmax.len() >= blocks,
                Scales::Double(codes, absmax, _) =>
                    codes.len() >= blocks && absmax.len() >= blocks.div_ceil(NESTED_BLOCK_SIZE),
            },
            "scales of a packed weight"
        );
        assert!(block_size.is_power_of_two() && block_size >= 32);
        Self {
            codes,
            scales,
            shape,
            log_block: block_size.trailing_zeros(),
            precision: Precision::F32,
        }
    }

    /// The same weight with its values rounded to another dtype than f32.
    pub(crate) fn rounded_to(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    pub(super) fn precision(&self) -> Precision {
        self.precision
    }

    pub(crate) fn len(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    pub(super) fn block_size(&self) -> usize {
        1 << self.log_block
    }

    #[inline(always)]
    pub(super) fn log_block(&self) -> u32 {
        self.log_block
    }

    /// Whether no block reaches over the end of a row.
    pub(super) fn rows_are_whole_blocks(&self) -> bool {
        self.shape[1].is_multiple_of(self.block_size())
    }

    /// Blocks of a row, where rows are whole blocks.
    pub(super) fn scales_of_row(&self) -> usize {
        self.shape[1] >> self.log_block
    }

    /// The byte that holds code `i`, and `i + 1` if `i` is even.
    #[inline(always)]
    pub(super) fn codes_at(&self, i: usize) -> *const u8 {
        self.codes[i / 2..].as_ptr()
    }

    /// The scale of a block.
    #[inline(always)]
    pub(super) fn scale(&self, block: usize) -> f32 {
        match self.scales {
            Scales::Plain(absmax) => absmax[block],
            Scales::Double(codes, absmax, offset) => {
                DYNAMIC_MAP[usize::from(codes[block])] * absmax[block / NESTED_BLOCK_SIZE] + offset
            }
        }
    }

    /// The scales of consecutive blocks.
    #[inline(always)]
    pub(super) fn scales(&self, first: usize, out: &mut [f32]) {
        match self.scales {
            Scales::Plain(absmax) => out.copy_from_slice(&absmax[first..first + out.len()]),
            Scales::Double(codes, absmax, offset) => {
                let codes = &codes[first..first + out.len()];
                for (i, (out, &code)) in out.iter_mut().zip(codes).enumerate() {
                    let group = absmax[(first + i) / NESTED_BLOCK_SIZE];
                    *out = DYNAMIC_MAP[usize::from(code)] * group + offset;
                }
            }
        }
    }

    /// Asks for the scales of consecutive blocks, which may be beyond the last.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    #[inline(always)]
    pub(super) unsafe fn prefetch_scales<S: Simd>(&self, first: usize, blocks: usize) {
        let (at, len) = match self.scales {
            Scales::Plain(absmax) => (absmax.as_ptr().wrapping_add(first).cast(), 4 * blocks),
            Scales::Double(codes, ..) => (codes.as_ptr().wrapping_add(first), blocks),
        };
        for line in (0..len).step_by(64) {
            // SAFETY: as asked; an address may be any.
            unsafe { S::prefetch_far(at.wrapping_add(line)) };
        }
    }

    /// The values of `range` to `out`, in f32.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    #[inline(always)]
    pub(super) unsafe fn decode<S: Simd>(&self, range: Range<usize>, out: &mut [f32]) {
        // SAFETY: as asked.
        unsafe { self.decode_to::<S, f32>(range, out) }
    }

    /// The bits of the values of `range` in bf16.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    #[inline(always)]
    pub(super) unsafe fn decode_bf16<S: Simd>(&self, range: Range<usize>, out: &mut [u16]) {
        // SAFETY: as asked.
        unsafe { self.decode_to::<S, u16>(range, out) }
    }

    #[inline(always)]
    unsafe fn decode_to<S: Simd, T: Decoded>(&self, range: Range<usize>, out: &mut [T]) {
        assert!(range.end <= self.len() && out.len() >= range.len());
        // SAFETY: the range lies within the codes and `out`, and every block it meets has a scale.
        unsafe {
            let mut out = out.as_mut_ptr();
            let mut i = range.start;
            while i < range.end {
                let block = i >> self.log_block;
                let end = range.end.min((block + 1) << self.log_block);
                let scale = self.scale(block);
                if i % 2 == 1 {
                    *out = T::round(self.precision, self.value(i, scale));
                    (i, out) = (i + 1, out.add(1));
                }
                let whole = (end - i) / 32;
                if whole > 0 {
                    T::decode::<S>(self.precision, scale, self.codes_at(i), whole, out);
                    (i, out) = (i + 32 * whole, out.add(32 * whole));
                }
                while i < end {
                    *out = T::round(self.precision, self.value(i, scale));
                    (i, out) = (i + 1, out.add(1));
                }
            }
        }
    }

    /// Value `i`, whose block has this scale, not rounded to the weight's precision.
    #[inline(always)]
    fn value(&self, i: usize, scale: f32) -> f32 {
        let byte = self.codes[i / 2];
        let code = if i.is_multiple_of(2) {
            byte >> 4
        } else {
            byte & 15
        };
        CODEBOOK[usize::from(code)] * scale
    }

    /// Values of one block from `first`, even, to `out`, by the block's table of 16-bit values.
    ///
    /// # Safety
    ///
    /// As [`Simd`].
    #[inline(always)]
    pub(super) unsafe fn decode_half<S: Simd, T: bytemuck::Pod>(
        &self,
        table: &[T; 16],
        first: usize,
        out: &mut [T],
    ) {
        const { assert!(size_of::<T>() == 2) };
        assert!(first.is_multiple_of(2));
        let codes = &self.codes[first / 2..][..out.len().div_ceil(2)];
        let whole = out.len() / 32;
        // SAFETY: table, codes and `out` hold as much, and `T` is 16 bits of any value.
        unsafe {
            S::decode_half(
                table.as_ptr().cast(),
                codes.as_ptr(),
                whole,
                out.as_mut_ptr().cast(),
            );
        }
        for i in 32 * whole..out.len() {
            let byte = codes[i / 2];
            let code = if i.is_multiple_of(2) {
                byte >> 4
            } else {
                byte & 15
            };
            out[i] = table[usize::from(code)];
        }
    }
}

/// What values are decoded to: f32, or the bits of a bf16.
trait Decoded: Copy {
    fn round(precision: Precision, value: f32) -> Self;

    /// The values of `32 · n` codes of one block.
    ///
    /// # Safety
    ///
    /// As [`Simd::decode`].
    unsafe fn decode<S: Simd>(
        precision: Precision,
        scale: f32,
        codes: *const u8,
        n: usize,
        out: *mut Self,
    );
}

impl Decoded for f32 {
    #[inline(always)]
    fn round(precision: Precision, value: f32) -> Self {
        precision.round(value)
    }

    #[inline(always)]
    unsafe fn decode<S: Simd>(
        precision: Precision,
        scale: f32,
        codes: *const u8,
        n: usize,
        out: *mut Self,
    ) {
        // SAFETY: as asked; tables have sixteen values.
        unsafe {
            let table = match precision {
                Precision::F32 => S::scale_table(S::table(CODEBOOK.as_ptr()), scale),
                _ => S::table(precision.table(scale).as_ptr()),
            };
            S::decode(table, codes, n, out)
        }
    }
}

impl Decoded for u16 {
    #[inline(always)]
    fn round(_: Precision, value: f32) -> Self {
        half::bf16::from_f32(value).to_bits()
    }

    #[inline(always)]
    unsafe fn decode<S: Simd>(
        _: Precision,
        scale: f32,
        codes: *const u8,
        n: usize,
        out: *mut Self,
    ) {
        // SAFETY: as asked; the table has sixteen values.
        unsafe { S::decode_half(bf16_table(scale).as_ptr(), codes, n, out) }
    }
}
