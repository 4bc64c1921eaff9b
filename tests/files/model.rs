//! Adapters between PEFT's directory and a model.

use std::fs;
use std::path::Path;

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData, Tolerance};
use burn_peft::PeftError;
use burn_peft::adapter::LoraConfig;
use burn_peft::format::{
    AdapterConfig, AdapterFile, CONFIG_FILE, LoadOptions, LoraTensors, NameMap, ReadOptions,
    SaveOptions, WEIGHTS_FILE, WriteOptions, adapter_dir,
};
use burn_peft::model::{PeftConfig, PeftModel, TargetConfig, TargetModules};
use safetensors::SafeTensors;

use super::{golden, inside, module, read};
use llama::model::LlamaForCausalLm;

fn device() -> Device {
    Device::default()
}

fn llama(name: &str) -> PeftModel<LlamaForCausalLm> {
    let dir = crate::golden("llama").join(name);
    PeftModel::new(LlamaForCausalLm::from_pretrained(dir, &device()).unwrap().1)
}

/// `input_ids`, the base's logits and the adapted ones, from Python.
struct Logits {
    tokens: Tensor<2, Int>,
    base: Tensor<3>,
    adapted: Tensor<3>,
}

fn logits(name: &str) -> Logits {
    let bytes = fs::read(golden(name).join("logits.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data = |name: &str, dtype| {
        let view = file.tensor(name).unwrap();
        TensorData::from_bytes_vec(view.data().to_vec(), view.shape().to_vec(), dtype)
    };
    let float = |name: &str| Tensor::from_data(data(name, DType::F32), &device());
    Logits {
        tokens: Tensor::from_data(data("input_ids", DType::I64), &device()),
        base: float("base"),
        adapted: float("adapted"),
    }
}

fn largest_difference(a: &Tensor<3>, b: &Tensor<3>) -> f32 {
    (a.clone() - b.clone()).abs().max().into_scalar()
}

/// Name of the golden, its base model, and its adapter's name in PEFT.
const ADAPTERS: [(&str, &str, &str); 4] = [
    ("lora", "untied", "default"),
    ("rslora", "untied", "default"),
    ("regex", "tied", "regex"),
    ("dora", "tied", "default"),
];

/// The logits reach 20, and each is the end of a chain of sums of 32 to 64 f32 terms in another order than PyTorch's:
/// a few of the 2e-6 that an ulp is there, amplified layer by layer (seen: 1e-5). The issue asks for 2e-4.
const TOLERANCE: f32 = 5e-5;

#[test]
fn adapters_of_peft_give_peft_s_logits() {
    for (name, base, adapter) in ADAPTERS {
        let expected = logits(name);
        let mut model = llama(base);
        let plain = model.forward(expected.tokens.clone());
        assert!(
            largest_difference(&plain, &expected.base) <= TOLERANCE,
            "{name}: base"
        );

        let report = model
            .load_adapter(adapter, golden(name), &LoadOptions::default())
            .unwrap();
        let weights = fs::read(golden(name).join(WEIGHTS_FILE)).unwrap();
        assert_eq!(
            report.loaded.len(),
            SafeTensors::deserialize(&weights).unwrap().len()
        );
        assert!(report.is_complete());

        let adapted = model.forward(expected.tokens.clone());
        let difference = largest_difference(&adapted, &expected.adapted);
        assert!(difference <= TOLERANCE, "{name}: {difference:e}");
        assert!(
            largest_difference(&adapted, &plain) > 1e-2,
            "{name}: the adapter does nothing"
        );

        let disabled = model.disabled().forward(expected.tokens.clone());
        disabled.into_data().assert_eq(&plain.into_data(), true);
        let (merged, _) = model.merge_and_unload().unwrap();
        let difference = largest_difference(&merged.forward(expected.tokens), &expected.adapted);
        assert!(difference <= TOLERANCE, "{name} merged: {difference:e}");
    }
}

/// The layouts, ranks, alphas and names of a model go back into the file they came from.
#[test]
fn a_loaded_adapter_is_saved_as_it_was() {
    for (name, base, adapter) in ADAPTERS {
        let mut model = llama(base);
        // As in the file: the `regex` adapter is bf16.
        let options = LoadOptions {
            dtype: None,
            ..Default::default()
        };
        model.load_adapter(adapter, golden(name), &options).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let before = read(&golden(name)).unwrap().config;
        let options = SaveOptions {
            task_type: before.task_type.clone(),
            base_model_name_or_path: before.base_model_name_or_path.clone(),
            ..Default::default()
        };
        let dir = model
            .save_adapter(adapter, scratch.path(), &options)
            .unwrap();
        assert_eq!(dir, adapter_dir(scratch.path(), adapter).unwrap());
        let saved = fs::read(dir.join(WEIGHTS_FILE)).unwrap();
        assert!(
            saved == fs::read(golden(name).join(WEIGHTS_FILE)).unwrap(),
            "{name}"
        );
        let json = |dir: &Path| -> serde_json::Value {
            let mut json =
                serde_json::from_slice(&fs::read(dir.join(CONFIG_FILE)).unwrap()).unwrap();
            if let serde_json::Value::Object(fields) = &mut json {
                // Names the Python classes; this crate has none to write there.
                fields.remove("auto_mapping");
                // An expression is written as the list of what it chose.
                if name == "regex" {
                    let targets = fields.remove("target_modules").unwrap();
                    assert_eq!(
                        targets.as_array().map(Vec::len),
                        (dir != golden(name)).then_some(12)
                    );
                }
            }
            json
        };
        assert_eq!(json(&dir), json(&golden(name)), "{name}");
    }
}

#[derive(Module, Debug)]
struct Block {
    query: Linear,
    value: Linear,
}

#[derive(Module, Debug)]
pub(super) struct Net {
    blocks: Vec<Block>,
    head: Linear,
}

impl Net {
    pub(super) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let attend = |x: Tensor<2>, block: &Block| {
            x.clone() + block.query.forward(x.clone()) * block.value.forward(x)
        };
        self.head.forward(self.blocks.iter().fold(x, attend))
    }
}

