//! What does not fit a model or a type: refused as a whole, or left out and reported if that is asked for.

use std::fs;
use std::path::Path;

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::format::{
    AdapterConfig, AdapterFile, CONFIG_FILE, LoadOptions, ParameterTensor, ReadOptions,
    SaveOptions, WEIGHTS_FILE,
};
use burn_peft::model::{PeftModel, TargetConfig};
use safetensors::tensor::{Dtype, TensorView};

use super::model::net;
use super::module;

/// A file of an adapter with these tensors: name, type, shape; zeros.
fn write(dir: &Path, config: &str, tensors: &[(&str, Dtype, &[usize])]) {
    let data = vec![0; 4096];
    let views = tensors.iter().map(|(name, dtype, shape)| {
        let bytes = dtype.bitsize() / 8 * shape.iter().product::<usize>();
        (
            format!("base_model.model.{name}"),
            TensorView::new(*dtype, shape.to_vec(), &data[..bytes]).unwrap(),
        )
    });
    fs::write(
        dir.join(WEIGHTS_FILE),
        safetensors::serialize(views, None).unwrap(),
    )
    .unwrap();
    fs::write(dir.join(CONFIG_FILE), config).unwrap();
}

#[test]
fn without_strictness_what_fits_is_loaded_and_the_rest_is_reported() {
    use Dtype::{F16, F32, I64};

    let dir = tempfile::tempdir().unwrap();
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "of_a_later_peft": 1}"#;
    let tensors: &[(&str, Dtype, &[usize])] = &[
        ("blocks.0.query.lora_A.weight", F32, &[2, 6]),
        ("blocks.0.query.lora_B.weight", F32, &[6, 2]),
        ("blocks.1.query.lora_A.weight", F32, &[2, 6]),
        ("blocks.1.query.lora_B.weight", F32, &[6, 2]),
        // Another rank, another shape, no partner, two types, a type of no adapter.
        ("blocks.0.value.lora_A.weight", F32, &[3, 6]),
        ("blocks.0.value.lora_B.weight", F32, &[6, 3]),
        ("blocks.1.value.lora_A.weight", F32, &[2, 6]),
        // Of no module of the model, buffers, and a parameter that nothing asks for.
        ("blocks.7.query.lora_A.weight", F32, &[2, 6]),
        ("blocks.7.query.lora_B.weight", F32, &[6, 2]),
        ("norm.num_batches_tracked", I64, &[]),
        ("embeddings.position_ids", I64, &[1, 4]),
        ("classifier.weight", F32, &[2, 6]),
        ("blocks.0.other.lora_A.weight", F32, &[2, 6]),
        ("blocks.0.other.lora_B.weight", F16, &[6, 2]),
    ];
    write(dir.path(), config, tensors);

    let mut model = net();
    let read = ReadOptions::new().with_allow_unknown_keys(true);
    for options in [LoadOptions::default(), LoadOptions::new().with_read(read)] {
        assert!(model.load_adapter("default", dir.path(), &options).is_err());
        assert_eq!(model.adapters().count(), 0);
    }
    let options = LoadOptions::new().with_strict(false);
    let report = model.load_adapter("default", dir.path(), &options).unwrap();
    assert_eq!(report.loaded.len(), 4, "{report}");
    let factors = model.factors("default").unwrap();
    let paths: Vec<_> = factors.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, ["blocks.0.query", "blocks.1.query"]);
    // Every other tensor is named.
    let mismatched = report.mismatched.iter().map(|mismatch| &mismatch.tensor);
    let named: Vec<_> = report
        .unexpected
        .iter()
        .chain(&report.left_out)
        .chain(mismatched)
        .collect();
    for (name, ..) in &tensors[4..] {
        let key = format!("base_model.model.{name}");
        let noted = report.notes.iter().any(|note| note.contains(&key));
        assert!(named.contains(&&key) || noted, "{key}: {report}");
    }
    assert!(
        report
            .missing
            .contains(&"base_model.model.blocks.1.value.lora_B.weight".to_owned()),
        "{report}"
    );

    // An adapter of which nothing fits is none.
    write(dir.path(), config, &tensors[7..]);
    let error = net()
        .load_adapter("default", dir.path(), &options)
        .unwrap_err();
    assert!(error.to_string().contains("0 tensors loaded"), "{error}");
}

