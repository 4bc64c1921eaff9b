//! Modules that are enums: Burn's paths have a segment for the variant, the names of modules and of files have none.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::module::Module;
use burn::nn::norm::{Normalization, NormalizationConfig};
use burn::nn::{BatchNormConfig, Linear, LinearConfig, Relu, RmsNormConfig};
use burn::tensor::{Device, Distribution, Tensor};
use burn_peft::adapter::LoraConfig;
use burn_peft::format::{BaseOptions, LoadOptions, NameMap, SaveBaseOptions, SaveOptions};
use burn_peft::model::{PeftConfig, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use safetensors::SafeTensors;
use serde_json::Value;

#[derive(Module, Debug)]
struct Net {
    layers: Vec<Layer>,
    norm: Normalization,
    head: Linear,
}

#[derive(Module, Debug)]
struct Layer {
    input_norm: Normalization,
    mlp: FeedForward,
}

#[derive(Module, Debug)]
enum FeedForward {
    Gated(Gated),
    Plain(Linear),
}

#[derive(Module, Debug)]
struct Gated {
    gate: Linear,
    up: Linear,
}

/// The modules as a file has them, and any file of PyTorch would.
const LINEAR: [&str; 4] = [
    "head",
    "layers.0.mlp.gate",
    "layers.0.mlp.up",
    "layers.1.mlp",
];

impl Net {
    fn new(device: &Device) -> Self {
        let linear = |d_in, d_out| LinearConfig::new(d_in, d_out).init(device);
        let norm = || NormalizationConfig::Rms(RmsNormConfig::new(8)).init(device);
        let gated = Gated {
            gate: linear(8, 8),
            up: linear(8, 8),
        };
        let layer = |mlp| Layer {
            input_norm: norm(),
            mlp,
        };
        Self {
            layers: vec![
                layer(FeedForward::Gated(gated)),
                layer(FeedForward::Plain(linear(8, 8))),
            ],
            norm: NormalizationConfig::Batch(BatchNormConfig::new(8)).init(device),
            head: linear(8, 3),
        }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let mut x = x;
        for Layer { input_norm, mlp } in &self.layers {
            let y = input_norm.forward(x.clone());
            x = x + match mlp {
                FeedForward::Gated(mlp) => mlp.gate.forward(y.clone()) * mlp.up.forward(y),
                FeedForward::Plain(linear) => Relu::new().forward(linear.forward(y)),
            };
        }
        self.head.forward(self.norm.forward(x))
    }
}

fn input(device: &Device) -> Tensor<2> {
    Tensor::random([5, 8], Distribution::Normal(0.0, 1.0), device)
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.try_into_vec_as().unwrap()
}

fn save_options() -> SaveOptions {
    SaveOptions::default()
}

fn names_in(file: &Path) -> Vec<String> {
    let bytes = fs::read(file).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut names: Vec<_> = file.names().into_iter().map(str::to_owned).collect();
    names.sort();
    names
}

#[test]
fn a_base_is_saved_and_loaded_under_names_without_variants() {
    let device = Device::default();
    let dir = tempfile::tempdir().unwrap();
    let model = PeftModel::new(Net::new(&device)).with_head("head");
    model
        .save_base(dir.path(), &SaveBaseOptions::default())
        .unwrap();
    let names = names_in(&dir.path().join("model.safetensors"));
    let mut expected: Vec<String> = LINEAR
        .iter()
        .flat_map(|module| ["weight", "bias"].map(|name| format!("{module}.{name}")))
        .collect();
    expected.extend(["0", "1"].map(|layer| format!("layers.{layer}.input_norm.weight")));
    expected.extend(
        ["weight", "bias", "running_mean", "running_var"].map(|name| format!("norm.{name}")),
    );
    expected.sort();
    assert_eq!(names, expected);

    let x = input(&device);
    let mut again = PeftModel::new(Net::new(&device)).with_head("head");
    assert_ne!(
        values(again.forward(x.clone())),
        values(model.forward(x.clone()))
    );
    again.load_base(dir.path(), &BaseOptions::new()).unwrap();
    assert_eq!(
        values(again.forward(x.clone())),
        values(model.forward(x.clone()))
    );

    // Packed on the way: targets are modules without variants too.
    let nf4 = Nf4Config::new();
    let targets = TargetConfig::list(["layers.0.mlp.gate", "layers.1.mlp"]);
    let mut packed = PeftModel::new(Net::new(&device));
    let options = BaseOptions::new().with_nf4(targets.clone(), nf4);
    let report = packed.load_base(dir.path(), &options).unwrap();
    assert_eq!(report.packed, 2);
    again.quantize_nf4(&targets, &nf4).unwrap();
    assert_eq!(values(again.forward(x.clone())), values(packed.forward(x)));
}

#[test]
fn rules_see_names_without_variants() {
    let device = Device::default();
    let dir = tempfile::tempdir().unwrap();
    let names = NameMap::new()
        .with_segments("input_layernorm", "input_norm")
        .with_segments("feed_forward", "mlp");
    let model = PeftModel::new(Net::new(&device));
    let options = SaveBaseOptions {
        names: names.clone(),
        ..Default::default()
    };
    model.save_base(dir.path(), &options).unwrap();
    let found = names_in(&dir.path().join("model.safetensors"));
    for name in [
        "layers.0.input_layernorm.weight",
        "layers.0.feed_forward.gate.weight",
        "layers.1.feed_forward.weight",
    ] {
        assert!(found.iter().any(|found| found == name), "{found:?}");
    }
    let mut again = PeftModel::new(Net::new(&device));
    let options = BaseOptions::new().with_names(names);
    again.load_base(dir.path(), &options).unwrap();
    let x = input(&device);
    assert_eq!(values(again.forward(x.clone())), values(model.forward(x)));
}

#[test]
fn an_adapter_names_its_modules_without_variants() {
    let device = Device::default().autodiff();
    let dir = tempfile::tempdir().unwrap();
    let mut model = PeftModel::new(Net::new(&device)).with_head("head");
    let plain = model.clone();
    // Of random factors both, so that the adapter changes something.
    let lora = LoraConfig::new(2).with_init(burn_peft::adapter::LoraInit::Random);
    let targets = TargetConfig::list(["layers.0.mlp.gate", "layers.1.mlp"])
        .with_rank_pattern("layers.1.mlp", 3);
    let config = PeftConfig::new(lora, targets).with_modules_to_save(["input_norm"]);
    let report = model.add_adapter("default", &config).unwrap();
    let matched: Vec<_> = report
        .targets
        .matched
        .iter()
        .map(|target| target.path.as_str())
        .collect();
    assert_eq!(matched, ["layers.0.mlp.gate", "layers.1.mlp"]);
    let reported: Vec<_> = model
        .report()
        .weights
        .iter()
        .map(|weight| weight.path.clone())
        .collect();
    for module in ["layers.0.mlp.gate", "layers.1.mlp", "layers.0.input_norm"] {
        assert!(
            reported.iter().any(|found| found.starts_with(module)),
            "{reported:?}"
        );
    }
    let factors = model.factors("default").unwrap();
    let ranks: BTreeMap<_, _> = factors
        .iter()
        .map(|(path, lora)| (path.as_str(), lora.rank()))
        .collect();
    assert_eq!(
        ranks,
        BTreeMap::from([("layers.0.mlp.gate", 2), ("layers.1.mlp", 3)])
    );

    let path = model
        .save_adapter("default", dir.path(), &save_options())
        .unwrap();
    let keys = names_in(&path.join("adapter_model.safetensors"));
    let mut expected: Vec<String> = ["layers.0.mlp.gate", "layers.1.mlp"]
        .iter()
        .flat_map(|module| ["lora_A", "lora_B"].map(|factor| format!("{module}.{factor}.weight")))
        .collect();
    expected.extend(["0", "1"].map(|layer| format!("layers.{layer}.input_norm.weight")));
    expected.sort();
    let expected: Vec<_> = expected
        .iter()
        .map(|key| format!("base_model.model.{key}"))
        .collect();
    assert_eq!(keys, expected);
    let json = fs::read(path.join("adapter_config.json")).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    assert!(
        !json.to_string().contains("Gated") && !json.to_string().contains("Rms"),
        "{json}"
    );

    let mut again = plain.clone();
    let report = again
        .load_adapter("default", &path, &LoadOptions::default())
        .unwrap();
    assert_eq!(report.loaded.len(), keys.len());
    let x = input(&device);
    let expected = values(model.forward(x.clone()));
    assert_eq!(values(again.forward(x.clone())), expected);
    assert_ne!(values(plain.forward(x.clone())), expected);

    // Given factors find their modules by the same names.
    let mut given = plain.clone();
    given
        .insert_changes("default", &config, model.changes("default").unwrap())
        .unwrap();
    assert_eq!(values(given.forward(x.clone())), expected);
    let mut given = plain;
    let config = PeftConfig::new(config.lora.clone(), config.targets.clone());
    given.insert_adapter("default", &config, factors).unwrap();
    let adapted = given.factors("default").unwrap();
    assert_eq!(adapted.len(), 2);
}

#[test]
fn a_variant_names_nothing_and_the_error_says_what_does() {
    let device = Device::default();
    let mut model = PeftModel::new(Net::new(&device));
    let targets = TargetConfig::list(["layers.0.mlp.Gated.gate", "Plain"]);
    let config = PeftConfig::new(LoraConfig::new(2), targets);
    let error = model
        .add_adapter("default", &config)
        .unwrap_err()
        .to_string();
    // The error names the modules as they are called.
    assert!(error.contains("layers.0.mlp.gate"), "{error}");
}