pub(super) fn net() -> PeftModel<Net> {
    let linear = |d_out| LinearConfig::new(6, d_out).init(&device());
    let block = || Block {
        query: linear(6),
        value: linear(6),
    };
    PeftModel::new(Net {
        blocks: vec![block(), block()],
        head: linear(4),
    })
    .with_head("head")
}

/// How a file in Hugging Face's naming calls the modules of `Net`.
fn names() -> NameMap {
    NameMap::new()
        .with_prefix("model.layers", "blocks")
        .with_prefix("lm_head", "head")
        .with_segments("self_attn.q_proj", "query")
        .with_segments("self_attn.v_proj", "value")
}

/// An adapter in Hugging Face's naming, with a rank and an alpha of their own.
fn renamed() -> AdapterFile {
    let targets = TargetConfig::list(["q_proj", "lm_head"])
        .with_rank_pattern("1.self_attn.q_proj", 3)
        .with_alpha_pattern("lm_head", 1.5);
    AdapterFile::new(
        AdapterConfig::new(2, 3.0, targets),
        vec![
            module("lm_head", 2, 6, 4),
            module("model.layers.0.self_attn.q_proj", 2, 6, 6),
            module("model.layers.1.self_attn.q_proj", 3, 6, 6),
        ],
    )
}

fn attach(
    model: &mut PeftModel<Net>,
    file: &AdapterFile,
    options: &LoadOptions,
) -> Result<(), PeftError> {
    file.attach(model, "default", options)
        .map(|report| assert!(report.is_complete()))
}

#[test]
fn another_naming_goes_through_the_map_both_ways() {
    let options = LoadOptions {
        names: names(),
        ..Default::default()
    };
    let mut model = net();
    attach(&mut model, &renamed(), &options).unwrap();
    let factors = model.factors("default").unwrap();
    let found: Vec<_> = factors
        .iter()
        .map(|(path, lora)| (path.as_str(), lora.rank(), lora.scale()))
        .collect();
    // s = α/r: 3/2, 3/3, 1.5/2.
    assert_eq!(
        found,
        [
            ("blocks.0.query", 2, 1.5),
            ("blocks.1.query", 3, 1.0),
            ("head", 2, 0.75)
        ]
    );

    let options = SaveOptions {
        names: names(),
        ..Default::default()
    };
    let saved = AdapterFile::from_model(&model, "default", &options).unwrap();
    let mut tensors = saved.tensors.clone();
    tensors.sort_by(|a, b| a.path.cmp(&b.path));
    assert_eq!(tensors, renamed().tensors);
    let matcher = saved.config.validate().unwrap();
    for LoraTensors { path, a, .. } in &tensors {
        assert!(matcher.matches(path).unwrap());
        assert_eq!(
            matcher.rank_for(path, saved.config.r).unwrap(),
            a.shape()[0]
        );
        let alpha = if path == "lm_head" { 1.5 } else { 3.0 };
        assert_eq!(
            matcher.alpha_for(path, saved.config.lora_alpha).unwrap(),
            alpha
        );
    }
    assert!(!matcher.matches("model.layers.0.self_attn.v_proj").unwrap());
    let scratch = tempfile::tempdir().unwrap();
    saved
        .write(scratch.path(), &WriteOptions::default())
        .unwrap();

    // Without the map nothing has a place.
    let error = net()
        .load_adapter("default", scratch.path(), &LoadOptions::default())
        .unwrap_err();
    let PeftError::Incomplete { report } = inside(&error, WEIGHTS_FILE) else {
        panic!("{error}")
    };
    assert_eq!((report.loaded.len(), report.unexpected.len()), (0, 6));
}

