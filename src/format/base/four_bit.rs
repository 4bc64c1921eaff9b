//! The values of a weight in four bits: NF4 as it lies in the file, FP4 restored piece by piece.

use burn::tensor::{Device, FloatDType};
use bytemuck::cast_slice_mut;
use rayon::prelude::*;

use super::bitsandbytes::Part;
use super::checkpoint::BaseCheckpoint;
use super::fp4;
use super::progress::Meter;
use super::quant_state::QuantState;
use crate::format::elements::swap_to_host;
use crate::nf4::double::{DYNAMIC_MAP, NESTED_BLOCK_SIZE};
use crate::nf4::{DoubleAbsmax, Nf4Scales, Nf4Weight};
use crate::{PeftError, Result};

/// The most bytes that a thread reads at a time.
const PART: usize = 1 << 20;

/// A packed weight whose tensors were checked against its state.
#[derive(Clone, Copy)]
pub(super) struct FourBit<'a> {
    pub checkpoint: &'a BaseCheckpoint,
    /// The name of the weight.
    pub weight: &'a str,
    pub state: &'a QuantState,
}

impl FourBit<'_> {
    /// The packed weight, codes and scales as they are.
    ///
    /// # Errors
    ///
    /// [`PeftError::NotFinite`] for a scale that is not finite, in [`PeftError::InFile`]; those of reading.
    pub fn nf4(self, device: &Device, meter: &Meter) -> Result<Nf4Weight> {
        let state = self.state;
        let mut codes = vec![0_i32; state.packed_len().div_ceil(4)];
        let bytes: &mut [u8] = &mut cast_slice_mut(&mut codes)[..state.packed_len()];
        let parts = bytes.par_chunks_mut(PART).enumerate();
        parts.try_for_each(|(index, bytes)| {
            self.checkpoint.read_at(self.weight, index * PART, bytes)?;
            meter.add_bytes(bytes.len());
            Ok::<_, PeftError>(())
        })?;
        let scales = match state.nested_offset {
            None => Nf4Scales::Plain(self.floats(Part::Absmax, 0, state.blocks())?),
            Some(offset) => {
                let codes = self.bytes(Part::Absmax, 0, state.blocks())?;
                let groups = codes.len().div_ceil(NESTED_BLOCK_SIZE);
                let absmax = self.floats(Part::NestedAbsmax, 0, groups)?;
                let double = DoubleAbsmax::from_parts(self.weight, codes, absmax, offset)?;
                Nf4Scales::Double(double)
            }
        };
        meter.add_bytes(state.scale_bytes());
        let (shape, block_size) = (state.shape, state.block_size);
        Nf4Weight::from_file(self.weight, codes, scales, shape, block_size, device)
            .map_err(|error| self.in_file(error))
    }

    /// The values from index `first` on, restored by FP4's codebook.
    ///
    /// # Errors
    ///
    /// As [`nf4`](Self::nf4).
    pub fn fp4(self, first: usize, values: &mut [f32]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let (last, block_size) = (first + values.len() - 1, self.state.block_size.get());
        let codes = self.bytes(Part::Codes, first / 2, last / 2 + 1 - first / 2)?;
        let scales = self.scales(first / block_size, last / block_size + 1)?;
        fp4::dequantize(first, &codes, &scales, block_size, values);
        Ok(())
    }

    /// The scales of the blocks from `first` to before `end`, restored.
    fn scales(self, first: usize, end: usize) -> Result<Vec<f32>> {
        let scales = match self.state.nested_offset {
            None => self.floats(Part::Absmax, first, end - first)?,
            Some(offset) => {
                let codes = self.bytes(Part::Absmax, first, end - first)?;
                let group = first / NESTED_BLOCK_SIZE;
                let groups = (end - 1) / NESTED_BLOCK_SIZE + 1 - group;
                let absmax = self.floats(Part::NestedAbsmax, group, groups)?;
                let blocks = (first..).zip(codes);
                let scales = blocks.map(|(block, code)| {
                    let absmax = absmax[block / NESTED_BLOCK_SIZE - group];
                    DYNAMIC_MAP[usize::from(code)] * absmax + offset
                });
                scales.collect()
            }
        };
        match scales.iter().position(|scale| !scale.is_finite()) {
            None => Ok(scales),
            Some(index) => Err(self.in_file(PeftError::NotFinite {
                tensor: Part::Absmax.tensor(self.weight),
                index: first + index,
                value: scales[index],
            })),
        }
    }

    fn bytes(self, part: Part, offset: usize, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let tensor = part.tensor(self.weight);
        self.checkpoint.read_at(&tensor, offset, &mut bytes)?;
        Ok(bytes)
    }

    fn floats(self, part: Part, first: usize, len: usize) -> Result<Vec<f32>> {
        let mut floats = vec![0.0; len];
        let bytes: &mut [u8] = cast_slice_mut(&mut floats);
        let tensor = part.tensor(self.weight);
        self.checkpoint.read_at(&tensor, 4 * first, bytes)?;
        swap_to_host(bytes, FloatDType::F32.into());
        Ok(floats)
    }

    fn in_file(self, error: PeftError) -> PeftError {
        let absmax = Part::Absmax.tensor(self.weight);
        match self.checkpoint.tensor(&absmax) {
            Some(tensor) => error.in_file(tensor.file),
            None => error,
        }
    }
}
