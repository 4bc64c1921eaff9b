//! A model with one of each layer, checkpoints of it, and all that is in it.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::conv::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig};
use burn::nn::{
    BatchNorm, BatchNormConfig, Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear,
    LinearConfig, LinearLayout,
};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_peft::format::Dtype;
use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::base::files;

#[derive(Module, Debug)]
pub struct Net {
    embed: Embedding,
    row: Linear,
    col: Linear,
    norm: LayerNorm,
    batch: BatchNorm,
    conv1: Conv1d,
    conv2: Conv2d,
    layers: Vec<Linear>,
    lm_head: Linear,
}

impl Net {
    pub fn new(device: &Device) -> Self {
        let col = LinearConfig::new(37, 70).with_layout(LinearLayout::Col);
        let layers = [[67, 33], [32, 128], [1, 5], [4099, 3]];
        Self {
            embed: EmbeddingConfig::new(11, 6).init(device),
            row: LinearConfig::new(70, 37).init(device),
            col: col.init(device),
            norm: LayerNormConfig::new(9).init(device),
            batch: BatchNormConfig::new(5).init(device),
            conv1: Conv1dConfig::new(4, 6, 3).with_groups(2).init(device),
            conv2: Conv2dConfig::new([3, 5], [2, 4]).init(device),
            layers: layers
                .map(|[d_in, d_out]| {
                    let config = LinearConfig::new(d_in, d_out).with_bias(false);
                    config.init(device)
                })
                .into(),
            lm_head: LinearConfig::new(6, 11).with_bias(false).init(device),
        }
    }
}

/// What PyTorch calls and shapes the parameters of [`Net`]; `true` where Burn holds the transpose.
pub fn names() -> Vec<(&'static str, Vec<usize>, bool)> {
    vec![
        ("embed.weight", vec![11, 6], false),
        ("row.weight", vec![37, 70], true),
        ("row.bias", vec![37], false),
        ("col.weight", vec![70, 37], true),
        ("col.bias", vec![70], false),
        ("norm.weight", vec![9], false),
        ("norm.bias", vec![9], false),
        ("batch.weight", vec![5], false),
        ("batch.bias", vec![5], false),
        ("batch.running_mean", vec![5], false),
        ("batch.running_var", vec![5], false),
        ("conv1.weight", vec![6, 2, 3], false),
        ("conv1.bias", vec![6], false),
        ("conv2.weight", vec![5, 3, 2, 4], false),
        ("conv2.bias", vec![5], false),
        ("layers.0.weight", vec![33, 67], true),
        ("layers.1.weight", vec![128, 32], true),
        ("layers.2.weight", vec![5, 1], true),
        ("layers.3.weight", vec![3, 4099], true),
        ("lm_head.weight", vec![11, 6], true),
    ]
}

/// Random values of changing magnitude, as a file has them.
pub fn tensor(name: &str, dtype: Dtype, shape: &[usize]) -> files::Tensor {
    let seed = name
        .bytes()
        .fold(7, |seed: u64, byte| seed * 31 + u64::from(byte));
    let mut random = StdRng::seed_from_u64(seed);
    let values = (0..shape.iter().product()).map(|i: usize| {
        let scale = [1.0, 0.01, 30.0][i / 50 % 3];
        random.random_range(-scale..scale)
    });
    tensor_of(name, dtype, shape, values.collect())
}

pub fn tensor_of(name: &str, dtype: Dtype, shape: &[usize], values: Vec<f32>) -> files::Tensor {
    files::Tensor {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
        bytes: values
            .iter()
            .flat_map(|&value| match dtype {
                Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
                Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
                _ => value.to_le_bytes().to_vec(),
            })
            .collect(),
    }
}

/// All tensors of a [`Net`].
pub fn tensors(dtype: Dtype) -> Vec<files::Tensor> {
    let names = names().into_iter();
    names
        .map(|(name, shape, _)| tensor(name, dtype, &shape))
        .collect()
}

pub fn dtype_of(dtype: Dtype) -> DType {
    match dtype {
        Dtype::BF16 => DType::BF16,
        Dtype::F16 => DType::F16,
        _ => DType::F32,
    }
}

/// The values of a tensor, the plain way: in `dtype`, transposed if the model holds it so.
pub fn plain(tensor: &files::Tensor, dtype: DType, transposed: bool) -> TensorData {
    let stored = dtype_of(tensor.dtype);
    let data = TensorData::from_bytes_vec(tensor.bytes.clone(), tensor.shape.clone(), stored);
    let data = match transposed {
        false => data,
        true => {
            let [rows, columns] = data.shape().dims();
            let values: Vec<f32> = data.iter().collect();
            let turned = (0..columns).flat_map(|c| (0..rows).map(move |r| [r, c]));
            let turned: Vec<f32> = turned.map(|[r, c]| values[r * columns + c]).collect();
            // Exact: f32 holds the other types.
            TensorData::new(turned, [columns, rows]).convert_dtype(stored)
        }
    };
    data.convert_dtype(dtype)
}

/// Every tensor in a model by its path: floats as they are stored, integers, and which floats are initialised.
#[derive(Debug, Default, PartialEq)]
pub struct Content {
    pub floats: BTreeMap<String, TensorData>,
    pub integers: BTreeMap<String, TensorData>,
    /// Id and whether a gradient is asked for.
    pub params: BTreeMap<String, (u64, bool)>,
    path: Vec<String>,
}

pub fn content<M: Module>(module: &M) -> Content {
    let mut content = Content::default();
    module.visit(&mut content);
    content
}

impl ModuleVisitor for Content {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        let base = param.base();
        let flags = (param.id.val(), base.is_require_grad());
        self.params.insert(path.clone(), flags);
        self.floats.insert(path, base.into_data());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.integers
            .insert(self.path.join("."), param.val().into_data());
    }
}

/// Paths of the float parameters that are initialised.
pub fn initialized<M: Module>(module: &M) -> Vec<String> {
    #[derive(Default)]
    struct Initialized(Vec<String>, Vec<String>);

    impl ModuleVisitor for Initialized {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.0.push(name.to_owned());
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.0.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if param.is_initialized() {
                self.1.push(self.0.join("."));
            }
        }
    }

    let mut found = Initialized::default();
    module.visit(&mut found);
    found.1
}

/// Runs `f` in a pool of so many threads.
pub fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build().unwrap().install(f)
}
