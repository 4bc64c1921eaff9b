//! A weight packed in NF4 on a device.
//!
//! `W[o, i] = codebook[code] · scale[(o · d_in + i) / block_size]`, `W` of shape `[d_out, d_in]`.

use burn::backend::Dispatch;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param, ParamId};
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};

use super::blocks::{BlockSize, not_finite, packed_len};
use super::builder::Nf4Builder;
use super::data::{Nf4Config, Nf4Data, Nf4Scales};
use super::dense;
use super::double::NESTED_BLOCK_SIZE;
use super::ops::{self, Nf4ScaleTensors, Nf4Tensors};
use super::words::{
    bits_from_nested, bits_of_f32, bytes_from_words, f32_from_bits, nested_from_bits,
    words_from_bytes,
};
use crate::Result;

/// A frozen weight `[d_out, d_in]` in NF4, packed on a device.
///
/// Codes and scales are integers for Burn, so nothing that walks the float parameters of a model (`unfreeze`, a cast to
/// bf16, `quantize_weights`, an optimiser) can touch them, and `num_params` does not count them: use
/// [`num_weights`](Self::num_weights). Records, `to_device`, `fork`, `valid` and `train` keep every byte.
///
/// # Memory
///
/// [`num_bytes`](Self::num_bytes): with blocks of 64, 4.5 bits a weight, or 4.127 with double quantisation.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Nf4Weight {
    /// bitsandbytes' packed bytes as little-endian 32-bit words, `[ceil(ceil(n / 2) / 4)]`.
    codes: Param<Tensor<1, Int>>,
    /// The bits of one f32 scale a block, `[blocks]`; doubly quantised: its 8-bit code, four a word.
    absmax: Param<Tensor<1, Int>>,
    /// Doubly quantised only: the bits of an f32 for each 256 blocks and of the f32 offset.
    nested: Option<Param<Tensor<1, Int>>>,
    #[module(skip)]
    shape: [usize; 2],
    #[module(skip)]
    block_size: BlockSize,
}

impl Nf4Weight {
    /// Puts a quantised matrix on a device.
    pub fn from_data(data: &Nf4Data, device: &Device) -> Self {
        let codes = words_from_bytes(data.codes());
        Self::from_words(
            codes,
            data.scales().clone(),
            data.shape(),
            data.block_size(),
            device,
        )
    }

    /// A weight of all zero codes, to be overwritten by a record of one with the same shape and configuration.
    ///
    /// # Panics
    ///
    /// If the number of values is too large for an address.
    pub fn empty(shape: [usize; 2], config: &Nf4Config, device: &Device) -> Self {
        let n = shape[0].checked_mul(shape[1]);
        let n = n.expect("values of a packed weight that can be counted");
        let blocks = config.block_size.blocks(n);
        let zeros = |bytes: usize| words(vec![0; bytes.div_ceil(4)], device);
        let groups = blocks.div_ceil(NESTED_BLOCK_SIZE);
        Self {
            codes: zeros(n.div_ceil(2)),
            absmax: zeros(if config.double_quant {
                blocks
            } else {
                4 * blocks
            }),
            nested: config.double_quant.then(|| zeros(4 * (groups + 1))),
            shape,
            block_size: config.block_size,
        }
    }

    /// Quantises a weight in the layout of `burn::nn::Linear`, `[d_in, d_out]`, of any float dtype, on its own device.
    ///
    /// On the CPU the weight is read where it lies, in either order; elsewhere in strips of about a mebibyte. No second
    /// dense copy ever exists.
    ///
    /// # Errors
    ///
    /// [`PeftError::NotFinite`](crate::PeftError::NotFinite) with `name` if a value is NaN or infinite; the index counts in
    /// the `[d_out, d_in]` layout.
    pub fn quantize(name: &str, weight: Tensor<2>, config: &Nf4Config) -> Result<Self> {
        let device = weight.device();
        let [d_in, d_out] = weight.dims();
        let mut builder = Nf4Builder::new([d_out, d_in], config);
        let (codes, absmax) = builder.parts();
        dense::quantize(weight, config.block_size, codes, absmax)
            .map_err(|(index, value)| not_finite(name, index, value))?;
        builder.finish(name, &device)
    }