#[test]
fn a_trained_adapter_comes_back_with_the_same_outputs() {
    let mut model = net();
    let x = Tensor::<2>::random([5, 6], burn::tensor::Distribution::Default, &device());
    for (name, rslora, targets) in [
        (
            "default",
            false,
            TargetConfig::all_linear().with_rank_pattern("1.query", 1),
        ),
        (
            "second",
            true,
            TargetConfig::regex(r".*\.(?!v).*").with_alpha_pattern("query", 2.5),
        ),
    ] {
        let lora = LoraConfig::new(3)
            .with_alpha(5.0)
            .with_dropout(0.1)
            .with_rslora(rslora);
        model
            .add_adapter(name, &PeftConfig::new(lora, targets))
            .unwrap();
        // What training would do to B, which begins at zero.
        let factors = model
            .factors(name)
            .unwrap()
            .into_iter()
            .map(|(path, mut lora)| {
                lora.b = lora
                    .b
                    .map(|b| b.random_like(burn::tensor::Distribution::Normal(0.0, 1.0)));
                (path, lora)
            });
        let (factors, config) = (factors.collect(), model.config(name).unwrap().clone());
        model.delete_adapter(name).unwrap();
        model.insert_adapter(name, &config, factors).unwrap();
        model.set_adapter(name).unwrap();

        let scratch = tempfile::tempdir().unwrap();
        let dir = model
            .save_adapter(name, scratch.path(), &SaveOptions::default())
            .unwrap();
        assert_eq!(dir.ends_with("second"), name == "second");
        let mut reloaded = model.clone();
        reloaded.delete_adapter(name).unwrap();
        reloaded
            .load_adapter("again", &dir, &LoadOptions::default())
            .unwrap();
        reloaded.set_adapter("again").unwrap();
        let (before, after) = (
            model.valid().forward(x.clone()),
            reloaded.valid().forward(x.clone()),
        );
        // The same factors at the same scale, in the same order of operations.
        after
            .into_data()
            .assert_approx_eq::<f32>(&before.clone().into_data(), Tolerance::absolute(1e-6));
        let base = model.disabled().valid().forward(x.clone());
        let effect: f32 = (before - base).abs().max().into_scalar();
        assert!(effect > 1e-2, "{effect}");
    }
    // "all-linear" leaves out the head here; in the file that stands as a list, since PEFT may know another head.
    let saved = AdapterFile::from_model(&model, "default", &SaveOptions::default()).unwrap();
    let paths = [
        "blocks.0.query",
        "blocks.0.value",
        "blocks.1.query",
        "blocks.1.value",
    ];
    assert_eq!(
        saved.config.targets.target_modules,
        TargetModules::List(paths.map(String::from).into())
    );
}

