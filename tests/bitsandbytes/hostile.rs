//! Files that lie: an error that names what is wrong, and a model that has not changed; or exactly what the file says.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::FloatDType;
use burn_peft::PeftError;
use burn_peft::format::{BaseMismatch, SaveBaseOptions};
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use serde_json::Value;

use super::*;

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

const NF4: &str = "layer.weight.quant_state.bitsandbytes__nf4";
const FP4: &str = "layer.weight.quant_state.bitsandbytes__fp4";

#[derive(Module, Debug)]
pub struct One {
    layer: Linear,
}

fn one(d_out: usize, d_in: usize) -> PeftModel<One> {
    let config = LinearConfig::new(d_in, d_out).with_bias(false);
    let layer = config.init(&Device::default());
    PeftModel::new(One { layer })
}

/// The tensors of one of the golden layers, called `layer`, without its bias.
fn layer(name: &str) -> Tensors {
    let all = tensors(&golden("linears")).into_iter();
    let own = all.filter_map(|(key, tensor)| {
        let key = key.strip_prefix(name)?;
        key.starts_with(".weight")
            .then(|| (format!("layer{key}"), tensor))
    });
    own.collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Loads the tensors into a layer; on an error it must not have changed.
fn load_one(tensors: &Tensors, [d_out, d_in]: [usize; 2]) -> Result<PeftModel<One>, PeftError> {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("model.safetensors");
    write(&path, tensors);
    let mut model = one(d_out, d_in);
    let before = model.layer.weight.val().into_data();
    match model.load_base(&path, &BaseOptions::new()) {
        Ok(_) => Ok(model),
        Err(error) => {
            assert_eq!(model.layer.weight.val().into_data(), before);
            Err(error)
        }
    }
}

fn error(tensors: &Tensors, shape: [usize; 2]) -> PeftError {
    load_one(tensors, shape).unwrap_err()
}

fn mismatch(tensors: &Tensors, shape: [usize; 2]) -> BaseMismatch {
    match error(tensors, shape) {
        PeftError::BaseMismatch { report, .. } => *report,
        other => panic!("{other}"),
    }
}

const ODD_DOUBLE: [usize; 2] = [33, 65];
const PLAIN: [usize; 2] = [8, 64];

/// The JSON of the state changed by `change`.
fn with_state(name: &str, change: impl Fn(&mut Value)) -> Tensors {
    let mut tensors = layer(name);
    let (_, shape, bytes) = tensors.get_mut(NF4).unwrap();
    let mut state = serde_json::from_slice(bytes).unwrap();
    change(&mut state);
    *bytes = state.to_string().into_bytes();
    *shape = vec![bytes.len()];
    tensors
}

#[test]
fn a_missing_companion_is_missing_and_one_too_many_is_unexpected() {
    for name in layer("odd_double").into_keys() {
        let mut tensors = layer("odd_double");
        tensors.remove(&name);
        let found = mismatch(&tensors, ODD_DOUBLE);
        assert_eq!(found.missing, [name]);
        assert!(found.unexpected.is_empty());
    }
    // Of a plain weight, second-level scales.
    let mut tensors = layer("plain");
    for name in [
        "layer.weight.nested_absmax",
        "layer.weight.nested_quant_map",
    ] {
        tensors.insert(name.into(), layer("odd_double")[name].clone());
    }
    let found = mismatch(&tensors, PLAIN);
    assert_eq!(
        found.unexpected,
        [
            "layer.weight.nested_absmax",
            "layer.weight.nested_quant_map"
        ]
    );
    // Two states.
    let mut tensors = layer("plain");
    tensors.insert(FP4.into(), tensors[NF4].clone());
    assert_eq!(mismatch(&tensors, PLAIN).unexpected, [FP4]);
    // Companions of a dense weight.
    let mut tensors = layer("plain");
    let dense = (Dtype::F32, PLAIN.to_vec(), vec![0; 4 * 8 * 64]);
    tensors.insert("layer.weight".into(), dense);
    assert_eq!(mismatch(&tensors, PLAIN).shapes[0].tensor, "layer.weight");
    // No companion at all.
    tensors.retain(|name, _| name == "layer.weight");
    tensors.insert(
        "layer.weight".into(),
        layer("plain")["layer.weight"].clone(),
    );
    assert_eq!(mismatch(&tensors, PLAIN).dtypes[0].tensor, "layer.weight");
}

#[test]
fn types_and_shapes_are_those_that_the_state_demands() {
    for (name, shape) in [("odd_double", ODD_DOUBLE), ("plain", PLAIN)] {
        for key in layer(name).into_keys() {
            // One value less.
            let mut tensors = layer(name);
            let (dtype, dims, bytes) = tensors.get_mut(&key).unwrap();
            dims[0] -= 1;
            bytes.truncate(dims.iter().product::<usize>() * dtype.bitsize() / 8);
            if key == NF4 {
                let error = error(&tensors, shape);
                assert!(matches!(error, PeftError::InFile { .. }), "{error}");
                continue;
            }
            assert_eq!(mismatch(&tensors, shape).shapes[0].tensor, key);
            // The same bytes in another shape.
            let mut tensors = layer(name);
            tensors.get_mut(&key).unwrap().1.insert(0, 1);
            assert_eq!(mismatch(&tensors, shape).shapes[0].tensor, key);
            // Under another type, if there are whole values of it.
            let mut tensors = layer(name);
            let (dtype, dims, bytes) = tensors.get_mut(&key).unwrap();
            *dtype = if *dtype == Dtype::U8 {
                Dtype::F8_E4M3
            } else {
                Dtype::I32
            };
            assert_eq!(
                dims.iter().product::<usize>() * dtype.bitsize() / 8,
                bytes.len()
            );
            assert_eq!(mismatch(&tensors, shape).dtypes[0].tensor, key);
        }
    }
    // The weight of another layer.
    assert_eq!(mismatch(&layer("plain"), [64, 8]).shapes[0].found, [8, 64]);
    // A state longer than any.
    let mut tensors = layer("plain");
    tensors.insert(NF4.into(), (Dtype::U8, vec![5000], vec![b' '; 5000]));
    assert_eq!(mismatch(&tensors, PLAIN).shapes[0].tensor, NF4);
}

#[test]
fn a_state_that_lies_is_an_error() {
    let set = |name, key: &str, value: Value| {
        let key = key.to_owned();
        with_state(name, move |state| state[&key] = value.clone())
    };
    // What cannot be: named by key.
    for (key, value) in [
        ("quant_type", "fp4".into()),
        ("blocksize", 48.into()),
        ("dtype", "int8".into()),
        ("shape", Value::Null),
        ("nested_blocksize", 64.into()),
        ("nested_dtype", "float16".into()),
        ("nested_offset", Value::Null),
        ("nested_offset", 1e300.into()),
        ("extra", 1.into()),
    ] {
        let error = error(&set("odd_double", key, value), ODD_DOUBLE).to_string();
        assert!(error.contains(&format!("`{key}` of `{NF4}`")), "{error}");
        assert!(error.contains("model.safetensors"), "{error}");
    }
    // What could be, but not of these tensors.
    let found = mismatch(&set("odd_double", "blocksize", 64.into()), ODD_DOUBLE);
    assert_eq!(found.shapes[0].tensor, "layer.weight.absmax");
    let found = mismatch(&set("odd_double", "shape", [65, 33].into()), ODD_DOUBLE);
    assert_eq!(found.shapes[0].found, [65, 33]);
    // Finite numbers all, of which scales are made that are not.
    let mut tensors = set("odd_double", "nested_offset", 3e38.into());
    let (_, _, bytes) = tensors.get_mut("layer.weight.nested_absmax").unwrap();
    bytes[..4].copy_from_slice(&f32::MAX.to_le_bytes());
    let error = error(&tensors, ODD_DOUBLE);
    let PeftError::InFile { source, .. } = &error else {
        panic!("{error}");
    };
    assert!(matches!(**source, PeftError::NotFinite { .. }), "{error}");
}

#[test]
fn maps_must_be_those_that_are_computed_with() {
    for (name, shape) in [
        ("odd_double", ODD_DOUBLE),
        ("plain", PLAIN),
        ("fp4", [7, 33]),
    ] {
        for key in ["layer.weight.quant_map", "layer.weight.nested_quant_map"] {
            let mut tensors = layer(name);
            let Some((_, _, bytes)) = tensors.get_mut(key) else {
                continue;
            };
            // One ulp of the last value; then NaN.
            let last = bytes.len() - 4;
            bytes[last] ^= 1;
            let found = error(&tensors, shape).to_string();
            assert!(
                found.contains(key) && found.contains("of bitsandbytes has"),
                "{found}"
            );
            let (_, _, bytes) = tensors.get_mut(key).unwrap();
            bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
            assert!(matches!(
                error(&tensors, shape),
                PeftError::Malformed { .. }
            ));
        }
    }
}

#[test]
fn scales_that_are_not_finite_are_an_error_that_names_the_first() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (name, shape, key, at, index) in [
            ("plain", PLAIN, "layer.weight.absmax", 5, 5),
            ("odd_double", ODD_DOUBLE, "layer.weight.nested_absmax", 0, 0),
            ("fp4", [7, 33], "layer.weight.absmax", 2, 2),
            ("fp4_double", [12, 64], "layer.weight.nested_absmax", 0, 0),
        ] {
            let mut tensors = layer(name);
            let (_, _, bytes) = tensors.get_mut(key).unwrap();
            bytes[4 * at..][..4].copy_from_slice(&value.to_le_bytes());
            let PeftError::InFile { source, .. } = error(&tensors, shape) else {
                panic!("{name}");
            };
            match *source {
                PeftError::NotFinite {
                    tensor,
                    index: found,
                    ..
                } => {
                    assert_eq!((tensor.as_str(), found), ("layer.weight.absmax", index));
                }
                other => panic!("{other}"),
            }
        }
    }
}

