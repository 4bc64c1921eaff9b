//! Reading the golden data.

use std::collections::BTreeMap;

use burn_peft::Result;
use burn_peft::nf4::{BlockSize, Nf4Config, Nf4Data};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

/// One tensor of a golden file.
pub struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// One matrix quantised by bitsandbytes in one block size.
pub struct Case<'a> {
    pub key: &'a str,
    pub input: &'a Tensor,
    pub block_size: BlockSize,
}

/// A golden file.
pub struct Golden(BTreeMap<String, Tensor>);

impl Golden {
    pub fn read(file: &str) -> Self {
        let path = crate::golden("nf4").join(file);
        let bytes = std::fs::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |(name, view): (String, safetensors::tensor::TensorView)| {
            let (dtype, shape, bytes) = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
            (
                name,
                Tensor {
                    dtype,
                    shape,
                    bytes,
                },
            )
        };
        Self(tensors.tensors().into_iter().map(tensor).collect())
    }

    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    /// The matrices in this file, each block size a case.
    pub fn cases(&self) -> Vec<Case<'_>> {
        let keys = self
            .0
            .keys()
            .filter_map(|name| name.strip_suffix(".packed"));
        keys.map(|key| {
            let (matrix, block_size) = key.rsplit_once('.').unwrap();
            let input = &self.0[&format!("{matrix}.input")];
            Case {
                key,
                input,
                block_size: BlockSize::new(block_size.parse().unwrap()).unwrap(),
            }
        })
        .collect()
    }

    /// A part of a case: `packed`, `absmax`, ...
    pub fn part(&self, case: &Case, part: &str) -> Option<&Tensor> {
        self.get(&format!("{}.{part}", case.key))
    }

    /// Whether `restored` has every bit of the stored outputs of a case; how many there were is the result.
    pub fn assert_restored(&self, case: &Case, restored: &[f32]) -> usize {
        let bytes = |dtype: &str| -> Vec<u8> {
            match dtype {
                "bf16" => restored
                    .iter()
                    .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
                    .collect(),
                "f16" => restored
                    .iter()
                    .flat_map(|&x| f16::from_f32(x).to_le_bytes())
                    .collect(),
                _ => restored.iter().flat_map(|&x| x.to_le_bytes()).collect(),
            }
        };
        let stored = |dtype: &&str| self.part(case, dtype).is_some();
        let dtypes = ["f32", "bf16", "f16", "spec"].into_iter().filter(stored);
        dtypes
            .inspect(|dtype| {
                let expected = &self.part(case, dtype).unwrap().bytes;
                assert!(
                    &bytes(dtype) == expected,
                    "{}: restored to {dtype}",
                    case.key
                );
            })
            .count()
    }
}

impl Tensor {
    pub fn u8(&self) -> &[u8] {
        assert_eq!(self.dtype, Dtype::U8);
        &self.bytes
    }

    pub fn f32(&self) -> Vec<f32> {
        assert_eq!(self.dtype, Dtype::F32);
        self.bytes
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect()
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn shape(&self) -> [usize; 2] {
        self.shape.as_slice().try_into().unwrap()
    }

    /// Quantised from its own element type.
    pub fn quantize(&self, config: &Nf4Config) -> Result<Nf4Data> {
        let (pairs, shape) = (self.bytes.as_chunks().0.iter(), self.shape());
        match self.dtype {
            Dtype::F32 => Nf4Data::quantize("input", &self.f32(), shape, config),
            Dtype::BF16 => {
                let values: Vec<_> = pairs.map(|&bytes| bf16::from_le_bytes(bytes)).collect();
                Nf4Data::quantize("input", &values, shape, config)
            }
            Dtype::F16 => {
                let values: Vec<_> = pairs.map(|&bytes| f16::from_le_bytes(bytes)).collect();
                Nf4Data::quantize("input", &values, shape, config)
            }
            dtype => panic!("input in {dtype:?}"),
        }
    }
}

/// The bytes of f32 values, to compare signs of zero and all.
pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}
