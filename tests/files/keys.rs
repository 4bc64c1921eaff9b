//! Every key of `adapter_config.json` against PEFT (`tests/golden/keys/generate.py`): another value gives PEFT's outputs, or is refused; and
//! where the published table calls a key inert, PEFT's outputs do not depend on it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::format::{
    AdapterFile, BaseValues, CONFIG_FILE, LoadOptions, ReadOptions, WEIGHTS_FILE,
};
use burn_peft::model::{PeftForward, PeftModel};
use serde_json::Value;

use super::kinds::{Tensors, check};

#[derive(Module, Debug)]
struct Block {
    q: Linear,
    v: Linear,
}

#[derive(Module, Debug)]
struct Body {
    embed: Embedding,
    layers: Vec<Block>,
    norm: LayerNorm,
}

#[derive(Module, Debug)]
struct Experts {
    weight: Param<Tensor<3>>,
}

/// The model of `generate.py`.
#[derive(Module, Debug)]
struct Net {
    body: Body,
    experts: Experts,
    head: Linear,
}

impl Net {
    fn load(device: &Device) -> Self {
        let file = Tensors::read(&dir("base.safetensors"));
        let tensor = |name: &str| Tensor::<2>::from_data(file.get(name).clone(), device);
        let vector =
            |name: &str| Param::from_tensor(Tensor::<1>::from_data(file.get(name).clone(), device));
        let linear = |name: &str| Linear {
            weight: Param::from_data(
                tensor(&format!("{name}.weight")).transpose().into_data(),
                device,
            ),
            bias: Some(vector(&format!("{name}.bias"))),
        };
        let block = |layer: usize| Block {
            q: linear(&format!("body.layers.{layer}.q")),
            v: linear(&format!("body.layers.{layer}.v")),
        };
        let mut norm = LayerNormConfig::new(6).init(device);
        norm.gamma = vector("body.norm.weight");
        norm.beta = Some(vector("body.norm.bias"));
        let mut embed = EmbeddingConfig::new(11, 6).init(device);
        embed.weight = Param::from_tensor(tensor("body.embed.weight"));
        let experts = Tensor::<3>::from_data(file.get("experts.weight").clone(), device);
        Self {
            body: Body {
                embed,
                layers: vec![block(0), block(1)],
                norm,
            },
            experts: Experts {
                weight: Param::from_tensor(experts),
            },
            head: linear("head"),
        }
    }

    fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let x = self.body.embed.forward_peft(tokens);
        let x = self.body.layers.iter().fold(x, |x, block| {
            let product = block.q.forward_peft(x.clone()).tanh() * block.v.forward_peft(x.clone());
            x + product
        });
        let x = self.body.norm.forward(x);
        let experts = self.experts.weight.val().mean_dim(0).squeeze_dim::<2>(0);
        self.head.forward_peft(x.clone()) + x.matmul(experts.transpose().unsqueeze())
    }
}

fn dir(name: &str) -> std::path::PathBuf {
    crate::golden("keys").join(name)
}

struct Variant {
    key: String,
    set: String,
    value: Value,
    /// What PEFT says, if it does not load it or what it adds is random.
    error: Option<String>,
    /// The outputs that PEFT has otherwise.
    outputs: Option<TensorData>,
}

