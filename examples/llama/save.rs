//! Writing a Llama as a Hugging Face directory that transformers reads.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor, TensorData};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::config::LlamaConfig;
use super::error::{LlamaError, Result};
use super::model::LlamaForCausalLm;
use super::names::NameStack;

/// Element type of the written weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SavedType {
    /// 4 bytes a weight, exact.
    F32,
    /// 2 bytes a weight, rounded to nearest.
    BF16,
}

impl LlamaForCausalLm {
    /// Writes `config.json` and `model.safetensors` into `dir`, which is made if need be; present files are replaced.
    ///
    /// # Errors
    ///
    /// When a file cannot be written, or the model is not the plain one of `config`: adapters must be unloaded first.
    pub fn save_pretrained(
        &self,
        dir: impl AsRef<Path>,
        config: &LlamaConfig,
        dtype: SavedType,
    ) -> Result<()> {
        let dir = dir.as_ref();
        let path = dir.join("model.safetensors");
        let mut plain = Names::default();
        config.init(&Default::default()).visit(&mut plain);
        let mut own = Names::default();
        self.visit(&mut own);
        if plain.shapes != own.shapes {
            let differing = |one: &Names, other: &Names| {
                let differs = |(name, shape): &(&String, &Vec<usize>)| {
                    other.shapes.get(*name) != Some(*shape)
                };
                one.shapes
                    .iter()
                    .filter(differs)
                    .map(|(name, _)| name.clone())
                    .collect()
            };
            return Err(LlamaError::Names {
                path,
                missing: differing(&plain, &own),
                unexpected: differing(&own, &plain),
            });
        }
        let mut collector = Collector {
            names: NameStack::default(),
            dtype: match dtype {
                SavedType::F32 => DType::F32,
                SavedType::BF16 => DType::BF16,
            },
            tensors: BTreeMap::new(),
        };
        self.visit(&mut collector);
        let mut views = Vec::with_capacity(collector.tensors.len());
        for (name, data) in &collector.tensors {
            let dtype = match dtype {
                SavedType::F32 => Dtype::F32,
                SavedType::BF16 => Dtype::BF16,
            };
            let view = TensorView::new(dtype, data.shape().to_vec(), data.as_bytes())
                .map_err(LlamaError::file(&path))?;
            views.push((name.as_str(), view));
        }
        // transformers refuses files without this entry.
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let bytes =
            safetensors::serialize(views, Some(metadata)).map_err(LlamaError::file(&path))?;
        std::fs::create_dir_all(dir).map_err(LlamaError::io(dir))?;
        std::fs::write(&path, bytes).map_err(LlamaError::io(&path))?;
        let path = dir.join("config.json");
        std::fs::write(&path, config.to_json()).map_err(LlamaError::io(&path))
    }
}

/// Collects names and shapes without making any value.
#[derive(Default)]
struct Names {
    names: NameStack,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl ModuleVisitor for Names {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.names.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.names.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.shapes
            .insert(self.names.name(), param.lazy_shape().to_vec());
    }
}

/// Collects the values in the checkpoint's layout.
struct Collector {
    names: NameStack,
    dtype: DType,
    tensors: BTreeMap<String, TensorData>,
}

impl ModuleVisitor for Collector {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.names.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.names.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        let tensor = if self.names.is_transposed() {
            tensor.transpose()
        } else {
            tensor
        };
        let data = tensor.into_data().convert_dtype(self.dtype);
        self.tensors.insert(self.names.name(), data);
    }
}