/// A module too few, one too many and one of another shape: all are named, and the model is as it was.
#[test]
fn loading_is_strict_unless_asked_and_names_everything_that_does_not_fit() {
    let mut file = renamed();
    file.tensors[0] = module("lm_head", 2, 6, 5);
    file.tensors[1].path = "model.layers.7.self_attn.q_proj".into();
    let mut options = LoadOptions {
        names: names(),
        ..Default::default()
    };
    let mut model = net();
    let error = attach(&mut model, &file, &options).unwrap_err();
    assert_eq!(model.adapters().count(), 0);
    let PeftError::Incomplete { report } = &error else {
        panic!("{error}")
    };
    let keys = |path: &str| {
        ["A", "B"].map(|factor| format!("base_model.model.{path}.lora_{factor}.weight"))
    };
    assert_eq!(report.loaded, keys("model.layers.1.self_attn.q_proj"));
    assert_eq!(report.missing, keys("model.layers.0.self_attn.q_proj"));
    assert_eq!(report.unexpected, keys("model.layers.7.self_attn.q_proj"));
    assert_eq!(report.mismatched.len(), 1);
    assert_eq!(report.mismatched[0].tensor, keys("lm_head")[1]);
    assert_eq!(report.mismatched[0].expected, [4, 2]);
    assert_eq!(report.mismatched[0].found, [5, 2]);

    options.strict = false;
    let mut lenient = file.attach(&mut model, "default", &options).unwrap();
    assert_eq!(
        (lenient.active.take(), lenient.trainable.take()),
        (Some(true), Some(false))
    );
    assert_eq!(lenient, **report);
    let factors = model.factors("default").unwrap();
    assert_eq!(
        factors
            .iter()
            .map(|(path, _)| path.as_str())
            .collect::<Vec<_>>(),
        ["blocks.1.query"]
    );

    // Of this one nothing fits.
    file.tensors.pop();
    assert!(matches!(
        attach(&mut net(), &file, &options),
        Err(PeftError::Incomplete { .. })
    ));
}

#[test]
fn names_that_are_taken_or_unknown_are_errors() {
    let options = LoadOptions {
        names: names(),
        ..Default::default()
    };
    let mut model = net();
    attach(&mut model, &renamed(), &options).unwrap();
    let taken = attach(&mut model, &renamed(), &options).unwrap_err();
    assert!(matches!(taken, PeftError::AdapterName { .. }), "{taken}");
    let unknown = model
        .save_adapter("other", "unused", &SaveOptions::default())
        .unwrap_err();
    assert!(
        matches!(unknown, PeftError::UnknownAdapter { .. }),
        "{unknown}"
    );
    assert!(!Path::new("unused").exists());
}

/// As in PEFT, factors are f32 unless asked otherwise, whatever the file holds; only the active adapter trains.
#[test]
fn factors_are_f32_unless_asked_otherwise() {
    let dtype = |dtype| {
        let device = device().autodiff();
        let (_, llama) =
            LlamaForCausalLm::from_pretrained(crate::golden("llama/tied"), &device).unwrap();
        let mut model = PeftModel::new(llama);
        let options = LoadOptions {
            dtype,
            trainable: true,
            ..Default::default()
        };
        model
            .load_adapter("regex", golden("regex"), &options)
            .unwrap();
        let factors = model.factors("regex").unwrap();
        assert!(
            factors
                .iter()
                .all(|(_, lora)| lora.a.is_require_grad() && lora.b.is_require_grad())
        );
        assert!(
            factors
                .iter()
                .all(|(_, lora)| lora.a.val().dtype() == lora.b.val().dtype())
        );
        factors[0].1.a.val().dtype()
    };
    assert_eq!(dtype(Some(FloatDType::F32)), DType::F32);
    assert_eq!(dtype(None), DType::BF16);
    let options = ReadOptions::default();
    assert_eq!(
        AdapterFile::read(golden("regex"), &options)
            .unwrap()
            .tensors[0]
            .a
            .dtype(),
        DType::BF16
    );
}

#[test]
fn an_adapter_is_swapped_with_that_of_a_file_only_when_asked_and_only_whole() {
    let mut model = llama("untied");
    let load = |model: &mut PeftModel<LlamaForCausalLm>, name: &str, options: &LoadOptions| {
        model.load_adapter("served", golden(name), options)
    };
    let strict = LoadOptions::default();
    let replace = LoadOptions {
        replace: true,
        ..LoadOptions::default()
    };
    // The first of its name is simply added.
    load(&mut model, "lora", &replace).unwrap();
    let error = load(&mut model, "rslora", &strict).unwrap_err();
    assert!(matches!(error, PeftError::AdapterName { .. }), "{error}");
    load(&mut model, "rslora", &replace).unwrap();
    assert_eq!(model.adapters().collect::<Vec<_>>(), ["served"]);
    let mut other = llama("untied");
    load(&mut other, "rslora", &strict).unwrap();
    let tokens = logits("rslora").tokens;
    let expected = other.forward(tokens.clone());
    let difference = |model: &PeftModel<LlamaForCausalLm>| {
        largest_difference(&model.forward(tokens.clone()), &expected)
    };
    assert_eq!(difference(&model), 0.0);
    // Of another base: nothing fits as it should, and nothing changes.
    assert!(load(&mut model, "dora", &replace).is_err());
    assert_eq!(difference(&model), 0.0);
}