#[test]
fn a_configuration_that_says_otherwise_is_an_error() {
    let quantization =
        r#"{"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}"#;
    let result = |text: &str| {
        let scratch = tempfile::tempdir().unwrap();
        write(&scratch.path().join("model.safetensors"), &layer("plain"));
        fs::write(scratch.path().join("config.json"), text).unwrap();
        let mut model = one(8, 64);
        model
            .load_base(scratch.path(), &BaseOptions::new())
            .map(|_| ())
    };
    let with = |from: &str, to: &str| {
        let quantization = quantization.replace(from, to);
        result(&format!(r#"{{"quantization_config": {quantization}}}"#))
    };
    with("", "").unwrap();
    result("{}").unwrap();
    result(r#"{"quantization_config": null}"#).unwrap();
    for (from, to, key) in [
        ("bitsandbytes", "gptq", "quant_method"),
        ("true", "false", "load_in_4bit"),
        ("nf4", "fp4", "bnb_4bit_quant_type"),
        (
            r#", "bnb_4bit_quant_type": "nf4""#,
            "",
            "bnb_4bit_quant_type",
        ),
    ] {
        let error = with(from, to).unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
        assert!(
            error.contains(&format!("quantization_config.{key}")),
            "{error}"
        );
    }
    assert!(matches!(result("["), Err(PeftError::InFile { .. })));
    assert!(result(r#"{"quantization_config": 3}"#).is_err());
}

/// What a state says.
fn state(bytes: &[u8]) -> (Value, Option<f32>) {
    let mut state: Value = serde_json::from_slice(bytes).unwrap();
    let offset = state.as_object_mut().unwrap().remove("nested_offset");
    (
        state,
        offset
            .and_then(|offset| offset.as_f64())
            .map(|offset| offset as f32),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Any byte of any tensor of a checkpoint changed: an error, or what is loaded is what the file says.
    #[test]
    fn a_changed_byte_is_an_error_or_taken_as_it_is(
        double in any::<bool>(),
        tensor in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        value in any::<u8>(),
    ) {
        let (name, shape) = if double { ("odd_double", ODD_DOUBLE) } else { ("plain", PLAIN) };
        let mut tensors = layer(name);
        let key = tensor.get(&tensors.keys().cloned().collect::<Vec<_>>()).clone();
        let (_, _, bytes) = tensors.get_mut(&key).unwrap();
        let at = at.index(bytes.len());
        bytes[at] = value;
        if let Ok(model) = load_one(&tensors, shape) {
            let scratch = tempfile::tempdir().unwrap();
            model.save_base(scratch.path(), &SaveBaseOptions::default()).unwrap();
            let found = super::tensors(scratch.path());
            for (key, (_, _, bytes)) in &tensors {
                let found = &found[key].2;
                match key == NF4 {
                    true => prop_assert_eq!(state(found), state(bytes)),
                    // Zeros of either sign are one value of a map.
                    false if key.ends_with("map") => prop_assert_eq!(found.len(), bytes.len()),
                    false => prop_assert_eq!(found, bytes),
                }
            }
        }
    }
}

#[test]
fn a_type_that_the_device_does_not_have_is_cast_or_an_error() {
    // Packed weights compose to any type that was asked for.
    let scratch = tempfile::tempdir().unwrap();
    write(
        &scratch.path().join("model.safetensors"),
        &layer("odd_double"),
    );
    for dtype in [FloatDType::F32, FloatDType::BF16, FloatDType::F16] {
        let mut model = one(33, 65);
        let options = BaseOptions::new().with_dtype(dtype);
        model.load_base(scratch.path(), &options).unwrap();
        let weight = model.layer.weight.val();
        assert_eq!(weight.dtype(), burn::tensor::DType::from(dtype));
    }
}

#[test]
fn a_dense_model_whose_configuration_says_four_bits_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let dense = (Dtype::F32, PLAIN.to_vec(), vec![0; 4 * 8 * 64]);
    let tensors = [("layer.weight".to_owned(), dense)].into();
    write(&scratch.path().join("model.safetensors"), &tensors);
    let load = |config: &str| {
        fs::write(scratch.path().join("config.json"), config).unwrap();
        one(8, 64).load_base(scratch.path(), &BaseOptions::new())
    };
    let quantization = |method: &str, packed: bool| {
        format!(
            r#"{{"quantization_config": {{"quant_method": "{method}", "load_in_4bit": {packed}}}}}"#
        )
    };
    let error = load(&quantization("bitsandbytes", true)).unwrap_err();
    assert!(error.to_string().contains("load_in_4bit"), "{error}");
    load(&quantization("bitsandbytes", false)).unwrap();
    load(&quantization("gptq", true)).unwrap();
    // Of no interest to a dense model.
    load("[").unwrap();
}

/// What is wrong with names comes before what is wrong inside of one tensor, and all of it.
#[test]
fn a_broken_tensor_does_not_hide_those_that_are_missing() {
    let mut tensors = layer("odd_double");
    let (_, _, map) = tensors.get_mut("layer.weight.quant_map").unwrap();
    map[0] ^= 1;
    tensors.insert("other".into(), (Dtype::F32, vec![1], vec![0; 4]));
    assert_eq!(mismatch(&tensors, ODD_DOUBLE).unexpected, ["other"]);
    tensors.remove("other");
    let found = error(&tensors, ODD_DOUBLE);
    assert!(matches!(found, PeftError::Malformed { .. }), "{found}");
}
