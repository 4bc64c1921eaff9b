//! Some rows of a packed weight, packed.

use std::ops::Range;

use burn::backend::{Backend, TensorMetadata, tensor::IntTensor};
use burn::tensor::Slice;

use super::double::NESTED_BLOCK_SIZE;
use super::ops::{Nf4ScaleTensors, Nf4Tensors};

impl<B: Backend> Nf4Tensors<B> {
    /// What [`rows`](Self::rows) can begin at multiples of: rows that end with words and scales.
    pub(crate) fn whole_rows(&self) -> usize {
        let whole = match &self.scales {
            Nf4ScaleTensors::Plain(_) => self.block_size,
            Nf4ScaleTensors::Double(..) => self.block_size * NESTED_BLOCK_SIZE,
        };
        // `whole` is a power of two.
        whole >> self.shape[1].trailing_zeros().min(whole.trailing_zeros())
    }

    /// These rows, `[rows, d_in]`, shared with the whole where the backend shares slices.
    ///
    /// # Panics
    ///
    /// If the rows do not begin at a multiple of [`whole_rows`](Self::whole_rows), or are not there.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Self {
        assert!(rows.start.is_multiple_of(self.whole_rows()) && rows.end <= self.shape[0]);
        let values = rows.start * self.shape[1]..rows.end * self.shape[1];
        let part = |words: &IntTensor<B>, per_word: usize, range: Range<usize>| {
            let words_of = range.start / per_word..range.end.div_ceil(per_word);
            B::int_slice(words.clone(), &[Slice::from(words_of)])
        };
        let block = self.block_size;
        let blocks = values.start / block..values.end.div_ceil(block);
        let scales = match &self.scales {
            Nf4ScaleTensors::Plain(bits) => Nf4ScaleTensors::Plain(part(bits, 1, blocks)),
            Nf4ScaleTensors::Double(codes, nested) => {
                let groups =
                    blocks.start / NESTED_BLOCK_SIZE..blocks.end.div_ceil(NESTED_BLOCK_SIZE);
                let last = nested.shape()[0] - 1;
                let nested = vec![part(nested, 1, groups), part(nested, 1, last..last + 1)];
                Nf4ScaleTensors::Double(part(codes, 4, blocks), B::int_cat(nested, 0))
            }
        };
        Self {
            codes: part(&self.codes, 8, values),
            scales,
            shape: [rows.len(), self.shape[1]],
            block_size: block,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Dispatch;
    use burn::tensor::{Device, Distribution, FloatDType, Tensor};

    use crate::nf4::{Nf4Config, Nf4Ops, Nf4Weight};

    #[test]
    fn rows_are_those_of_the_whole() {
        let device = Device::default();
        for (shape, double, step) in [
            ([600, 64], true, 256),
            ([600, 64], false, 1),
            ([90, 24], false, 8),
            ([70, 1024], true, 16),
            ([7, 5], true, 16384),
        ] {
            let [d_out, d_in] = shape;
            let config = Nf4Config::new().with_double_quant(double);
            let dense = Tensor::<2>::random([d_in, d_out], Distribution::Normal(0.0, 1.0), &device);
            let weight = Nf4Weight::quantize("w", dense, &config).unwrap();
            let tensors = weight.tensors();
            assert_eq!(tensors.whole_rows(), step);
            let whole = weight.dequantize(FloatDType::F32);
            for first in (0..d_out).step_by(step) {
                for rows in [first..d_out, first..first + 1] {
                    let expected = whole.clone().narrow(0, rows.start, rows.len());
                    let found = Dispatch::nf4_dequantize(tensors.rows(rows), FloatDType::F32);
                    let found = Tensor::<2>::from_dispatch(found);
                    found.into_data().assert_eq(&expected.into_data(), true);
                }
            }
        }
    }
}
