//! The moments of one parameter in eight bits, on its device.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::super::block_wise::{BLOCK, WORDS};

/// Codes and scales of one moment.
#[derive(Clone, Debug)]
pub(super) struct Codes {
    /// I32, four codes a word, whole blocks: `[blocks · 64]`.
    pub words: Tensor<1, Int>,
    /// F32, `[blocks]`.
    pub absmax: Tensor<1>,
}

impl Codes {
    /// A moment of zeros for `n` values.
    pub fn zeros(n: usize, device: &Device) -> Self {
        let blocks = n.div_ceil(BLOCK);
        // Burn's own zeros take their memory twice for a moment on a CPU.
        let words = TensorData::new(vec![0_i32; blocks * WORDS], [blocks * WORDS]);
        let absmax = TensorData::new(vec![0_f32; blocks], [blocks]);
        Self {
            words: Tensor::from_data(words, (device, DType::I32)),
            absmax: Tensor::from_data(absmax, (device, DType::F32)),
        }
    }

    /// From data of a record, or None if it is not of whole blocks.
    pub fn from_data(words: TensorData, absmax: TensorData, device: &Device) -> Option<Self> {
        let (&[len], &[blocks]) = (words.shape().as_slice(), absmax.shape().as_slice()) else {
            return None;
        };
        let fits = Some(len) == blocks.checked_mul(WORDS)
            && words.dtype() == DType::I32
            && absmax.dtype() == DType::F32;
        fits.then(|| Self {
            words: Tensor::from_data(words, (device, DType::I32)),
            absmax: Tensor::from_data(absmax, (device, DType::F32)),
        })
    }

    pub fn to_device(self, device: &Device) -> Self {
        Self {
            words: self.words.to_device(device),
            absmax: self.absmax.to_device(device),
        }
    }

    pub fn blocks(&self) -> usize {
        self.absmax.dims()[0]
    }
}
