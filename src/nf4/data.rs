//! One weight matrix in NF4 on the host: its codes, its scales, its shape.
//!
//! `W ≈ CODEBOOK[codes] · scales`, block by block of the row-major `[d_out, d_in]` matrix `W`; the blocks run along
//! `d_in` and over the ends of rows. See [`blocks`](super::blocks) and [`double`](super::double) for the arithmetic,
//! which is that of bitsandbytes 0.50.2.

use std::borrow::Cow;

use rayon::prelude::*;

use super::blocks::{
    BlockSize, dequantize_blocks_into, not_finite, packed_len, quantize_blocks_into,
};
use super::double::{DoubleAbsmax, NESTED_BLOCK_SIZE};
use crate::{PeftError, Result};

/// How many values one task of a thread takes: many blocks of any size, and small enough to spread a small matrix.
const VALUES_PER_TASK: usize = 1 << 16;

/// How to quantise a weight to NF4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nf4Config {
    /// How many consecutive values share a scale. Default: 64.
    pub block_size: BlockSize,
    /// Whether the scales are themselves quantised to eight bits. Default: false.
    pub double_quant: bool,
}

impl Nf4Config {
    /// Blocks of 64, scales in f32: 4.5 bits a weight.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how many consecutive values share a scale.
    pub fn with_block_size(mut self, block_size: BlockSize) -> Self {
        self.block_size = block_size;
        self
    }

    /// Sets whether the scales are themselves quantised to eight bits: 4.127 bits a weight in blocks of 64.
    pub fn with_double_quant(mut self, double_quant: bool) -> Self {
        self.double_quant = double_quant;
        self
    }
}

/// The scales of the blocks of one matrix.
#[derive(Clone, Debug, PartialEq)]
pub enum Nf4Scales {
    /// One f32 a block.
    Plain(Vec<f32>),
    /// Quantised to eight bits a block.
    Double(DoubleAbsmax),
}

impl Nf4Scales {
    /// How many blocks they are for.
    fn len(&self) -> usize {
        match self {
            Self::Plain(absmax) => absmax.len(),
            Self::Double(double) => double.codes.len(),
        }
    }

    /// One f32 a block.
    fn restore(&self) -> Cow<'_, [f32]> {
        match self {
            Self::Plain(absmax) => Cow::Borrowed(absmax),
            Self::Double(double) => Cow::Owned(double.dequantize()),
        }
    }
}

/// One weight matrix `[d_out, d_in]` in NF4, on the host.
///
/// It holds [`num_bytes`](Self::num_bytes) bytes of data: half a byte a weight, and the scales.
#[derive(Clone, Debug, PartialEq)]
pub struct Nf4Data {
    pub(crate) shape: [usize; 2],
    pub(crate) block_size: BlockSize,
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Nf4Scales,
}

impl Nf4Data {
    /// Quantises the row-major `values` of a matrix of `shape` `[d_out, d_in]`, on all threads of Rayon's pool. The
    /// result does not depend on their number. `name` is for errors.
    ///
    /// Note that a `burn::nn::Linear` holds `[d_in, d_out]`: transpose it first.
    ///
    /// # Errors
    ///
    /// - [`PeftError::Shape`] if `values` has another length than `shape` says.
    /// - [`PeftError::NotFinite`] at the first NaN or infinity; also if a scale near the largest f32 overflows in double
    ///   quantisation, then of the tensor `{name}.absmax`.
    pub fn quantize<T: Copy + Into<f32> + Sync>(
        name: &str,
        values: &[T],
        shape: [usize; 2],
        config: &Nf4Config,
    ) -> Result<Self> {
        let block_size = config.block_size;
        check_len(name, &shape, values.len(), num_values(name, shape)?)?;
        let mut codes = vec![0; packed_len(values.len())];
        let mut absmax = vec![0.0; block_size.blocks(values.len())];
        // A task is a multiple of every block size, so that tasks are whole blocks, but for the last.
        let tasks = values
            .par_chunks(VALUES_PER_TASK)
            .zip(codes.par_chunks_mut(VALUES_PER_TASK / 2));
        let tasks = tasks.zip(absmax.par_chunks_mut(VALUES_PER_TASK / block_size.get()));
        let failed = tasks
            .enumerate()
            .find_map_first(|(task, ((values, codes), absmax))| {
                let result = quantize_blocks_into(values, block_size, codes, absmax);
                result.err().map(|index| task * VALUES_PER_TASK + index)
            });
        if let Some(index) = failed {
            return Err(not_finite(name, index, values[index]));
        }
        let scales = match config.double_quant {
            false => Nf4Scales::Plain(absmax),
            true => Nf4Scales::Double(DoubleAbsmax::quantize(&absmax)),
        };
        Self::from_parts(name, shape, block_size, codes, scales)
    }

