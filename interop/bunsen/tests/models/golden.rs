//! Inputs and outputs that Python wrote, and those that it is to read.

use std::path::{Path, PathBuf};
use std::{env, fs};

use burn::tensor::{Device, Int, Tensor, TensorData};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::network::Network;

/// The largest difference that counts as none.
pub const TOLERANCE: f32 = 2e-4;

/// `data/<name>`.
pub fn directory<N: Network>() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("data")
        .join(N::NAME)
}

/// The tensors of `golden.safetensors`.
#[derive(Clone)]
pub struct Golden(Vec<u8>);

impl Golden {
    pub fn of<N: Network>() -> Self {
        Self(fs::read(directory::<N>().join("golden.safetensors")).unwrap())
    }

    pub fn floats<const D: usize>(&self, name: &str, device: &Device) -> Tensor<D> {
        let (shape, bytes) = self.tensor(name, Dtype::F32);
        let values = bytes
            .as_chunks()
            .0
            .iter()
            .map(|value| f32::from_le_bytes(*value));
        Tensor::from_data(TensorData::new(values.collect(), shape), device)
    }

    pub fn integers<const D: usize>(&self, name: &str, device: &Device) -> Tensor<D, Int> {
        let (shape, bytes) = self.tensor(name, Dtype::I64);
        let values = bytes
            .as_chunks()
            .0
            .iter()
            .map(|value| i64::from_le_bytes(*value));
        Tensor::from_data(TensorData::new(values.collect(), shape), device)
    }

    /// Asserts that `found` are the outputs called `name`, and that the outputs called `other` are not.
    pub fn assert_equal(&self, found: Tensor<2>, name: &str, other: &str) {
        let device = found.device();
        let difference = |name| {
            let expected = self.floats(name, &device);
            let difference: f32 = (found.clone() - expected).abs().max().into_scalar();
            difference
        };
        assert!(
            difference(name) <= TOLERANCE,
            "`{name}`: differs by {}",
            difference(name)
        );
        assert!(
            difference(other) > 100.0 * TOLERANCE,
            "`{name}` is `{other}`"
        );
    }

    fn tensor(&self, name: &str, dtype: Dtype) -> (Vec<usize>, Vec<u8>) {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), dtype, "{name}");
        (tensor.shape().to_vec(), tensor.data().to_vec())
    }
}

/// Where `check.py` looks for what a test leaves to it: `$INTEROP_OUT/<model>/<what>`, or a folder for the time of the test.
pub struct Output {
    path: PathBuf,
    _scratch: Option<tempfile::TempDir>,
}

impl Output {
    pub fn new<N: Network>(what: &str) -> Self {
        let (root, scratch) = match env::var_os("INTEROP_OUT") {
            Some(root) => (PathBuf::from(root), None),
            None => {
                let scratch = tempfile::tempdir().unwrap();
                (scratch.path().to_owned(), Some(scratch))
            }
        };
        let path = root.join(N::NAME).join(what);
        fs::create_dir_all(&path).unwrap();
        Self {
            path,
            _scratch: scratch,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes outputs for Python to compare its own with.
    pub fn write_logits(&self, logits: Tensor<2>) {
        let shape = logits.dims().to_vec();
        let values: Vec<f32> = logits.try_into_vec_as().unwrap();
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let view = TensorView::new(Dtype::F32, shape, &bytes).unwrap();
        let bytes = safetensors::serialize([("logits", view)], None).unwrap();
        fs::write(self.path.join("logits.safetensors"), bytes).unwrap();
    }
}
