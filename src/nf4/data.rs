//! One weight matrix in NF4 on the host: its codes, its scales, its shape.
//!
//! `W ≈ CODEBOOK[codes] · scales`, block by block of the row-major `[d_out, d_in]` matrix `W`; the blocks run along
//! `d_in` and over the ends of rows. See [`blocks`](super::blocks) and [`double`](super::double) for the arithmetic,
//! which is that of bitsandbytes 0.50.2.

use std::borrow::Cow;

use super::blocks::{BlockSize, not_finite, packed_len};
use super::cpu::{self, Isa, Packed, Scales};
use super::double::DoubleAbsmax;
use super::float::Nf4Float;
use crate::{PeftError, Result};

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
    /// The scales as they are to be stored.
    pub(super) fn new(absmax: Vec<f32>, double_quant: bool) -> Self {
        match double_quant {
            false => Self::Plain(absmax),
            true => Self::Double(DoubleAbsmax::quantize(&absmax)),
        }
    }

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

    /// An error unless every scale, restored, is finite.
    pub(super) fn check_finite(&self, name: &str) -> Result<()> {
        let error = |(index, scale)| not_finite(&format!("{name}.absmax"), index, scale);
        let bad = match self {
            Self::Plain(absmax) => first_not_finite(absmax.iter().copied()),
            Self::Double(double) => first_not_finite(double.iter()),
        };
        bad.map_or(Ok(()), |bad| Err(error(bad)))
    }
}