fn variants() -> (Vec<String>, Vec<Variant>, Tensors) {
    let text = fs::read_to_string(dir("keys.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let outputs = Tensors::read(&dir("outputs.safetensors"));
    let variants = json["variants"].as_array().unwrap().iter().enumerate();
    let variants = variants.map(|(number, variant)| Variant {
        key: variant["key"].as_str().unwrap().into(),
        set: variant["set"].as_str().unwrap().into(),
        value: variant["value"].clone(),
        error: variant["error"].as_str().map(str::to_owned),
        outputs: outputs.0.get(&format!("variant.{number}")).cloned(),
    });
    let keys = serde_json::from_value(json["keys"].clone()).unwrap();
    (keys, variants.collect(), outputs)
}

/// The directory of a set with one key changed.
fn changed(variant: &Variant, scratch: &Path) {
    let set = dir(&variant.set);
    fs::copy(set.join(WEIGHTS_FILE), scratch.join(WEIGHTS_FILE)).unwrap();
    let text = fs::read_to_string(set.join(CONFIG_FILE)).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    if variant.key == "layers_pattern" {
        config["layers_to_transform"] = serde_json::json!([1]);
    }
    config[&variant.key] = variant.value.clone();
    fs::write(scratch.join(CONFIG_FILE), config.to_string()).unwrap();
}

fn load(dir: &Path, options: &LoadOptions) -> Result<TensorData, PeftError> {
    let device = Device::flex();
    let mut model = PeftModel::new(Net::load(&device));
    model.load_adapter("default", dir, options)?;
    let tokens = Tensors::read(&self::dir("outputs.safetensors"))
        .get("input")
        .clone();
    Ok(model
        .forward(Tensor::from_data(tokens, &device))
        .into_data())
}

/// Sums of a few f32 products through two blocks.
const BOUND: f32 = 1e-5;

/// What the published table says of each key.
fn verdicts() -> BTreeMap<String, String> {
    let table = fs::read_to_string(crate::repository().join("docs/peft-config.md")).unwrap();
    let rows = table
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    rows.map(|(key, rest)| (key.into(), rest.split(' ').next().unwrap().into()))
        .collect()
}

/// Keys that PEFT does not get as far as using on such a model, and what keeps it.
const BEYOND: [(&str, &str); 2] = [
    // It imports NVIDIA's Megatron, whose layers alone it is about.
    ("megatron_config", "No module named 'megatron'"),
    // It chooses the Python class that wraps the model.
    ("task_type", ""),
];

#[test]
fn sets_have_peft_s_outputs() {
    let (_, _, outputs) = variants();
    let sets = [
        "plain",
        "ranks",
        "dora",
        "lora-bias",
        "bias",
        "saved",
        "tokens",
        "experts",
        "embedding",
    ];
    for set in sets {
        let found = load(&dir(set), &LoadOptions::default());
        let found = found.unwrap_or_else(|error| panic!("{set}: {error}"));
        check(set, &found, outputs.get(set), BOUND);
    }
}

#[test]
fn every_key_does_what_it_does_in_peft_or_is_refused_or_inert_with_proof() {
    let (keys, variants, outputs) = variants();
    let verdicts = verdicts();
    assert_eq!(
        verdicts.keys().collect::<Vec<_>>(),
        keys.iter().collect::<Vec<_>>()
    );
    let mut seen = BTreeSet::new();
    let mut effective = BTreeSet::new();
    for variant in &variants {
        let Variant {
            key, set, value, ..
        } = variant;
        let what = format!("{key} = {value} of `{set}`");
        seen.insert(key.clone());
        let scratch = tempfile::tempdir().unwrap();
        changed(variant, scratch.path());
        let verdict = verdicts[key].as_str();
        let same = variant.outputs.as_ref() == Some(outputs.get(set));
        match load(scratch.path(), &LoadOptions::default()) {
            Ok(found) => {
                assert_ne!(verdict, "refused", "{what}");
                let beyond = BEYOND.iter().find(|(beyond, _)| beyond == key);
                match (&variant.outputs, beyond) {
                    (Some(expected), _) => check(&what, &found, expected, BOUND),
                    (None, Some((_, part))) => {
                        let error = variant.error.as_deref().unwrap();
                        assert!(error.contains(part), "{what}: {error}");
                        check(&what, &found, outputs.get(set), BOUND);
                    }
                    (None, None) => panic!("{what}: PEFT says {:?}", variant.error),
                }
                if !same && beyond.is_none() {
                    effective.insert(key.clone());
                }
                if verdict == "inert" && beyond.is_none() {
                    assert!(same, "{what} is no inert key in PEFT");
                }
            }
            Err(error) => {
                assert_ne!(verdict, "inert", "{what}: {error}");
                effective.insert(key.clone());
                // What PEFT would load, with a warning at most, is loaded if asked for; and means the same then.
                let options = LoadOptions::new()
                    .with_strict(false)
                    .with_base_values(BaseValues::All);
                match (load(scratch.path(), &options), &variant.outputs) {
                    (Ok(found), Some(expected)) => check(&what, &found, expected, BOUND),
                    // Not even PEFT loads it, so that there is nothing to compare with what fits.
                    (_, None) => {}
                    // Refused by name, and read as if the key were absent if that is asked for.
                    (Err(error), Some(expected)) => {
                        let by_name = match inside(&error) {
                            PeftError::UnsupportedKey { .. } => true,
                            // The key asks for tensors that the file does not have.
                            PeftError::Incomplete { .. } => false,
                            _ => panic!("{what}: {error}"),
                        };
                        let text = error.to_string();
                        // Another method is not this crate's to read.
                        let way_out = text.contains("ReadOptions::ignored_keys");
                        assert!(way_out || key == "peft_type", "{what}: {text}");
                        let read = ReadOptions::new().with_ignored_keys([key.as_str()]);
                        assert!(
                            AdapterFile::read(scratch.path(), &read).is_ok() || key == "peft_type",
                            "{what}"
                        );
                        if !by_name && key == "lora_bias" {
                            let found = load(scratch.path(), &LoadOptions::new().with_read(read));
                            check(&what, &found.unwrap(), expected, BOUND);
                        }
                    }
                }
            }
        }
    }
    assert_eq!(
        seen.iter().collect::<Vec<_>>(),
        keys.iter().collect::<Vec<_>>()
    );
    // Keys that are honoured and change nothing here: texts, what acts in training alone, and what is about another model.
    let quiet = [
        "base_model_name_or_path",
        "ensure_weight_tying",
        "fan_in_fan_out",
        "inference_mode",
        "lora_dropout",
        "peft_version",
        "revision",
        "task_type",
    ];
    for key in keys {
        let is_quiet = verdicts[&key] == "inert" || quiet.contains(&key.as_str());
        assert_eq!(effective.contains(&key), !is_quiet, "{key}");
    }
}

fn inside(error: &PeftError) -> &PeftError {
    match error {
        PeftError::InFile { source, .. } => source,
        error => error,
    }
}