    /// Puts together what was read from a file, after checking it against `shape` `[d_out, d_in]`.
    ///
    /// `codes` are the packed bytes, two codes each, the first in the high nibble. `name` is the name of the weight's
    /// tensor; the other tensors are named in errors as bitsandbytes names them, `{name}.absmax` and
    /// `{name}.nested_absmax`.
    ///
    /// # Errors
    ///
    /// - [`PeftError::Shape`] if one of the parts has another length than `shape` and `block_size` demand.
    /// - [`PeftError::NotFinite`] if a scale, restored from its parts, is not finite.
    pub fn from_parts(
        name: &str,
        shape: [usize; 2],
        block_size: BlockSize,
        codes: Vec<u8>,
        scales: Nf4Scales,
    ) -> Result<Self> {
        let n = num_values(name, shape)?;
        let blocks = block_size.blocks(n);
        check_len(name, &[packed_len(n), 1], codes.len(), packed_len(n))?;
        check_len(&format!("{name}.absmax"), &[blocks], scales.len(), blocks)?;
        if let Nf4Scales::Double(double) = &scales {
            let groups = blocks.div_ceil(NESTED_BLOCK_SIZE);
            check_len(
                &format!("{name}.nested_absmax"),
                &[groups],
                double.absmax.len(),
                groups,
            )?;
        }
        if let Some((index, scale)) = scales
            .restore()
            .iter()
            .enumerate()
            .find(|(_, scale)| !scale.is_finite())
        {
            return Err(not_finite(&format!("{name}.absmax"), index, *scale));
        }
        Ok(Self {
            shape,
            block_size,
            codes,
            scales,
        })
    }

    /// `[d_out, d_in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// How many consecutive values share a scale.
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// The packed codes, two a byte, the first in the high nibble.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The scales as they are stored.
    pub fn scales(&self) -> &Nf4Scales {
        &self.scales
    }

    /// The scales in f32, one a block, restored if they were double-quantised.
    pub fn absmax(&self) -> Vec<f32> {
        self.scales.restore().into_owned()
    }

    /// The matrix in f32, row-major `[d_out, d_in]`. It does not depend on the number of threads.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.num_weights()];
        let absmax = self.scales.restore();
        let tasks = values
            .par_chunks_mut(VALUES_PER_TASK)
            .zip(self.codes.par_chunks(VALUES_PER_TASK / 2));
        let tasks = tasks.zip(absmax.par_chunks(VALUES_PER_TASK / self.block_size.get()));
        tasks.for_each(|((values, codes), absmax)| {
            dequantize_blocks_into(codes, absmax, self.block_size, values)
        });
        values
    }

    /// The number of weights, `d_out · d_in`.
    pub fn num_weights(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// The bytes of codes and scales, exactly: of `n` weights in `b` blocks `ceil(n/2) + 4·b`, or double-quantised
    /// `ceil(n/2) + b + 4·ceil(b/256) + 4`.
    pub fn num_bytes(&self) -> usize {
        self.codes.len()
            + match &self.scales {
                Nf4Scales::Plain(absmax) => size_of_val(absmax.as_slice()),
                Nf4Scales::Double(double) => {
                    double.codes.len()
                        + size_of_val(double.absmax.as_slice())
                        + size_of_val(&double.offset)
                }
            }
    }
}

/// The number of values of a matrix, or an error if no memory could hold them.
fn num_values(name: &str, shape: [usize; 2]) -> Result<usize> {
    shape[0]
        .checked_mul(shape[1])
        .ok_or_else(|| PeftError::Shape {
            tensor: name.into(),
            expected: vec![usize::MAX],
            found: shape.to_vec(),
        })
}

/// An error unless `found` values are the `expected` ones that `shape` stands for.
fn check_len(tensor: &str, shape: &[usize], found: usize, expected: usize) -> Result<()> {
    match found == expected {
        true => Ok(()),
        false => Err(PeftError::Shape {
            tensor: tensor.into(),
            expected: shape.to_vec(),
            found: vec![found],
        }),
    }
}
