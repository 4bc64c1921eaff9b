//! The families of models that people load: tiny checkpoints of transformers in Burn models that call their fields as Burn's
//! users do. What a user has to write is the `Family` in each file.

mod bert;
mod decoders;
mod gpt2;
mod t5;
mod vision;
mod whisper;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use burn_peft::format::{BaseReport, Family, SafetensorsFile};
use burn_peft::model::PeftModel;

use crate::base::files::Dir;
use crate::base::model::content;

fn golden(family: &str) -> PathBuf {
    crate::golden("families").join(family)
}

fn open(path: &Path) -> SafetensorsFile {
    SafetensorsFile::open(path, 1 << 20).unwrap()
}

/// The model with the weights of a folder, and what became of them.
fn load<M: Module>(family: &Family, folder: &str, module: M) -> (PeftModel<M>, BaseReport) {
    let mut model = PeftModel::new(module);
    let report = model.load_base(golden(folder), &family.load_options());
    let report = report.unwrap_or_else(|error| panic!("{folder}: {error}"));
    (model, report)
}

/// How a parameter lies in the file.
#[derive(Clone, Copy, PartialEq)]
enum Lies {
    Same,
    Transposed,
}
use Lies::Transposed;

/// Checks that every parameter has the values of its tensor and that every tensor has a parameter. In the table `#` stands for
/// the number of a layer.
fn check<M: Module>(module: &M, folder: &str, layers: usize, table: &[(&str, &str, Lies)]) {
    let file = open(&golden(folder).join("model.safetensors"));
    let mut names: BTreeSet<String> = file.shapes().map(|(name, _)| name.to_owned()).collect();
    let mut floats = content(module).floats;
    for (path, name, lies) in table {
        let count = if path.contains('#') { layers } else { 1 };
        for layer in 0..count {
            let [path, name] = [path, name].map(|text| text.replace('#', &layer.to_string()));
            let found = floats
                .remove(&path)
                .unwrap_or_else(|| panic!("no parameter {path}"));
            let mut expected = file.read(&name).unwrap_or_else(|error| panic!("{error}"));
            if *lies == Transposed {
                let tensor = Tensor::<2>::from_data(expected, &Device::flex());
                expected = tensor.transpose().into_data();
            }
            assert_eq!(found, expected, "{path} of {name}");
            names.remove(&name);
        }
    }
    assert!(floats.is_empty(), "{:?}", floats.keys());
    assert!(names.is_empty(), "{names:?}");
}

/// An input or the output that Python computed.
fn expected(folder: &str, name: &str) -> TensorData {
    let path = golden(folder).join("expected.safetensors");
    if name == "logits" {
        return open(&path).read(name).unwrap();
    }
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor(name).unwrap();
    let values = tensor.data().chunks_exact(8);
    let values: Vec<i64> = values
        .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
        .collect();
    TensorData::new(values, tensor.shape().to_vec())
}

fn ids(folder: &str, name: &str) -> Tensor<2, Int> {
    Tensor::from_data(expected(folder, name), &Device::flex())
}

/// Checks that logits are those of Python.
fn assert_logits(folder: &str, logits: Tensor<3>) {
    let expected = expected(folder, "logits");
    let found = logits.into_data();
    assert_eq!(found.shape(), expected.shape());
    let differences = found.iter::<f32>().zip(expected.iter::<f32>());
    let largest = differences.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(largest < 2e-4, "{folder}: {largest}");
}

/// Checks that a model which is saved is the file that it was loaded from, but for tensors that need not be there.
fn check_saved<M: Module>(model: &PeftModel<M>, family: &Family, folder: &str) {
    let dir = Dir::new();
    model.save_base(dir.path(), &family.save_options()).unwrap();
    let (saved, file) = (
        open(&dir.file("model.safetensors")),
        open(&golden(folder).join("model.safetensors")),
    );
    let names: Vec<&str> = file.shapes().map(|(name, _)| name).collect();
    assert!(
        saved
            .shapes()
            .map(|(name, _)| name)
            .eq(names.iter().copied())
    );
    for name in names {
        assert_eq!(
            saved.read(name).unwrap(),
            file.read(name).unwrap(),
            "{name}"
        );
    }
}

/// Softmax attention of heads `[batch, heads, length, d]`, with what is added to the scores.
fn attend(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    scale: f64,
    added: Option<Tensor<4>>,
) -> Tensor<4> {
    let mut scores = q.matmul(k.transpose()).mul_scalar(scale);
    if let Some(added) = added {
        scores = scores + added;
    }
    burn::tensor::activation::softmax(scores, 3).matmul(v)
}

/// `-1e9` where a query would see a later key: `[1, 1, length, length]`.
fn causal(length: usize) -> Tensor<4> {
    let values = (0..length * length).map(|i| if i % length > i / length { -1e9 } else { 0.0 });
    let data = TensorData::new(values.collect::<Vec<f32>>(), [1, 1, length, length]);
    Tensor::from_data(data, &Device::flex())
}

/// `[batch, length, heads·d] -> [batch, heads, length, d]`.
fn split(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, length, width] = x.dims();
    x.reshape([batch, length, heads, width / heads])
        .swap_dims(1, 2)
}

/// And back.
fn join(x: Tensor<4>) -> Tensor<3> {
    let [batch, heads, length, d] = x.dims();
    x.swap_dims(1, 2).reshape([batch, length, heads * d])
}

/// `x·Eᵀ`.
fn tied_head(x: Tensor<3>, embedding: &burn::nn::Embedding) -> Tensor<3> {
    x.matmul(embedding.weight.val().transpose().unsqueeze())
}

#[test]
fn a_family_is_known_by_the_configuration_s_word() {
    for (folder, model_type) in [
        ("llama", "llama"),
        ("gemma3", "gemma3_text"),
        ("gpt2", "gpt2"),
        ("vit", "vit"),
    ] {
        let config = std::fs::read(golden(folder).join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(config["model_type"], model_type);
        assert!(Family::of_model_type(model_type).is_some());
    }
    assert!(Family::of_model_type("mamba").is_none());
}

#[test]
fn options_go_on_from_a_family_s() {
    let options = Family::llama().load_options().with_dtype(FloatDType::BF16);
    let mut model = PeftModel::new(decoders::llama_net());
    let renamed = decoders::family(Family::llama());
    let options = options.with_names(renamed.names());
    model.load_base(golden("llama"), &options).unwrap();
    let dtype = content(model.module()).floats["embedding.weight"].dtype();
    assert_eq!(dtype, burn::tensor::DType::BF16);
}

/// A Llama whose head is its embedding, from whatever folder.
pub mod tied_llama {
    use burn_peft::format::BaseOptions;

    use super::*;

    /// Loads the folder into a model of some tokens more, and checks that the logits of the others are those that transformers
    /// computed of `sharded`.
    pub fn check(
        dir: &Path,
        more_tokens: usize,
        options: impl FnOnce(BaseOptions) -> BaseOptions,
    ) -> BaseReport {
        let family = decoders::family(Family::llama());
        let mut model = PeftModel::new(decoders::tied_llama(more_tokens));
        let options = options(family.load_options());
        let report = model.load_base(dir, &options).unwrap();
        let logits = model.module().forward(ids("sharded", "input_ids"));
        assert_eq!(logits.dims()[2], 13 + more_tokens);
        assert_logits("sharded", logits.narrow(2, 0, 13));
        report
    }
}
