//! A weight that is packed piece by piece, in the memory that it stays in.
//!
//! Blocks run over the row-major `[d_out, d_in]` values and do not depend on each other, so that any runs of whole blocks,
//! in any order and on any threads, give what quantising all values at once gives. Only double quantisation needs the
//! scales of all blocks, of which it takes the mean.

use burn::tensor::Device;
use bytemuck::cast_slice_mut;
use rayon::prelude::*;

use super::blocks::{BlockSize, packed_len};
use super::cpu::{self, Isa};
use super::data::{Nf4Config, Nf4Scales};
use super::float::Nf4Float;
use super::weight::Nf4Weight;
use crate::Result;

/// A number of values that every block size divides, so that pieces of as many begin with a block and a byte.
pub(crate) const PIECE_UNIT: usize = 4096;

/// The codes and scales of a weight, to be filled.
///
/// # Memory
///
/// That of the packed weight, and with double quantisation, until it is done, an f32 a block.
pub(crate) struct Nf4Builder {
    shape: [usize; 2],
    config: Nf4Config,
    codes: Vec<i32>,
    absmax: Vec<f32>,
}

/// A run of whole blocks of a weight.
pub(crate) struct Nf4Piece<'a> {
    block_size: BlockSize,
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
}

impl Nf4Builder {
    /// For a weight `[d_out, d_in]`.
    ///
    /// # Panics
    ///
    /// If the number of values is too large for an address. That of a tensor, or of a file, is not.
    pub(crate) fn new(shape: [usize; 2], config: &Nf4Config) -> Self {
        let n = shape[0].checked_mul(shape[1]);
        let n = n.expect("values of a packed weight that can be counted");
        Self {
            shape,
            config: *config,
            codes: vec![0; packed_len(n).div_ceil(4)],
            absmax: vec![0.0; config.block_size.blocks(n)],
        }
    }

    /// All bytes of codes, and all scales.
    pub(super) fn parts(&mut self) -> (&mut [u8], &mut [f32]) {
        let bytes = packed_len(self.shape[0] * self.shape[1]);
        let codes = &mut cast_slice_mut(&mut self.codes)[..bytes];
        (codes, &mut self.absmax)
    }

    /// Pieces for `values` values each but the last, in order. `values` is a multiple of [`PIECE_UNIT`].
    pub(crate) fn pieces(
        &mut self,
        values: usize,
    ) -> impl IndexedParallelIterator<Item = Nf4Piece<'_>> {
        debug_assert_eq!(values % PIECE_UNIT, 0);
        let block_size = self.config.block_size;
        let (codes, absmax) = self.parts();
        let codes = codes.par_chunks_mut(values / 2);
        let absmax = absmax.par_chunks_mut(values / block_size.get());
        codes.zip(absmax).map(move |(codes, absmax)| Nf4Piece {
            block_size,
            codes,
            absmax,
        })
    }

    /// The packed weight, once all pieces are filled. `name` is for errors.
    ///
    /// # Errors
    ///
    /// [`PeftError::NotFinite`](crate::PeftError::NotFinite) if double quantisation overflows.
    pub(crate) fn finish(self, name: &str, device: &Device) -> Result<Nf4Weight> {
        let scales = Nf4Scales::new(self.absmax, self.config.double_quant);
        let (codes, block_size) = (self.codes, self.config.block_size);
        Nf4Weight::from_file(name, codes, scales, self.shape, block_size, device)
    }
}

impl Nf4Piece<'_> {
    /// How many values it is for, or one more.
    pub(crate) fn len(&self) -> usize {
        2 * self.codes.len()
    }

    /// Packs the values of this piece on this thread; the error is the index in them of the first that is not finite.
    ///
    /// # Panics
    ///
    /// Panics for another number of values than the piece has.
    pub(crate) fn quantize<T: Nf4Float>(self, values: &[T]) -> std::result::Result<(), usize> {
        assert_eq!(self.codes.len(), packed_len(values.len()), "bytes of codes");
        assert_eq!(
            self.absmax.len(),
            self.block_size.blocks(values.len()),
            "scales"
        );
        cpu::quantize_here(
            Isa::best(),
            values,
            self.block_size,
            self.codes,
            self.absmax,
        )
    }
}