    /// Puts together the bytes of a file: codes as little-endian words, the last one filled up with zeros, of
    /// the right number, and as many scales as there are blocks. `name` is for errors.
    ///
    /// # Errors
    ///
    /// [`PeftError::NotFinite`](crate::PeftError::NotFinite) if a scale, restored from its parts, is not finite.
    pub(crate) fn from_file(
        name: &str,
        mut codes: Vec<i32>,
        scales: Nf4Scales,
        shape: [usize; 2],
        block_size: BlockSize,
        device: &Device,
    ) -> Result<Self> {
        scales.check_finite(name)?;
        if cfg!(target_endian = "big") {
            codes
                .iter_mut()
                .for_each(|word| *word = i32::from_le(*word));
        }
        Ok(Self::from_words(codes, scales, shape, block_size, device))
    }

    fn from_words(
        codes: Vec<i32>,
        scales: Nf4Scales,
        shape: [usize; 2],
        block_size: BlockSize,
        device: &Device,
    ) -> Self {
        let (absmax, nested) = match scales {
            Nf4Scales::Plain(absmax) => (bits_of_f32(absmax), None),
            Nf4Scales::Double(double) => (
                words_from_bytes(double.codes()),
                Some(bits_from_nested(&double)),
            ),
        };
        Self {
            codes: words(codes, device),
            absmax: words(absmax, device),
            nested: nested.map(|nested| words(nested, device)),
            shape,
            block_size,
        }
    }

    /// Checks that every value of a weight `[d_in, d_out]` is finite, as [`quantize`](Self::quantize) demands.
    pub(crate) fn check_finite(name: &str, weight: Tensor<2>) -> Result<()> {
        dense::check_finite(weight).map_err(|(index, value)| not_finite(name, index, value))
    }

    /// Reads the packed weight back to the host.
    pub fn to_data(&self) -> Nf4Data {
        let n = self.num_weights();
        Nf4Data {
            shape: self.shape,
            block_size: self.block_size,
            codes: bytes_from_words(&host(&self.codes), packed_len(n)),
            scales: self.scales_to_data(),
        }
    }

    /// Reads the scales back to the host, as they are stored.
    pub(crate) fn scales_to_data(&self) -> Nf4Scales {
        let absmax = host(&self.absmax);
        match &self.nested {
            None => Nf4Scales::Plain(f32_from_bits(&absmax)),
            Some(nested) => {
                let blocks = self.block_size.blocks(self.num_weights());
                let codes = bytes_from_words(&absmax, blocks);
                Nf4Scales::Double(nested_from_bits(codes, &host(nested)))
            }
        }
    }

    /// With double quantisation, the mean that was taken off the scales.
    pub(crate) fn nested_offset(&self) -> Option<f32> {
        let nested = self.nested.as_ref()?;
        f32_from_bits(&host(nested)).pop()
    }

    /// The packed codes on their device, little-endian words of bitsandbytes' bytes, the last one filled up with zeros.
    pub(crate) fn code_words(&self) -> Tensor<1, Int> {
        self.codes.val()
    }

    /// The dense weight `[d_out, d_in]`, computed in f32 and rounded once to `dtype`. A constant for autodiff.
    pub fn dequantize(&self, dtype: FloatDType) -> Tensor<2> {
        ops::dequantize(&self.codes.val(), self.tensors(), dtype)
    }

    /// `Σ_i W[o, i]²` of every row, in f32: `[d_out]`. A constant for autodiff.
    ///
    /// On the CPU in one pass over the packed weight; elsewhere a dense weight is held meanwhile.
    pub fn row_norms_squared(&self) -> Tensor<1> {
        ops::row_norms_squared(&self.codes.val(), self.tensors())
    }