/// The error of loading an adapter of which one value of `B` is `value`, with factors of `dtype`.
fn overflow(value: f32, dtype: FloatDType) -> Result<DType, PeftError> {
    let mut query = module("blocks.0.query", 2, 6, 6);
    let mut values = query.b.try_to_vec::<f32>().unwrap();
    values[7] = value;
    query.b = TensorData::new(values, [6, 2]);
    let targets = TargetConfig::list(["blocks.0.query"]);
    let file = AdapterFile::new(AdapterConfig::new(2, 4.0, targets), vec![query]);
    let mut model = net();
    let options = LoadOptions::new().with_dtype(Some(dtype));
    let attached = file.attach(&mut model, "default", &options);
    match attached {
        Ok(_) => Ok(model.factors("default").unwrap()[0].1.b.val().dtype()),
        Err(error) => {
            assert_eq!(model.adapters().count(), 0);
            Err(error)
        }
    }
}

#[test]
fn a_finite_value_that_becomes_infinite_is_an_error_that_names_it() {
    for (value, dtype) in [
        (65520.0, FloatDType::F16),
        (-1e6, FloatDType::F16),
        (3.4e38, FloatDType::BF16),
    ] {
        let error = overflow(value, dtype).unwrap_err();
        assert!(
            matches!(&error, PeftError::Overflow { index: 7, value: found, .. } if *found == f64::from(value)),
            "{error}"
        );
        let text = error.to_string();
        assert!(
            text.contains("base_model.model.blocks.0.query.lora_B.weight"),
            "{text}"
        );
        assert!(text.contains("choose F32"), "{text}");
    }
    for (value, dtype, expected) in [
        (65504.0, FloatDType::F16, DType::F16),
        (1e30, FloatDType::BF16, DType::BF16),
        (3.4e38, FloatDType::F32, DType::F32),
    ] {
        assert_eq!(overflow(value, dtype).unwrap(), expected);
    }
}

