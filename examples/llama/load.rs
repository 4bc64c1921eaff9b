//! Reading a Hugging Face directory into a Llama.

use std::collections::BTreeSet;
use std::path::Path;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Shape, Tensor, TensorData};

use super::checkpoint::{self, Checkpoint};
use super::config::LlamaConfig;
use super::error::{LlamaError, Result};
use super::model::LlamaForCausalLm;
use super::names::NameStack;

impl LlamaForCausalLm {
    /// Reads `config.json` and `model.safetensors` (or its sharded index) of `dir`.
    ///
    /// All names, shapes and element types are checked here. The values of each weight are read when it is first
    /// used, in the device's default float type whatever the file's, and never made at random before: quantising the
    /// model at once holds one dense weight at a time.
    ///
    /// # Errors
    ///
    /// When a file is absent or broken, the configuration is not supported, a tensor is missing, unexpected, or of
    /// another shape or type than the configuration says. As in transformers, `rotary_emb.inv_freq` is ignored, and
    /// so is `lm_head.weight` if the embeddings are tied.
    ///
    /// # Panics
    ///
    /// Later, at the first use of a weight, if its file can no longer be read.
    pub fn from_pretrained(dir: impl AsRef<Path>, device: &Device) -> Result<(LlamaConfig, Self)> {
        let dir = dir.as_ref();
        let config = LlamaConfig::from_dir(dir)?;
        let mut checkpoint = checkpoint::open(dir)?;
        checkpoint.retain(|name, _| {
            let tied_head = config.tie_word_embeddings && name == "lm_head.weight";
            !(tied_head || name.ends_with("rotary_emb.inv_freq"))
        });
        let mut loader = Loader {
            unexpected: checkpoint.keys().cloned().collect(),
            checkpoint,
            ..Loader::default()
        };
        let model = config.init(device).map(&mut loader);
        if !loader.missing.is_empty() || !loader.unexpected.is_empty() {
            return Err(LlamaError::Names {
                path: dir.to_owned(),
                missing: loader.missing.into_iter().collect(),
                unexpected: loader.unexpected.into_iter().collect(),
            });
        }
        match loader.error {
            Some(error) => Err(error),
            None => Ok((config, model)),
        }
    }
}

/// Replaces every parameter by one that reads its values from the checkpoint.
#[derive(Default)]
struct Loader {
    checkpoint: Checkpoint,
    names: NameStack,
    missing: BTreeSet<String>,
    unexpected: BTreeSet<String>,
    /// The first wrong shape or element type.
    error: Option<LlamaError>,
}

impl Loader {
    /// The lazily read parameter in place of `param`, or none if the checkpoint has no such tensor.
    fn lazy<const D: usize>(
        &mut self,
        param: &Param<Tensor<D>>,
    ) -> Result<Option<Param<Tensor<D>>>> {
        let (name, transposed) = (self.names.name(), self.names.is_transposed());
        let Some(stored) = self.checkpoint.get(&name).cloned() else {
            self.missing.insert(name);
            return Ok(None);
        };
        self.unexpected.remove(&name);
        let shape: Shape = param.lazy_shape();
        let mut expected = shape.to_vec();
        if transposed {
            expected.reverse();
        }
        if stored.shape != expected {
            return Err(LlamaError::Shape {
                path: stored.path,
                tensor: name,
                expected,
                found: stored.shape,
            });
        }
        let dtype = stored.dtype(&name)?;
        let read = move |device: &Device, require_grad: bool| {
            let data = stored
                .read(dtype)
                .unwrap_or_else(|error| panic!("tensor `{name}`: {error}"));
            let data = if transposed { transpose(data) } else { data };
            device.memory_persistent_allocations(data, |data| {
                let float: DType = device.settings().float_dtype.into();
                Tensor::from_data(data, (device, float)).set_require_grad(require_grad)
            })
        };
        Ok(Some(Param::uninitialized(
            param.id,
            read,
            param.lazy_device(),
            true,
            shape,
        )))
    }
}

/// The matrix `[d_out, d_in]` as `[d_in, d_out]` in f32.
///
/// Burn copies a transposed view anew at every product with a single row.
fn transpose(data: TensorData) -> TensorData {
    // Small enough that what is read and what is written both stay in the cache.
    const TILE: usize = 32;
    let [rows, columns] = data.shape().dims();
    let values: Vec<f32> = data.iter().collect();
    drop(data);
    let mut transposed = vec![0.0; values.len()];
    for first in (0..columns).step_by(TILE) {
        for (row, values) in values.chunks_exact(columns).enumerate() {
            for column in first..columns.min(first + TILE) {
                transposed[column * rows + row] = values[column];
            }
        }
    }
    TensorData::new(transposed, [columns, rows])
}

impl ModuleMapper for Loader {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.names.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.names.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.lazy(&param) {
            Ok(Some(loaded)) => return loaded,
            Ok(None) => {}
            Err(error) => {
                self.error.get_or_insert(error);
            }
        }
        param
    }
}