    /// The product `x · Wᵀ`: `[rows, d_in] -> [rows, d_out]`, in the dtype of `x`.
    ///
    /// Keeps nothing but the (shared) packed weight for the backward pass.
    pub fn matmul(&self, x: Tensor<2>) -> Tensor<2> {
        ops::matmul(&self.codes.val(), x, self.tensors())
    }

    /// `x · (Wᵀ + s·A·B)` with `A [d_in, r]` and `B [r, d_out]`: `[rows, d_in] -> [rows, d_out]`, in the dtype of `x`.
    ///
    /// One operation, differentiable in `x`, `A` and `B`: neither the output of the low-rank part nor a sum of two
    /// gradients is ever in memory by itself. For the backward pass it keeps `x` (unless `A` is frozen), `[rows, r]` values,
    /// and the (shared) packed weight. The low-rank part is computed in the dtype of `A` and `B`.
    pub fn matmul_low_rank(
        &self,
        x: Tensor<2>,
        a: Tensor<2>,
        b: Tensor<2>,
        scale: f64,
    ) -> Tensor<2> {
        ops::matmul_low_rank(&self.codes.val(), x, self.tensors(), [a, b], scale)
    }

    /// The transposed product `y · W`: `[rows, d_out] -> [rows, d_in]`, in the dtype of `y`.
    pub fn matmul_transposed(&self, y: Tensor<2>) -> Tensor<2> {
        ops::matmul_transposed(&self.codes.val(), y, self.tensors())
    }

    /// Shape `[d_out, d_in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Consecutive values, row-major in `[d_out, d_in]`, that share a scale.
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Whether the scales are quantised themselves.
    pub fn double_quant(&self) -> bool {
        self.nested.is_some()
    }

    /// Number of weights this stands for, `d_out · d_in`.
    pub fn num_weights(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// Bytes on the device: `n/2` for the codes and 4 a block for the scales, or with double quantisation 1 a block,
    /// 4 for each 256 blocks and 4 for the offset; codes and 8-bit scales are filled up to whole 32-bit words.
    pub fn num_bytes(&self) -> usize {
        let words = |param: &Param<Tensor<1, Int>>| param.lazy_shape().num_elements();
        4 * (words(&self.codes) + words(&self.absmax) + self.nested.as_ref().map_or(0, words))
    }

    /// The device that holds the weight.
    pub fn device(&self) -> Device {
        self.codes.val().device()
    }

    pub(crate) fn tensors(&self) -> Nf4Tensors<Dispatch> {
        let absmax = self.absmax.val().into_dispatch();
        Nf4Tensors {
            codes: self.codes.val().into_dispatch(),
            scales: match &self.nested {
                None => Nf4ScaleTensors::Plain(absmax),
                Some(nested) => Nf4ScaleTensors::Double(absmax, nested.val().into_dispatch()),
            },
            shape: self.shape,
            block_size: self.block_size.get(),
        }
    }
}

impl ModuleDisplay for Nf4Weight {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [d_out, d_in] = self.shape;
        content
            .add("d_input", &d_in)
            .add("d_output", &d_out)
            .add("block_size", &self.block_size.get())
            .add("double_quant", &self.double_quant())
            .add("bytes", &self.num_bytes())
            .optional()
    }
}

fn words(words: Vec<i32>, device: &Device) -> Param<Tensor<1, Int>> {
    let len = words.len();
    // A packed weight lives as long as its model: keep it out of the pools of transient tensors.
    let tensor = device.memory_persistent_allocations(words, |words| {
        Tensor::<1, Int>::from_data(TensorData::new(words, [len]), (device, DType::I32))
    });
    Param::initialized(ParamId::new(), tensor)
}

fn host(words: &Param<Tensor<1, Int>>) -> Vec<i32> {
    let data = words.val().into_data().convert_dtype(DType::I32);
    data.try_into_vec()
        .expect("the data was just converted to i32")
}