#[derive(Module, Debug)]
struct Scale {
    m: Param<Tensor<1>>,
    magnitude: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct Scaled {
    query: Linear,
    scale: Scale,
}

fn scaled() -> PeftModel<Scaled> {
    let device = Device::default();
    let ones = || Param::from_tensor(Tensor::ones([4], &device));
    PeftModel::new(Scaled {
        query: LinearConfig::new(6, 6).init(&device),
        scale: Scale {
            m: ones(),
            magnitude: ones(),
        },
    })
}

/// torchtune and mlx-lm call DoRA's magnitude so.
#[test]
fn a_saved_parameter_may_be_called_as_a_magnitude() {
    for dora in [false, true] {
        let mut query = module("query", 2, 6, 6);
        query.magnitude = dora.then(|| TensorData::ones::<f32, _>([6]));
        let mut config =
            AdapterConfig::new(2, 4.0, TargetConfig::list(["query"])).with_use_dora(dora);
        config.modules_to_save = vec!["scale".into()];
        let mut file = AdapterFile::new(config, vec![query]);
        file.copies = ["m", "magnitude"]
            .map(|name| ParameterTensor {
                path: format!("scale.{name}"),
                data: TensorData::new(vec![2f32; 4], [4]),
            })
            .into();
        let mut model = scaled();
        file.attach(&mut model, "default", &LoadOptions::default())
            .unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let dir = model
            .save_adapter("default", scratch.path(), &SaveOptions::default())
            .unwrap();
        let again = AdapterFile::read(&dir, &ReadOptions::default()).unwrap();
        let sorted = |mut copies: Vec<ParameterTensor>| {
            copies.sort_by(|a, b| a.path.cmp(&b.path));
            copies
        };
        assert_eq!(sorted(again.copies), sorted(file.copies), "{dora}");
        let mut model = scaled();
        model
            .load_adapter("default", &dir, &LoadOptions::default())
            .unwrap();
        let copies = model.changes("default").unwrap();
        assert_eq!(copies.len(), 3);
    }
}

#[derive(Module, Debug)]
struct Classifier {
    dense: Linear,
    out_proj: Linear,
}

#[derive(Module, Debug)]
struct Roberta {
    query: Linear,
    classifier: Classifier,
}

fn roberta() -> PeftModel<Roberta> {
    let linear = |d_out| LinearConfig::new(6, d_out).init(&Device::default());
    PeftModel::new(Roberta {
        query: linear(6),
        classifier: Classifier {
            dense: linear(6),
            out_proj: linear(2),
        },
    })
}

/// The state of a whole model has the adapter's name in its keys, and a saved module may hold modules.
#[test]
fn nested_saved_modules_of_wrapped_models_are_read() {
    use Dtype::F32;

    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"], "modules_to_save": ["classifier", "score"]}"#;
    let wrapped = [
        "query.lora_A.default.weight",
        "query._checkpoint_wrapped_module.lora_B.default.weight",
        "classifier.modules_to_save.default.dense.weight",
        "classifier.modules_to_save.default.dense.bias",
        "classifier.modules_to_save.default.out_proj.weight",
        "_fsdp_wrapped_module.classifier.modules_to_save.default.out_proj.bias",
    ];
    let plain = [
        "query.lora_A.weight",
        "query.lora_B.weight",
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    ];
    let shapes: [&[usize]; 6] = [&[2, 6], &[6, 2], &[6, 6], &[6], &[2, 6], &[2]];
    for names in [wrapped, plain] {
        let dir = tempfile::tempdir().unwrap();
        let tensors = names
            .iter()
            .zip(shapes)
            .map(|(name, shape)| (*name, F32, shape));
        write(dir.path(), config, &tensors.collect::<Vec<_>>());
        let mut model = roberta();
        let report = model.load_adapter("default", dir.path(), &LoadOptions::default());
        assert_eq!(report.unwrap().loaded.len(), 6);
        let changes = model.changes("default").unwrap();
        let mut paths: Vec<_> = changes.iter().map(|(path, _)| path.as_str()).collect();
        paths.sort_unstable();
        let expected = [
            "classifier.dense.bias",
            "classifier.dense.weight",
            "classifier.out_proj.bias",
            "classifier.out_proj.weight",
            "query.weight",
        ];
        assert_eq!(paths, expected);
        // Written as PEFT writes it.
        let out = model.save_adapter("default", dir.path().join("out"), &SaveOptions::default());
        let bytes = fs::read(out.unwrap().join(WEIGHTS_FILE)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut keys: Vec<_> = file.names().into_iter().map(|key| key.to_owned()).collect();
        let mut expected = plain.map(|name| format!("base_model.model.{name}"));
        keys.sort_unstable();
        expected.sort_unstable();
        assert_eq!(keys, expected);
    }
}

#[test]
fn a_fresh_copy_or_a_merge_that_a_type_makes_infinite_is_refused() {
    use burn_peft::adapter::LoraConfig;
    use burn_peft::model::{PeftConfig, TrainableTokens};

    let device = Device::default();
    let large = |mut model: Roberta| {
        let weight = Tensor::<2>::full([6, 2], 7e4, &device);
        model.classifier.out_proj.weight = Param::from_tensor(weight);
        model
    };
    let config = |dtype| {
        let mut lora = LoraConfig::new(2);
        lora.dtype = dtype;
        PeftConfig::new(lora, TargetConfig::list(["query"]))
    };
    let save = |dtype| config(dtype).with_modules_to_save(["out_proj"]);
    let tokens = || TrainableTokens::Named([("out_proj".to_owned(), vec![1])].into());
    let rows = |dtype| config(dtype).with_trainable_tokens(tokens());
    for fresh in [&save as &dyn Fn(FloatDType) -> PeftConfig, &rows] {
        let mut model = PeftModel::new(large(roberta().into_module()));
        let error = model
            .add_adapter("default", &fresh(FloatDType::F16))
            .unwrap_err();
        assert!(error.to_string().contains("infinite in F16"), "{error}");
        assert_eq!(model.adapters().count(), 0);
        model
            .add_adapter("default", &fresh(FloatDType::BF16))
            .unwrap();
    }

    // The sum of an f16 weight and a change that f32 holds.
    let mut model = roberta().into_module();
    let weight = Tensor::<2>::full([6, 6], 6e4, &device).cast(FloatDType::F16);
    model.query.weight = Param::from_tensor(weight);
    let mut model = PeftModel::new(model);
    let mut query = module("query", 2, 6, 6);
    query.a = TensorData::full::<f32, _>([2, 6], 100.0);
    query.b = TensorData::full::<f32, _>([6, 2], 100.0);
    let file = AdapterFile::new(
        AdapterConfig::new(2, 2.0, TargetConfig::list(["query"])),
        vec![query],
    );
    file.attach(&mut model, "default", &LoadOptions::default())
        .unwrap();
    let error = model.merged().unwrap_err();
    assert!(
        matches!(&error, PeftError::Overflow { tensor, value, .. } if tensor == "query.weight" && *value == 8e4),
        "{error}"
    );
}