fn first_not_finite(scales: impl Iterator<Item = f32>) -> Option<(usize, f32)> {
    let mut scales = scales.enumerate();
    scales.find(|(_, scale)| !scale.is_finite())
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
    /// Note that a `burn::nn::Linear` holds `[d_in, d_out]`: transpose it first, or use
    /// [`Nf4Weight::quantize`](super::Nf4Weight::quantize).
    ///
    /// # Errors
    ///
    /// - [`PeftError::Shape`] if `values` has another length than `shape` says.
    /// - [`PeftError::NotFinite`] at the first NaN or infinity; also if a scale near the largest f32 overflows in double
    ///   quantisation, then of the tensor `{name}.absmax`.
    pub fn quantize<T: Nf4Float>(
        name: &str,
        values: &[T],
        shape: [usize; 2],
        config: &Nf4Config,
    ) -> Result<Self> {
        let empty = Self {
            shape,
            block_size: config.block_size,
            codes: Vec::new(),
            scales: Nf4Scales::new(Vec::new(), config.double_quant),
        };
        empty.requantize(name, values)
    }

    /// Quantises other values in place of these, of the same shape and in the same way, in the memory that holds these:
    /// fresh memory costs more than quantising does.
    ///
    /// # Errors
    ///
    /// As [`quantize`](Self::quantize).
    pub fn requantize<T: Nf4Float>(self, name: &str, values: &[T]) -> Result<Self> {
        let (shape, block_size) = (self.shape, self.block_size);
        let n = num_values(name, shape)?;
        check_len(name, &shape, values.len(), n)?;
        let mut codes = self.codes;
        codes.resize(packed_len(n), 0);
        let double_quant = matches!(self.scales, Nf4Scales::Double(_));
        let mut absmax = match self.scales {
            Nf4Scales::Plain(absmax) => absmax,
            Nf4Scales::Double(_) => Vec::new(),
        };
        absmax.resize(block_size.blocks(n), 0.0);
        cpu::quantize(Isa::best(), values, block_size, &mut codes, &mut absmax)
            .map_err(|index| not_finite(name, index, values[index]))?;
        let scales = Nf4Scales::new(absmax, double_quant);
        scales.check_finite(name)?;
        Ok(Self {
            shape,
            block_size,
            codes,
            scales,
        })
    }

    /// Puts together what was read from a file, after checking it against `shape` `[d_out, d_in]`.
    ///
    /// `codes` are the packed bytes, two codes each, the first in the high nibble. `name` is the name of the weight's
    /// tensor; the scales are named in errors as bitsandbytes names them, `{name}.absmax`.
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
        scales.check_finite(name)?;
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
        cpu::dequantize(Isa::best(), &self.packed(), &mut values);
        values
    }

    /// [`dequantize`](Self::dequantize) into given memory, in any of the three float types: computed in f32 and rounded
    /// once, to nearest even. Fresh memory costs several times as much as dequantising does.
    ///
    /// # Errors
    ///
    /// [`PeftError::Shape`], of a tensor `out`, if `out` has another length than [`num_weights`](Self::num_weights).
    pub fn dequantize_into<T: Nf4Float>(&self, out: &mut [T]) -> Result<()> {
        check_len("out", &self.shape, out.len(), self.num_weights())?;
        cpu::dequantize(Isa::best(), &self.packed(), out);
        Ok(())
    }

    fn packed(&self) -> Packed<'_> {
        let scales = match &self.scales {
            Nf4Scales::Plain(absmax) => Scales::Plain(absmax),
            Nf4Scales::Double(double) => {
                Scales::Double(&double.codes, &double.absmax, double.offset)
            }
        };
        Packed::new(&self.codes, scales, self.shape, self.block_size.get())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nf4::blocks::{dequantize_blocks, quantize_blocks};

    /// At least as many values as a task of a thread takes.
    const VALUES_PER_TASK: usize = 1 << 16;

    /// Values of changing sign and magnitude, the same everywhere.
    fn values(n: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (i as f32 * 0.7).sin() * (1.0 + (i / 61 % 7) as f32))
            .collect()
    }

    fn config(block_size: usize, double_quant: bool) -> Nf4Config {
        let block_size = BlockSize::new(block_size).unwrap();
        Nf4Config::new()
            .with_block_size(block_size)
            .with_double_quant(double_quant)
    }

    #[test]
    fn any_number_of_threads_gives_what_the_reference_gives() {
        // Four tasks, the last one partial, of an odd count.
        let shape = [3, VALUES_PER_TASK + 11];
        let values = values(shape[0] * shape[1]);
        for block_size in [32, 64, 4096] {
            let config = config(block_size, false);
            let (codes, absmax) = quantize_blocks("w", &values, config.block_size).unwrap();
            let dense = dequantize_blocks(&codes, &absmax, values.len(), config.block_size);
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .unwrap();
                let data = pool
                    .install(|| Nf4Data::quantize("w", &values, shape, &config))
                    .unwrap();
                assert_eq!(data.codes(), codes);
                assert_eq!(data.absmax(), absmax);
                assert_eq!(pool.install(|| data.dequantize()), dense);
            }
        }
    }

    #[test]
    fn the_first_bad_value_is_named_whichever_thread_finds_one_first() {
        let mut values = values(4 * VALUES_PER_TASK);
        for at in [
            3 * VALUES_PER_TASK + 1,
            2 * VALUES_PER_TASK,
            VALUES_PER_TASK + 77,
        ] {
            values[at] = f32::INFINITY;
            let error = Nf4Data::quantize("w", &values, [4, VALUES_PER_TASK], &Nf4Config::new());
            assert!(matches!(error, Err(PeftError::NotFinite { index, .. }) if index == at));
        }
    }

    #[test]
    fn requantizing_gives_what_quantizing_gives() {
        let (first, mut second) = (values(5 * 67), values(5 * 67));
        second.reverse();
        for double_quant in [false, true] {
            let config = config(32, double_quant);
            let data = Nf4Data::quantize("w", &first, [5, 67], &config).unwrap();
            let memory = data.codes().as_ptr();
            let data = data.requantize("w", &second).unwrap();
            assert_eq!(data.codes().as_ptr(), memory);
            let fresh = Nf4Data::quantize("w", &second, [5, 67], &config).unwrap();
            assert_eq!(data, fresh);
            let error = data.requantize("w", &second[1..]).unwrap_err();
            assert_eq!(
                error.to_string(),
                "tensor `w`: expected shape [5, 67], found [334]"
            );
        }
    }

    #[test]
    fn dequantizing_into_memory_checks_its_length_and_rounds_once() {
        let data = Nf4Data::quantize("w", &values(5 * 67), [5, 67], &config(64, true)).unwrap();
        let expected = data.dequantize();
        let mut f32s = vec![0.0; 5 * 67];
        data.dequantize_into(&mut f32s).unwrap();
        assert_eq!(f32s, expected);
        let mut bf16s = vec![half::bf16::ZERO; 5 * 67];
        data.dequantize_into(&mut bf16s).unwrap();
        assert!(
            bf16s
                .iter()
                .zip(&expected)
                .all(|(&found, &x)| found == half::bf16::from_f32(x))
        );
        for n in [0, 334, 336] {
            let error = data.dequantize_into(&mut vec![0_f32; n]).unwrap_err();
            let expected = format!("tensor `out`: expected shape [5, 67], found [{n}]");
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn bytes_are_counted_exactly() {
        let bytes = |shape: [usize; 2], config| {
            let values = values(shape[0] * shape[1]);
            let data = Nf4Data::quantize("w", &values, shape, &config).unwrap();
            assert_eq!(data.num_weights(), values.len());
            data.num_bytes()
        };
        // 2^20 weights: 2^19 bytes of codes; 2^14 scales of 4 bytes, or of 1 with 64 groups and an offset of 4.
        assert_eq!(bytes([1024, 1024], config(64, false)), 524_288 + 65_536); // 4.5 bits a weight
        assert_eq!(
            bytes([1024, 1024], config(64, true)),
            524_288 + 16_384 + 256 + 4
        ); // 4.127
        // 1517 weights: 759 bytes; 48 blocks of 32.
        assert_eq!(bytes([37, 41], config(32, false)), 759 + 4 * 48);
        assert_eq!(bytes([37, 41], config(32, true)), 759 + 48 + 4 + 4);
        assert_eq!(bytes([0, 41], config(64, false)), 0);
        assert_eq!(bytes([0, 41], config(64, true)), 4);
    }

    #[test]
    fn lengths_are_checked_against_the_shape() {
        let config = Nf4Config::new();
        let error = Nf4Data::quantize("w", &values(12), [3, 5], &config).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tensor `w`: expected shape [3, 5], found [12]"
        );
        let error = Nf4Data::quantize("w", &values(12), [usize::MAX, 2], &config).unwrap_err();
        assert!(matches!(error, PeftError::Shape { .. }));

        let parts =
            |codes, scales| Nf4Data::from_parts("w", [3, 65], config.block_size, codes, scales);
        let plain = |blocks| Nf4Scales::Plain(vec![1.0; blocks]);
        let double = |blocks| Nf4Scales::Double(DoubleAbsmax::quantize(&vec![1.0; blocks]));
        assert!(parts(vec![0; 98], plain(4)).is_ok());
        assert!(parts(vec![0; 98], double(4)).is_ok());
        let error = parts(vec![0; 97], plain(4)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tensor `w`: expected shape [98, 1], found [97]"
        );
        for scales in [plain(3), double(3)] {
            let error = parts(vec![0; 98], scales).unwrap_err();
            assert_eq!(
                error.to_string(),
                "tensor `w.absmax`: expected shape [4], found [3]"
            );
        }
    }

    #[test]
    fn scales_from_a_file_must_be_finite() {
        let bad = |scales| {
            let error =
                Nf4Data::from_parts("w", [2, 64], BlockSize::default(), vec![0; 64], scales);
            match error.unwrap_err() {
                PeftError::NotFinite { tensor, index, .. } => (tensor, index),
                error => panic!("{error}"),
            }
        };
        let name = || "w.absmax".to_string();
        assert_eq!(bad(Nf4Scales::Plain(vec![1.0, f32::NAN])), (name(), 1));
        let double = |absmax, offset| {
            DoubleAbsmax::from_parts("w", vec![127, 255], vec![absmax], offset).unwrap()
        };
        assert_eq!(
            bad(Nf4Scales::Double(double(1.0, f32::INFINITY))),
            (name(), 0)
        );
        assert_eq!(bad(Nf4Scales::Double(double(f32::NAN, 1.0))), (name(), 0));
        // Both finite, the sum is not.
        assert_eq!(
            bad(Nf4Scales::Double(double(f32::MAX, f32::MAX))),
            (name(), 1)
        );
    }

    #[test]
    fn a_scale_that_overflows_in_double_quantisation_is_an_error() {
        // The mean is 2.97e38 and the largest deviation that of the zero block; the deviation of the others, 0.33e38, is
        // coded higher than it is.
        let mut values = vec![3.4e38_f32; 20 * 64];
        values[..64].fill(0.0);
        for double_quant in [false, true] {
            let data = Nf4Data::quantize("w", &values, [20, 64], &config(64, double_quant));
            match double_quant {
                false => assert!(data.unwrap().dequantize().iter().all(|x| x.is_finite())),
                true => assert!(matches!(data, Err(PeftError::NotFinite { .. }))),
            }
        }
    }
}
